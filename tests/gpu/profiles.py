"""Where the time of a step goes, from torch's profiler: kernels by the kind of their work, and what is left idle."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks.shares import shares as of_operations

GROUPS = {
    "attention": r"flash|fmha|sdpa|attention|attn",
    "optimizer": r"multi_?tensor|adam|l2norm|lpnorm",
    "casts and scales of FP8": r"cast_transpose|quantize_|amax_kernel|block_?(wise_)?scal|scale_from|delayed_scal",
    "matrix products": r"gemm|nvjet|cutlass|xmma|wgmma|splitk|matmul|cublas",
    "messages": r"nccl",
    "copies": r"\bmemcpy|\bmemset",
}
"""Kind of work -> what the names of its kernels have in them. The first that fits is taken."""
REST = "elementwise and rest"
IDLE = "idle"


def group_of(name: str) -> str:
    """The kind of work of a kernel."""
    return next((group for group, words in GROUPS.items() if re.search(words, name, re.IGNORECASE)), REST)


def shares(step: Callable[[], Any], seconds: float, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
    """Share of a step's time in each kind of work, and of the longest kernels (on a CPU: operations).

    seconds: a step's time without the profiler, which slows the host down. `idle` is what no kernel covers.
    """
    if device.type != "cuda":
        found = of_operations(step, repeats=1)
        return found.of, dict(found.largest)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize(device)
    kernels = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return by_group(kernels, seconds * 1e6, covered((begin, end) for _, begin, end in kernels))


def by_group(
    kernels: Iterable[tuple[str, float, float]], total: float, busy: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of `total` by kind of work, with `idle`, and the twenty longest names.

    kernels: name, begin, end. busy: time that kernels cover, which is less than their sum where several run at once.
    """
    groups: dict[str, float] = defaultdict(float)
    names: dict[str, float] = defaultdict(float)
    for name, begin, end in kernels:
        groups[group_of(name)] += end - begin
        names[name] += end - begin
    found = {group: value / total for group, value in sorted(groups.items(), key=lambda item: -item[1])}
    longest = sorted(names.items(), key=lambda item: -item[1])[:20]
    return {**found, IDLE: max(0.0, 1.0 - busy / total)}, {name: value / total for name, value in longest}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
