"""Offload to pinned host memory: the same numbers as without, what it saves, and what it costs.

Every arm takes the same train steps with torch's deterministic algorithms from the same weights; losses, gradient norms
and weights are compared bit for bit with those of a run that offloads nothing, and so is such a run with itself.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.config.training import OptimizerConfig
from ra3_megatron.mcore.batch import TokenBatch
from ra3_megatron.mcore.model import chunks_of
from ra3_megatron.mcore.offload import on_device, park
from ra3_megatron.mcore.trainer import Trainer, forward
from ra3_megatron.scaling.tables import Architecture, architecture_named
from tests.gpu.checkpoints import unequal
from tests.gpu.evidence import Evidence
from tests.gpu.setting import NEEDS_GPU, Setting, full_rows, mean, release
from tests.gpu.throughput import GIB, fresh

LAYERS = 8
"""Of Llama-3.2-1B."""
SEQUENCE = 4096
STEPS = 4
TINY = ModelConfig(
    num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, context_length=32
)
ARMS = {
    "nothing": {},
    "nothing, again": {},
    "parallel.offload_optimizer=true": {"offload_optimizer": True},
    "parallel.offload_activations=4": {"offload_activations": 4},
}
"""Keys of each arm, by what it offloads."""


@dataclass(frozen=True)
class Found:
    """What an arm leaves."""

    numbers: dict[str, Tensor]
    seconds: float
    """Of a step, mean behind the first."""
    gib: float
    """Peak memory allocated in the steps behind the first."""


def run(evidence: Evidence, setting: Setting) -> None:
    """The optimizer and activations in train steps, then the frozen scorer."""
    made = architecture_of(setting)
    plain: Found | None = None
    for name, keys in ARMS.items():
        if keys and not setting.cuda:
            evidence.missing(name, NEEDS_GPU)
            continue
        with evidence.attempt(name):
            found = steps(setting, made, keys)
            text = f"{name}: not the same bit for bit as without offload"
            if plain is not None:
                differing = unequal(found.numbers, plain.numbers)
                evidence.check(text, differing, 0, unit=f"of {len(found.numbers)}")
            elif keys:
                evidence.missing(text, "no arm without offload came to its end")
            else:
                plain = found
            evidence.figure(f"{name}: a step", found.seconds, "s")
            evidence.figure(f"{name}: peak memory allocated", found.gib, "GiB")
        release()
    with evidence.attempt("parallel.offload_scorer"):
        scorer(evidence, setting, made)
    release()


def architecture_of(setting: Setting) -> Architecture:
    """Of the model."""
    whole = architecture_named("llama3.2-1b", SEQUENCE)
    full = replace(whole, model=whole.model.model_copy(update={"num_layers": LAYERS}))
    return setting.pick(full, Architecture("tiny", TINY, 256))


def rows_of(made: Architecture, seed: int) -> TokenBatch:
    """One row."""
    return full_rows(1, made.model.context_length, made.vocab_size, seed)


def steps(setting: Setting, made: Architecture, keys: dict[str, Any]) -> Found:
    """Train steps with these keys of `parallel`."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    setting = replace(setting, parallel=ParallelConfig(**{**setting.parallel.model_dump(), **keys}))
    torch.use_deterministic_algorithms(True)  # with warn_only, attention is not deterministic
    try:
        model = fresh(setting, made, "bf16" if setting.cuda else "fp32")
        trainer = Trainer(model, OptimizerConfig(learning_rate=1e-4), setting.parallel, setting.runtime, 100)
        results, seconds = [], []
        for step in range(STEPS):
            if step == 1 and setting.cuda:
                torch.cuda.reset_peak_memory_stats(setting.device)
            begin = time.perf_counter()
            result = trainer.step([rows_of(made, step)])
            setting.wait()
            seconds.append(time.perf_counter() - begin)
            results.append([result.loss, result.grad_norm])
        peak = torch.cuda.max_memory_allocated(setting.device) / GIB if setting.cuda else 0.0
        (chunk,) = chunks_of(trainer.model)
        weights = {name: value.detach().cpu() for name, value in chunk.named_parameters()}
    finally:
        torch.use_deterministic_algorithms(False)
    return Found({**weights, "results": torch.tensor(results)}, mean(seconds[1:]), peak)


def scorer(evidence: Evidence, setting: Setting, made: Architecture) -> None:
    """Scores of a frozen model before and behind its stay in host memory, and the memory that this frees."""
    model = fresh(setting, made, "bf16" if setting.cuda else "fp32").requires_grad_(False)
    batch = rows_of(made, 3)
    before = forward(model, [batch], setting.runtime)[0]
    held = torch.cuda.memory_allocated(setting.device) if setting.cuda else 0
    park(model, setting.device)
    if setting.cuda:
        freed = (held - torch.cuda.memory_allocated(setting.device)) / GIB
        size = sum(weight.numel() * 2 for weight in fresh(setting, made, "bf16").parameters()) / GIB
        evidence.check(
            "parallel.offload_scorer: memory that a parked scorer frees, of its weights", freed / size, 1.01, 0.99
        )
    begin = time.perf_counter()
    with on_device(model):
        setting.wait()
        seconds = time.perf_counter() - begin
        behind = forward(model, [batch], setting.runtime)[0]
    evidence.check(
        "parallel.offload_scorer: scores that are not the same bit for bit", int((before != behind).sum()), 0
    )
    evidence.figure("parallel.offload_scorer: weights back on the device", seconds, "s")
