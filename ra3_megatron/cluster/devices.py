"""The GPUs of a node: as many as its processes need, healthy, and nobody else's."""

import os
from collections import Counter

import torch

from ra3_megatron.cluster import smi
from ra3_megatron.cluster.results import Limits, Result
from ra3_megatron.cluster.smi import Gpu, SmiFailed

CHECK = "GPUs"
IDLE_MIB = 2048
"""Memory that an idle GPU may hold; more is of a process that has ended badly, or cannot be seen from here."""


def check(node: str, processes: int, limits: Limits) -> tuple[list[Result], int, str | None]:
    """Results for a node with `processes` of the job, the GPUs that they will use, and the driver.

    Must run before any process of the job uses a GPU: whatever computes there then is somebody else's.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if limits.gpus_per_node == 0:
        seen = f", though there are {count}" if count else ""
        return [Result(node, CHECK, "ok", f"GPUs not wanted{seen}: processes on CPU", "CPU")], 0, None
    try:
        shown, unasked = smi.gpus()
    except FileNotFoundError:
        shown, unasked = [], None
    except SmiFailed as error:
        return [Result(node, CHECK, "bad", f"nvidia-smi: {error}; the driver must answer", "?")], count, None
    shown = smi.visible(shown, os.environ.get("CUDA_VISIBLE_DEVICES"))
    driver = shown[0].driver if shown else None
    found = [Result(node, CHECK, "bad", problem) for gpu in shown for problem in problems(gpu)] if count else []
    found += counted(node, count, len(shown), processes, limits, _given())
    if count and unasked is None:
        found.append(Result(node, CHECK, "warn", "health unknown: there is no nvidia-smi"))
    if count and unasked:
        found.append(Result(node, CHECK, "warn", f"health known in part: this nvidia-smi has no {', '.join(unasked)}"))
    return found, count, driver


def counted(node: str, count: int, shown: int, processes: int, limits: Limits, given: int = 0) -> list[Result]:
    """Whether `count` GPUs, of `shown` that the driver has, are enough. given: those of the job on this node."""
    wanted = max(limits.gpus_per_node or 0, processes if count or limits.gpus_per_node else 0)
    if count < wanted:
        why = f"--gpus-per-node {limits.gpus_per_node}" if wanted == limits.gpus_per_node else f"{processes} processes"
        text = f"{count} GPUs that torch can use ({shown} in nvidia-smi); {why} need {wanted}"
        return [Result(node, CHECK, "bad", text, str(count))]
    if count == 0 and given:
        text = (
            f"the job has {given} GPUs, torch can use none ({shown} in nvidia-smi): ra3 doctor says what is missing; "
            "--gpus-per-node 0 for processes on CPU"
        )
        return [Result(node, CHECK, "bad", text, "0")]
    if count == 0 and shown:
        return [
            Result(node, CHECK, "warn", f"nvidia-smi shows {shown} GPUs, torch can use none: processes on CPU", "CPU")
        ]
    if count == 0:
        return [Result(node, CHECK, "ok", "no GPUs: processes on CPU", "CPU")]
    return [Result(node, CHECK, "ok", f"{count} GPUs for {processes} processes", str(count))]


def _given() -> int:
    """GPUs that Slurm gave the job on this node; 0: none, or there is no Slurm."""
    number = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return int(number) if number.isdecimal() else 0


def problems(gpu: Gpu) -> list[str]:
    """What is wrong with a GPU, one line each."""
    lines = []
    if gpu.broken:
        lines.append(f"answers {gpu.broken}: take the node out and reset it")
    if gpu.uncorrected:
        lines.append(f"{gpu.uncorrected} uncorrected ECC errors since the driver was loaded, should be 0")
    if gpu.retired_pending:
        lines.append("pages of memory wait to be retired: reset it")
    if gpu.remap_pending:
        lines.append("rows of memory wait to be remapped: reset it")
    if gpu.remap_failed:
        lines.append("rows of memory could not be remapped: it must be replaced")
    if gpu.slowed:
        lines.append(f"clocks are held down ({', '.join(gpu.slowed)}): cooling or power")
    if gpu.processes:
        lines.append(f"used by {', '.join(gpu.processes)}: should be free")
    elif gpu.memory_used is not None and gpu.memory_used > IDLE_MIB:
        lines.append(f"{gpu.memory_used} MiB in use before the job, should be under {IDLE_MIB}")
    return [f"GPU {gpu.index}: {line}" for line in lines]


def compare(counts: dict[str, int]) -> list[Result]:
    """Nodes that have other numbers of GPUs than most have (node -> number)."""
    usual = Counter(counts.values()).most_common(1)[0][0]
    return [
        Result(node, CHECK, "bad", f"{count} GPUs, other nodes have {usual}", str(count))
        for node, count in counts.items()
        if count != usual
    ]
