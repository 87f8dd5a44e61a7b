"""Sampling latents of stored documents with a model, over all of its replicas."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ra3_megatron.config.run import RunConfig
from ra3_megatron.corpus.indexed import to_document
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rollout.latent_sampler import Job, LatentSampler
from ra3_megatron.rollout.megatron_engine import MegatronEngine
from ra3_megatron.text.latents import LatentFormat
from ra3_megatron.text.tokenizer import Tokenizer
from ra3_megatron.text.transcript import Transcript


class LatentPolicy:
    """q: a model, and the engine that samples from it. With an infinite price of thoughts it is offered no choice."""

    def __init__(
        self,
        model: torch.nn.Module,
        config: RunConfig,
        runtime: Runtime,
        latents: LatentFormat,
        tokenizer: Tokenizer,
        weight_version: int = 0,
    ) -> None:
        self.runtime = runtime
        self.latents = latents
        self.tokenizer = tokenizer
        self.may_think = math.isfinite(config.estep.latent_price)
        rollout = config.rollout
        self.engine = MegatronEngine(model, runtime, latents, tokenizer.vocab_size, rollout.temperature)
        self.engine.weight_version = weight_version
        self._sampler = LatentSampler(
            self.engine, latents, tokenizer, config.model.context_length, rollout.batch_size, rollout.sampler
        )

    def sample(self, documents: Sequence[Transcript], keys: Sequence[Sequence[int]], group: int) -> list[Transcript]:
        """`group` transcripts of each document, document by document, the same on every process.

        keys: one random stream a document (its transcripts are numbered behind it). Documents are dealt out to the
        replicas of the model; the outcome does not depend on how.
        """
        if not self.may_think:
            return [self._without_choice(document) for document in documents for _ in range(group)]
        size, rank = self.runtime.replica_size, self.runtime.replica_rank
        jobs = []
        for index in range(rank, len(documents), size):
            document = to_document(documents[index], self.latents, self.tokenizer)
            jobs += [Job(document, (*keys[index], g)) for g in range(group)]
        mine = self._sampler.sample(jobs)
        self.engine.finish()
        shares = self.runtime.gather_replicas(mine)
        transcripts: list[Transcript] = []
        for index in range(len(documents)):
            start = index // size * group
            transcripts += shares[index % size][start : start + group]
        return transcripts

    def _without_choice(self, document: Transcript) -> Transcript:
        return replace(
            document,
            offered=np.zeros_like(document.offered),
            log_probs=np.zeros(document.num_tokens, dtype=np.float32),
            weight_version=self.engine.weight_version,
        )
