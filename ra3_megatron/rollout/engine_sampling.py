"""Sampling through engine processes: transcripts from their owners to everybody, failures too.

Engines are refitted by `publish`. With `background`, a thread of their owner talks to them while training goes on; it
uses no process group, so nothing is exchanged before the batch is waited for.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from ra3_megatron.config.errors import Unavailable, UserError
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rollout.latent_sampler import Job, LatentSampler
from ra3_megatron.rollout.pieces import Until
from ra3_megatron.rollout.protocol import GenerateRequest
from ra3_megatron.rollout.refit.errors import RefitError
from ra3_megatron.rollout.refit.refit import Refit
from ra3_megatron.rollout.refit.sending import Update
from ra3_megatron.rollout.sampling import ByPrompt, Wait, complete_groups, sample_groups
from ra3_megatron.rollout.vllm.process import EngineError

T = TypeVar("T")


class EngineSampling:
    """`Sampling` through the engines of all processes. One model at a time."""

    def __init__(
        self,
        runtime: Runtime,
        refit: Refit,
        updates: Sequence[Update],
        sampler: LatentSampler | None,
        shares: tuple[int, int],
    ) -> None:
        """refit: of the model. updates, sampler: of this process's engines, if it has any. shares: which share of the
        documents those sample, of how many."""
        self._runtime, self._refit, self._updates = runtime, refit, updates
        self._sampler, self._shares = sampler, shares
        self._version = 0

    @property
    def weight_version(self) -> int:
        return self._version

    def publish(self, version: int) -> dict[str, float]:
        try:
            stats = self._refit.send(self._updates, version)
        except RefitError as error:
            raise Unavailable(f"rollout.engine=vllm: {error}") from error
        self._version = version
        return {"refit_seconds": stats.seconds, "refit_bytes_per_second": stats.nbytes / stats.seconds}

    def mine(self, documents: int) -> Sequence[int]:
        first, step = self._shares
        return range(first, documents, step) if self._sampler is not None else []

    def start(self, jobs: Mapping[int, list[Job]], background: bool = False) -> Wait:
        sampler = self._sampler
        return self._begin(lambda: {} if sampler is None else sample_groups(sampler, jobs), background)

    def generate(
        self, requests: Mapping[int, list[GenerateRequest]], background: bool = False, until: Until | None = None
    ) -> Callable[[], ByPrompt]:
        sampler = self._sampler

        def work() -> ByPrompt:
            return {} if sampler is None else complete_groups(sampler.engine, requests, sampler.batch_size, until)

        return self._begin(work, background)

    def _begin(self, work: Callable[[], dict[int, list[T]]], background: bool) -> Callable[[], dict[int, list[T]]]:
        result = _Result(work)
        thread = threading.Thread(target=result.run, name="rollouts", daemon=True) if background else None
        if thread is None:
            result.run()
        else:
            thread.start()

        def wait() -> dict[int, list[T]]:
            if thread is not None:
                thread.join()
            if result.defect is not None:
                raise result.defect
            raise_anywhere(result.failure, self._runtime)
            everything: dict[int, list[T]] = {}
            for share in self._runtime.gather_all(result.sampled):
                everything |= share
            return everything

        return wait


class _Result(Generic[T]):
    """What a batch comes to."""

    def __init__(self, work: Callable[[], dict[int, list[T]]]) -> None:
        self._work = work
        self.sampled: dict[int, list[T]] = {}
        self.failure = ""
        self.defect: Exception | None = None
        """What should not have happened."""

    def run(self) -> None:
        try:
            self.sampled = self._work()
        except EngineError as error:
            self.failure = str(error)
        except Exception as error:  # a thread would lose it
            self.defect = error


def raise_anywhere(failure: str, runtime: Runtime, mistake: bool = False) -> None:
    """Unavailable on every process when there is a failure on any; UserError when one of them is a mistake of the user,
    which no retry mends. Collective."""
    failures = {told: None for told in runtime.gather_all((failure, mistake)) if told[0]}
    if failures:
        kind = UserError if any(mistake for _, mistake in failures) else Unavailable
        raise kind(f"rollout.engine=vllm: {'; '.join(why for why, _ in failures)}")
