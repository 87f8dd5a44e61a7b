"""Transcripts for one E-step update after another: sampled with the present weights, or one update ahead of time.

With `rollout.max_staleness=0` update k trains on transcripts of the weights it starts from. With 1, the transcripts of
update k + 1 are sampled while update k trains, with the weights that update k started from: they are one update old
when they are used, and the behaviour log-probabilities they carry correct for it (`estep.importance_cap`). The first
update of a phase has no older weights; it samples with its own.

What is sampled ahead is part of the position that a checkpoint keeps, so a resumed run trains on the same transcripts.
"""

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ra3_megatron.config.run import RunConfig
from ra3_megatron.corpus.sampler import DocumentSampler
from ra3_megatron.em.policy import LatentPolicy
from ra3_megatron.mcore.step_clock import StepClock
from ra3_megatron.rollout.sampling import Sampling
from ra3_megatron.text.transcript import Transcript

_ARRAYS = ("ids", "roles", "lines", "offered", "log_probs")


class RolloutQueue:
    """Transcripts of `policy` for the updates 0, 1, … of an E-step. All calls are collective."""

    def __init__(
        self,
        policy: LatentPolicy,
        documents: Any,
        sampler: DocumentSampler,
        key: Sequence[int],
        config: RunConfig,
        clock: StepClock | None = None,
    ) -> None:
        """documents: store of the corpus; sampler: their order; key: names the random streams; clock: of the steps."""
        self._policy, self._documents, self._sampler, self._key = policy, documents, sampler, tuple(key)
        self._settings = config.estep
        self._clock = clock or StepClock()
        self._ahead = config.rollout.max_staleness
        self._published: int | None = None
        self._pending: Callable[[], list[Transcript]] | None = None

    @property
    def sampling(self) -> Sampling:
        """What samples."""
        return self._policy.sampling

    def settle(self, version: int) -> None:
        """Wait for what is being sampled, and sample with the model's present weights from now on, so that others may
        use the sampling in between."""
        if self._pending is not None:
            transcripts = self._pending()
            self._pending = lambda: transcripts
        self._publish(version)

    def next(self, step: int) -> tuple[list[Transcript], dict[str, float]]:
        """Transcripts for update `step`, G of each document, and metrics of how they came about.

        The model's weights must be those that the update starts from.
        """
        if self._pending is None:
            metrics = self._publish(step)
            self._pending = self._begin(step)
        else:
            metrics = {}
        transcripts = self._pending()
        self._pending = None
        metrics["staleness"] = float(np.mean([step - t.weight_version for t in transcripts]))
        if self._ahead and step + 1 < self._settings.steps:
            metrics |= self._publish(step)
            self._pending = self._begin(step + 1, background=True)
        return transcripts, metrics

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable: the position in the data, and what was sampled ahead (which is waited for)."""
        pending = None
        if self._pending is not None:
            transcripts = self._pending()
            self._pending = lambda: transcripts
            pending = pack(transcripts)
        return {"sampler": dict(self._sampler.state_dict()), "pending": pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._sampler.load_state_dict(state["sampler"])
        self._pending = None
        if state["pending"] is not None:
            transcripts = unpack(state["pending"])
            self._pending = lambda: transcripts

    def _publish(self, version: int) -> dict[str, float]:
        if self._published == version:
            return {}
        self._published = version
        with self._clock.part("refit"):
            return self._policy.publish(version)

    def _begin(self, step: int, background: bool = False) -> Callable[[], list[Transcript]]:
        numbers = self._sampler.next(self._settings.documents_per_step)
        documents = [self._documents[number] for number in numbers]
        keys = [(*self._key, step, place) for place in range(len(documents))]
        return self._policy.begin(documents, keys, self._settings.group_size, background)


def pack(transcripts: Sequence[Transcript]) -> dict[str, Any]:
    """Transcripts that were sampled, as JSON values."""
    arrays = {name: np.concatenate([getattr(t, name) for t in transcripts]) for name in _ARRAYS}
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return {
        "tokens": [t.num_tokens for t in transcripts],
        "lines": [t.num_lines for t in transcripts],
        "weight_versions": [t.weight_version for t in transcripts],
        "documents": [t.document for t in transcripts],
        "arrays": base64.b64encode(stream.getvalue()).decode("ascii"),
    }


def unpack(packed: dict[str, Any]) -> list[Transcript]:
    """The inverse of `pack`."""
    with np.load(io.BytesIO(base64.b64decode(packed["arrays"])), allow_pickle=False) as arrays:
        ends = {"offered": np.cumsum(packed["lines"])[:-1]}
        parts = {name: np.split(arrays[name], ends.get(name, np.cumsum(packed["tokens"])[:-1])) for name in _ARRAYS}
    named = zip(packed["weight_versions"], packed["documents"], strict=True)
    return [
        Transcript(**{name: part[number] for name, part in parts.items()}, weight_version=version, document=document)
        for number, (version, document) in enumerate(named)
    ]
