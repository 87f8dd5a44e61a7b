"""Where the time of a train step and of sampling goes: matrix products, attention, copies, other operations, Python
between them.

Of the M-step benchmark's two sides, and of jump-ahead sampling by Megatron-Core's modules and without them; on one
thread, so that no time is spent waiting for another.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Timing, alternate
from benchmarks.mstep import SIZES, VOCABULARY, build, hugging_face, megatron
from benchmarks.rollout import Workload, forced_rate
from ra3_megatron.mcore.startup import Runtime

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_mm", "mkldnn::", "aten::linear")
ATTENTION = ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention")
COPIES = ("aten::copy_", "aten::cat", "aten::clone", "aten::index_select", "aten::gather", "aten::contiguous")
INDEXING = ("aten::index", "aten::nonzero", "aten::embedding", "aten::scatter", "aten::masked", "aten::where")
OPTIMIZER = ("Optimizer.step", "Optimizer.zero_grad")
LARGEST = 6
"""Operations that are named."""
MODULES, DIRECT = "by the modules", "without them"
"""Sides of sampling."""
KINDS = ("matrix products", "attention", "copies and casts", "indexing", "optimizer", "other operations", "Python")


@dataclass(frozen=True)
class Shares:
    """Parts of the seconds of one step; they sum to 1."""

    seconds: float
    of: dict[str, float]
    """Kind (see `KINDS`) -> share."""
    largest: list[tuple[str, float]]
    """Operations that are no matrix product, and their share, the largest first."""


def shares(step: Callable[[], object], repeats: int = 2) -> Shares:
    """Profile `step` on this process's CPU threads. The profiler's own time is scaled away by a step without it."""
    step()
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    seconds = (time.perf_counter() - begin) / repeats
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            step()
    spent: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for event in profiler.events():
        own = event.self_cpu_time_total / 1e6 / repeats
        kind = KINDS[4] if _within_optimizer(event) else kind_of(event.key)
        spent[kind] += own
        if kind != KINDS[0]:
            names[event.key] += own
    counted = sum(spent.values())
    scale = min(1.0, seconds / counted) if counted else 1.0  # what the profiler adds to each operation
    of = {kind: scale * spent[kind] / seconds for kind in KINDS[:-1]}
    of[KINDS[-1]] = max(0.0, 1.0 - sum(of.values()))
    return Shares(seconds, of, [(name, scale * own / seconds) for name, own in names.most_common(LARGEST)])


def _within_optimizer(event: Any) -> bool:
    while event is not None:
        if event.key.startswith(OPTIMIZER):
            return True
        event = event.cpu_parent
    return False


def kind_of(operation: str) -> str:
    """The kind of an operation of the profiler."""
    for kind, starts in zip(KINDS, (PRODUCTS, ATTENTION, COPIES, INDEXING, OPTIMIZER), strict=False):
        if operation.startswith(starts):
            return kind
    return KINDS[5]


def measure(name: str, runtime: Runtime, repeats: int) -> dict[str, Shares]:
    """Side -> its shares, of one optimizer step on the rows of the M-step benchmark."""
    with one_thread():
        return {label: shares(step, repeats) for label, step in sides(name, runtime)}


def sampling(
    work: Workload, runtime: Runtime, repeats: int, rate: float = 0.3
) -> tuple[dict[str, Shares], dict[str, Timing]]:
    """Side -> its shares, and its seconds in alternating repeats, of the transcripts of the rollout benchmark at a
    thinking rate."""
    model = work.model(runtime)
    samplers = {MODULES: work.sampler(model, runtime, direct=False), DIRECT: work.sampler(model, runtime)}
    steps = {label: partial(sampler.sample, work.jobs()) for label, sampler in samplers.items()}
    with one_thread(), forced_rate(rate):
        timings = alternate(steps, repeats)
        return {label: shares(step, repeats) for label, step in steps.items()}, timings


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it, torch computes on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def sides(name: str, runtime: Runtime) -> Iterator[tuple[str, Callable[[], object]]]:
    """One after the other: each is gone before the next is built."""
    config = SIZES[name]
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 4, config.context_length))
    yield "mcore fp32", megatron(build(config, runtime), ids)
    yield "HF fp32", hugging_face(config, ids)
