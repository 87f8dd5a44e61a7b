"""What a layout costs: one optimizer step at every two-process layout, against one process with as many threads.

On the cores of one machine a layout brings no further hardware, so what is lost against one process is what the
layout costs: messages between processes, bubbles, and narrower matrices. Every side makes the same step on the same
rows.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import ra3_megatron.mcore  # noqa: F401
from benchmarks.measure import Timing, alternate
from benchmarks.mstep import SIZES, VOCABULARY, packed_batches
from benchmarks.processes import launch
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.config.training import OptimizerConfig
from ra3_megatron.mcore import startup
from ra3_megatron.mcore.model import build_model
from ra3_megatron.mcore.trainer import Trainer

ONE = "1 process, 2 threads"
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP 2": {"data": 2},
    "DP 2, distributed optimizer": {"data": 2, "distributed_optimizer": True},
    "TP 2": {"tensor": 2},
    "TP 2, sequence": {"tensor": 2, "sequence": True},
    "PP 2": {"pipeline": 2},
    "PP 2, VPP 2": {"pipeline": 2, "virtual_pipeline": 2},
    "CP 2": {"context": 2},
    "TP 2, sequence, full recompute": {"tensor": 2, "sequence": True, "recompute": "full"},
}
MICRO_BATCHES, ROWS = 8, 1


@dataclass(frozen=True)
class LayoutResult:
    """Seconds of one step at each layout."""

    tokens: int
    micro_batches: int
    timings: dict[str, Timing]


def measure(name: str, repeats: int) -> LayoutResult:
    """Time `repeats` steps of the model `name` at each layout, in processes of their own."""
    tokens = MICRO_BATCHES * ROWS * SIZES[name].context_length
    timings = {ONE: _launch(1, name, [(ONE, {"threads": 2})], repeats)[ONE]}
    timings |= _launch(2, name, [(label, keys | {"threads": 1}) for label, keys in LAYOUTS.items()], repeats)
    return LayoutResult(tokens, MICRO_BATCHES, timings)


def _launch(processes: int, name: str, layouts: list[tuple[str, dict[str, Any]]], repeats: int) -> dict[str, Timing]:
    timings: dict[str, Timing] = launch(processes, _in_process, name, layouts, repeats)
    return timings


def _in_process(name: str, layouts: list[tuple[str, dict[str, Any]]], repeats: int) -> dict[str, Timing]:
    timings = {}
    for label, keys in layouts:
        parallel = ParallelConfig(**keys)
        timings[label] = _time(label, SIZES[name], parallel, repeats)
    startup.shutdown()
    return timings


def _time(label: str, config: ModelConfig, parallel: ParallelConfig, repeats: int) -> Timing:
    runtime = startup.initialize(parallel, seed=1)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (MICRO_BATCHES, ROWS, config.context_length))
    network = build_model(config, parallel, runtime, VOCABULARY, np.ones((1, VOCABULARY), dtype=bool), seed=1)
    trainer = Trainer(network, OptimizerConfig(), parallel, runtime, steps=1000)
    batches = packed_batches(torch.from_numpy(ids))[runtime.data_rank :: runtime.data_size]
    runtime.barrier()
    return alternate({label: lambda: trainer.step(batches)}, repeats)[label]
