"""Time of an E-step update, of a refit, and of a whole run. First principles alone: nothing here was compared with a
measurement yet.

An update samples G transcripts of each document, scores them with the frozen model, and trains on them. Jump-ahead
sampling takes a round for each thought: a pass over the expert's tokens up to where the next one might start (as far as
thoughts are apart on average, so that about 1 - 1/e of the rounds find one), then a token of the thought at a time.
Sampling is by vLLM on the trainer's GPUs.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from ra3_megatron.scaling.counts import Layer, token_flops, total_parameters
from ra3_megatron.scaling.memory import GIB, Work
from ra3_megatron.scaling.rates import RATES, Rates
from ra3_megatron.scaling.search import Planned
from ra3_megatron.scaling.step import forward_seconds, step_time
from ra3_megatron.scaling.tables import Architecture, Gpu

ROUNDS = 1 / (1 - math.exp(-1))
"""Rounds of a thought: those that find none are in between."""
DECODE_LAYER_SECONDS = 2e-5
"""A layer's kernels for one token, in a CUDA graph; twice that where its parts wait for each other."""
ENGINE_MEMORY = 0.35
"""Share of a GPU that the weights of an engine may take: as few GPUs an engine as that allows."""
REFIT_SECONDS = 3.0
"""Fixed share of a refit: gathering, checks, the engines' reload."""
REFIT_GB_S = 15.0
"""The rest of a refit. Both are read off two published figures: 15 GB in 5.5 to 6 s (verl), 61 GB in 7 s (slime)."""


@dataclass(frozen=True)
class Thinking:
    """What documents and thoughts are like. The defaults are the paper's: 3.5M snippets of 1B tokens, thoughts of
    at most 6 tokens."""

    think_rate: float
    """Share of lines with a thought."""
    thought_tokens: float = 6.0
    """Tokens of a thought."""
    lines: float = 26.0
    """Lines of a document."""
    line_tokens: float = 11.0
    """Tokens of a line."""
    group: int = 8
    """G, transcripts of a document."""
    documents: int = 128
    """Documents of an update."""
    sequences: int = 256
    """Sequences that an engine computes at once (`rollout.vllm.max_sequences`)."""

    @property
    def document_tokens(self) -> float:
        """Of the expert."""
        return self.lines * self.line_tokens

    @property
    def transcript_tokens(self) -> float:
        """Of the expert and of thoughts."""
        return self.document_tokens + self.lines * self.think_rate * self.thought_tokens


@dataclass(frozen=True)
class EStepTime:
    """Seconds of one E-step update."""

    sampling: float
    scoring: float
    training: float
    refit: float

    @property
    def total(self) -> float:
        """Of the update."""
        return self.sampling + self.scoring + self.training + self.refit


@dataclass(frozen=True)
class RunCost:
    """GPU hours of a run."""

    esteps: float
    infusion: float
    msteps: float

    @property
    def total(self) -> float:
        """Of the run."""
        return self.esteps + self.infusion + self.msteps

    def as_dict(self) -> dict[str, float]:
        """Parts and total."""
        return {**asdict(self), "total": self.total}


def estep_time(made: Architecture, planned: Planned, thinking: Thinking, gpu: Gpu, rates: Rates = RATES) -> EStepTime:
    """One update at the layout of `planned`."""
    parallel = planned.parallel
    tokens = thinking.documents * thinking.group * thinking.transcript_tokens
    rows = max(1.0, tokens / planned.work.sequence)
    each = planned.work.micro_batch * parallel.data
    batches = math.ceil(rows / each)  # every replica computes whole micro-batches
    work = Work(
        planned.work.sequence,
        batches * each,
        planned.work.micro_batch,
        planned.work.precision,
        planned.work.gradient_bytes,
    )
    scored = batches * work.micro_batch * work.sequence
    return EStepTime(
        sampling=sampling_seconds(made, thinking, parallel.world_size, thinking.documents * thinking.group, gpu, rates),
        scoring=forward_seconds(made.model, made.vocab_size, parallel, work, gpu, scored, rates),
        training=step_time(made.model, made.vocab_size, parallel, work, gpu, rates).total,
        refit=refit_seconds(made),
    )


def engine_gpus(made: Architecture, gpu: Gpu) -> int:
    """Tensor-parallel size of an engine."""
    needed = 2 * total_parameters(made.model, made.vocab_size) / (ENGINE_MEMORY * gpu.memory_gib * GIB)
    return int(2 ** max(0, math.ceil(math.log2(needed))))


def sampling_seconds(
    made: Architecture, thinking: Thinking, gpus: int, transcripts: float, gpu: Gpu, rates: Rates = RATES
) -> float:
    """Sampling `transcripts` transcripts on all GPUs."""
    rates = gpu.own(rates)
    size = engine_gpus(made, gpu)
    engines = max(1, gpus // size)
    share = transcripts / engines
    together = min(share, thinking.sequences)
    thoughts = thinking.lines * thinking.think_rate
    flops = sum(token_flops(made.model, made.vocab_size, int(thinking.transcript_tokens)).values())
    products = size * gpu.bf16_tflops * 1e12 * rates.bf16_matmul
    forced = together * flops * thinking.document_tokens / products
    one = max(_decode_seconds(made, thinking, size, together, gpu, rates), together * flops / products)
    # the transcripts of a document share their first pass; the rounds of those that have a thought (thoughts being as
    # likely before any line) read the document again, and some of it twice
    again = ROUNDS * -math.expm1(-thoughts)
    each = forced * (1 / thinking.group + again) + thoughts * thinking.thought_tokens * one
    return math.ceil(share / together) * each


def _decode_seconds(
    made: Architecture, thinking: Thinking, size: int, together: float, gpu: Gpu, rates: Rates
) -> float:
    """One token of each of `together` sequences: weights and caches are read once."""
    layer, layers = Layer.of(made.model), made.model.num_layers
    cache = 2 * 2 * layers * layer.key_value * thinking.transcript_tokens / 2
    read = 2 * total_parameters(made.model, made.vocab_size) + together * cache
    waiting = layers * DECODE_LAYER_SECONDS * (2 if size > 1 else 1)
    return read / size / (gpu.memory_gb_s * 1e9 * rates.memory) + waiting


def refit_seconds(made: Architecture) -> float:
    """Weights of the trainer into the engines."""
    return REFIT_SECONDS + 2 * total_parameters(made.model, made.vocab_size) / (REFIT_GB_S * 1e9)


def run_cost(
    made: Architecture, planned: Planned, thinking: Thinking, gpu: Gpu, tokens: float, iterations: int, updates: int
) -> RunCost:
    """GPU hours of `iterations` EM iterations of `updates` E-step updates each. Their M-steps train on `tokens` tokens
    of code in all, once, with the thoughts in them."""
    gpus = planned.parallel.world_size
    documents = tokens / thinking.document_tokens
    trained = documents * thinking.transcript_tokens
    per_token = planned.step.total / (planned.work.global_batch * planned.work.sequence)
    infused = sampling_seconds(made, replace(thinking, group=1), gpus, documents, gpu)  # one transcript of each
    return RunCost(
        esteps=iterations * updates * estep_time(made, planned, thinking, gpu).total * gpus / 3600,
        infusion=infused * gpus / 3600,
        msteps=trained * per_token * gpus / 3600,
    )


def as_dict(
    made: Architecture, planned: Planned, thinking: Thinking, gpu: Gpu, tokens: float, iterations: int, updates: int
) -> dict[str, Any]:
    """What `ra3 plan --json` says of E-step and run: seconds and GPU hours."""
    update = estep_time(made, planned, thinking, gpu)
    return {
        "estep": {
            "seconds": update.total,
            "parts": asdict(update),
            "documents_per_second": thinking.documents / update.total,
            "engine_gpus": engine_gpus(made, gpu),
        },
        "run_gpu_hours": run_cost(made, planned, thinking, gpu, tokens, iterations, updates).as_dict(),
    }
