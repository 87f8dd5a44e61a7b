"""Sampling latents of stored documents with a model, whatever samples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from ra3_megatron.config.run import RunConfig
from ra3_megatron.corpus.indexed import to_document
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rollout.engine_pool import EnginePool
from ra3_megatron.rollout.latent_sampler import Job
from ra3_megatron.rollout.sampling import LiveSampling, Sampling
from ra3_megatron.text.latents import LatentFormat
from ra3_megatron.text.tokenizer import Tokenizer
from ra3_megatron.text.transcript import Transcript


class LatentPolicy:
    """q: what samples from a model. With an infinite price of thoughts it is offered no choice."""

    def __init__(
        self, sampling: Sampling, runtime: Runtime, config: RunConfig, latents: LatentFormat, tokenizer: Tokenizer
    ) -> None:
        self.sampling = sampling
        self.runtime = runtime
        self.latents = latents
        self.tokenizer = tokenizer
        self.may_think = math.isfinite(config.estep.latent_price)

    @property
    def weight_version(self) -> int:
        """Of the weights it samples with."""
        return self.sampling.weight_version

    def publish(self, version: int) -> dict[str, float]:
        """Sample with the model's present weights from now on. Collective."""
        return self.sampling.publish(version)

    def sample(
        self,
        documents: Sequence[Transcript],
        keys: Sequence[Sequence[int]],
        group: int,
        decisions: Sequence[npt.NDArray[np.bool_]] | None = None,
    ) -> list[Transcript]:
        """`group` transcripts of each document, document by document, the same on every process. Collective.

        keys: one random stream a document (its transcripts are numbered behind it); decisions: see `Job`, of each
        document.
        """
        return self.begin(documents, keys, group, decisions=decisions)()

    def begin(
        self,
        documents: Sequence[Transcript],
        keys: Sequence[Sequence[int]],
        group: int,
        background: bool = False,
        decisions: Sequence[npt.NDArray[np.bool_]] | None = None,
    ) -> Callable[[], list[Transcript]]:
        """Begin with what `sample` does; call the result to wait for it. background: training may go on meanwhile."""
        if not self.may_think:
            unchanged = [self._without_choice(document) for document in documents for _ in range(group)]
            return lambda: unchanged
        jobs = {}
        for index in self.sampling.mine(len(documents)):
            document = to_document(documents[index], self.latents, self.tokenizer)
            forced = None if decisions is None else decisions[index]
            jobs[index] = [Job(document, (*keys[index], g), forced) for g in range(group)]
        wait = self.sampling.start(jobs, background)

        def transcripts() -> list[Transcript]:
            by_document = wait()
            return [transcript for index in range(len(documents)) for transcript in by_document[index]]

        return transcripts

    def _without_choice(self, document: Transcript) -> Transcript:
        return replace(
            document,
            offered=np.zeros_like(document.offered),
            log_probs=np.zeros(document.num_tokens, dtype=np.float32),
            weight_version=self.weight_version,
        )


def latent_policy(
    model: torch.nn.Module,
    config: RunConfig,
    runtime: Runtime,
    latents: LatentFormat,
    tokenizer: Tokenizer,
    weight_version: int | None = None,
    engines: EnginePool | None = None,
) -> LatentPolicy:
    """q: what samples from `model`. Collective.

    weight_version: of the model's present weights, which are published under it; None: `publish` comes before `sample`.
    engines: vLLM processes, which serve one model at a time, the one of the policy that was made last; None: the model
    itself is sampled from in every process.
    """
    sampling: Sampling
    if engines is None:
        longest, keep = config.model.context_length, config.text.keep_latents
        sampling = LiveSampling(model, runtime, latents, tokenizer, config.rollout, longest, keep)
    else:
        sampling = engines.sampling(model)
    policy = LatentPolicy(sampling, runtime, config, latents, tokenizer)
    if weight_version is not None:
        policy.publish(weight_version)
    return policy
