"""Rollout throughput: jump-ahead against naive one-request-per-line sampling, at fixed thinking rates.

All samplers are batched over documents and their groups and draw from the same uniforms, so they sample the same
transcripts. `naive` sends one request a line, each computed from nothing, as to an engine that keeps nothing between
requests; `naive + cache` has an engine that keeps each transcript's keys and values and shares equal prompts. The
thinking rate is forced by the uniforms of the decisions (0 thinks, 1 does not): it does not depend on the weights.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch

import ra3_megatron.mcore  # noqa: F401
from benchmarks.measure import Timing, alternate
from benchmarks.mstep import SIZES, VOCABULARY
from ra3_megatron.config.data import CorpusConfig, TextConfig
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.corpus.sources import iter_texts
from ra3_megatron.mcore.model import build_model
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rollout import latent_sampler
from ra3_megatron.rollout.latent_sampler import Job, LatentSampler
from ra3_megatron.rollout.megatron_engine import MegatronEngine
from ra3_megatron.rollout.protocol import Uniforms
from ra3_megatron.text.latents import Document, LatentFormat, build_format, cut, encode_document
from ra3_megatron.text.tokenizer import Tokenizer, train_sentencepiece

RATES = (0.0, 0.1, 0.3, 0.6)
GROUP = 8
"""Transcripts of each document."""
BATCH = 64
"""Transcripts at once."""
TEXT = TextConfig(max_latent_tokens=6)


@dataclass(frozen=True)
class RolloutResult:
    """Seconds of sampling GROUP transcripts of each document, at one thinking rate."""

    rate: float
    documents: int
    lines: int
    timings: dict[str, Timing]


@dataclass(frozen=True)
class Workload:
    """Functions of the standard library, and a model of one of the `SIZES` that reads them."""

    config: ModelConfig
    tokenizer: Tokenizer
    latents: LatentFormat
    documents: list[Document]

    @property
    def lines(self) -> int:
        """Lines of all documents."""
        return sum(len(document.lines) for document in self.documents)

    def model(self, runtime: Runtime, seed: int = 1) -> torch.nn.Module:
        """Random weights."""
        return build_model(self.config, ParallelConfig(), runtime, self.tokenizer.vocab_size, self.latents.sets, seed)

    def jobs(self) -> list[Job]:
        """`GROUP` transcripts of each document."""
        return [Job(document, (number, g)) for number, document in enumerate(self.documents) for g in range(GROUP)]

    def sampler(
        self,
        model: torch.nn.Module,
        runtime: Runtime,
        method: Literal["jump_ahead", "naive"] = "jump_ahead",
        cache: bool = True,
        graphs: bool = False,
        direct: bool = True,
        batch: int = BATCH,
    ) -> LatentSampler:
        """Samples with a model on this process. cache: of what stands before a request; batch: transcripts at once."""
        engine = MegatronEngine(
            model,
            runtime,
            self.latents,
            self.tokenizer.vocab_size,
            share_first_pass=cache,
            cuda_graphs=graphs,
            direct=direct,
        )
        return LatentSampler(
            engine, self.latents, self.tokenizer, self.config.context_length, batch, method, naive_cache=cache
        )


def load(name: str, folder: Path, documents: int) -> Workload:
    """Functions of 5 to 30 lines, every 40th, about `documents` of them, and a tokenizer trained on all of them."""
    config = SIZES[name]
    texts = []
    for source in iter_texts(CorpusConfig(), None):
        lines = source.text.count("\n")
        if 5 <= lines <= 30:
            texts.append(source.text)
        if len(texts) >= 40 * documents:
            break
    tokenizer = train_sentencepiece(texts, VOCABULARY, folder / "tokenizer")
    latents = build_format(TEXT, tokenizer)
    encoded = [encode_document(text, str(i), tokenizer, latents, TEXT) for i, text in enumerate(texts[::40])]
    fitting = [cut(document, config.context_length - 64, latents) for document in encoded]
    return Workload(config, tokenizer, latents, [document for document in fitting if document is not None])


def measure(
    work: Workload,
    runtime: Runtime,
    repeats: int,
    rates: Sequence[float] = RATES,
    graphs: bool = False,
    batch: int = BATCH,
    model: torch.nn.Module | None = None,
) -> list[RolloutResult]:
    """Time the samplers on these documents. graphs: also with decoding by CUDA graphs, behind a warm-up; batch:
    transcripts at once; model: none: random weights."""
    sampler = partial(work.sampler, work.model(runtime) if model is None else model, runtime, batch=batch)
    samplers = {
        "jump-ahead": sampler("jump_ahead"),
        "naive + cache": sampler("naive"),
        "naive": sampler("naive", cache=False),
    }
    if graphs:
        samplers |= {
            "jump-ahead, graphs": sampler("jump_ahead", graphs=True),
            "naive, graphs": sampler("naive", cache=False, graphs=True),
        }
    jobs = work.jobs()
    results = []
    for rate in rates:
        with forced_rate(rate):
            timings = alternate(
                {k: (lambda s=s: s.sample(jobs)) for k, s in samplers.items()}, repeats, warm_up=int(graphs)
            )
        results.append(RolloutResult(rate, len(work.documents), work.lines, timings))
    return results


@contextmanager
def forced_rate(rate: float) -> Iterator[None]:
    """Within it, decisions think with this probability, whatever the weights are."""
    original = latent_sampler.uniforms

    def draw(key: Sequence[int], lines: int, max_latent_tokens: int) -> Uniforms:
        draws = original(key, lines, max_latent_tokens)
        draws[:, 0] = np.where(draws[:, 0] < rate, 0.0, 1.0)
        return draws

    with patch.object(latent_sampler, "uniforms", draw):
        yield
