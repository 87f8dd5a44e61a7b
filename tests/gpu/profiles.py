"""Where the time of a step goes, from torch's profiler: kernels by the kind of their work, and what is left idle."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

GROUPS = {
    "attention": r"flash|fmha|sdpa|attention|attn",
    "optimizer": r"multi_?tensor|adam|l2norm|_foreach|lpnorm",
    "casts and scales of FP8": r"cast_transpose|quantize_|amax_kernel|block_?(wise_)?scal|scale_from|delayed_scal",
    "matrix products": r"gemm|nvjet|cutlass|xmma|wgmma|splitk|matmul|\bmm\b|addmm|bmm|aten::linear|cublas",
    "messages": r"nccl",
    "copies": r"\bmemcpy|\bmemset|aten::copy_|aten::_to_copy",
}
"""Kind of work -> what the names of its kernels (on a CPU: operators) have in them. The first that fits is taken."""
REST = "elementwise and rest"
IDLE = "idle"


def group_of(name: str) -> str:
    """The kind of work of a kernel or operator."""
    return next((group for group, words in GROUPS.items() if re.search(words, name, re.IGNORECASE)), REST)


def shares(step: Callable[[], Any], seconds: float, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
    """Share of a step's time in each kind of work, and of the ten longest kernels.

    seconds: a step's time without the profiler, which slows the host down. On a GPU `idle` is what no kernel covers; on
    a CPU what no operator does.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    if device.type == "cuda":
        kernels = [
            (event.name, event.time_range.start, event.time_range.end)
            for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        ]
    else:
        kernels = [(each.key, 0.0, each.self_cpu_time_total) for each in profile.key_averages()]
    busy = covered((begin, end) for _, begin, end in kernels) if device.type == "cuda" else None
    return by_group(kernels, seconds * 1e6, busy)


def by_group(
    kernels: Iterable[tuple[str, float, float]], total: float, busy: float | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of `total` by kind of work, with `idle`, and the ten longest names.

    kernels: name, begin, end. busy: time that kernels cover, as several may run at once; None: their sum.
    """
    groups: dict[str, float] = defaultdict(float)
    names: dict[str, float] = defaultdict(float)
    for name, begin, end in kernels:
        groups[group_of(name)] += end - begin
        names[name] += end - begin
    spent = sum(groups.values()) if busy is None else busy
    found = {group: value / total for group, value in sorted(groups.items(), key=lambda item: -item[1])}
    longest = sorted(names.items(), key=lambda item: -item[1])[:10]
    return {**found, IDLE: max(0.0, 1.0 - spent / total)}, {name: value / total for name, value in longest}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
