"""Profiles of the steps that `profile` names: traces, marks for an outside profiler, histories of GPU memory.

A profile is about one step on one process, and changes no number. A step that is taken again behind a resume writes
its files again.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.autograd.profiler import record_function

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.profile import ProfileConfig
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.step_clock import StepClock

MEMORY_EVENTS = 1_000_000
"""Allocations and frees that one history of memory holds at most: the last ones."""


def check_profile(settings: ProfileConfig, runtime: Runtime) -> None:
    """UserError when the profiles that are asked for cannot be made here."""
    last = runtime.world_size - 1
    if any(rank > last for rank in settings.ranks):
        ranks = ", ".join(map(str, settings.ranks))
        raise UserError(f"profile.ranks=[{ranks}]: this layout has the processes 0 to {last}: leave out the others")
    if runtime.device.type == "cuda":
        return
    lacks = "needs CUDA, which this machine does not have"
    if settings.tool == "nsight":
        raise UserError(f"profile.tool=nsight: {lacks}: use profile.tool=torch")
    if settings.memory:
        raise UserError(f"profile.memory=true: {lacks}: leave it out (traces of profile.tool=torch have CPU memory)")


class Profiler:
    """Profiles the chosen steps of one phase."""

    def __init__(self, settings: ProfileConfig, folder: Path, phase: str, key: str, runtime: Runtime) -> None:
        """folder: for the files; phase: its name; key: that in file names."""
        chosen = runtime.rank in settings.ranks and (not settings.phases or phase in settings.phases)
        self._steps = frozenset(settings.steps if chosen else [])
        self._settings, self._folder, self._key, self._runtime = settings, folder, key, runtime

    @contextmanager
    def step(self, step: int, clock: StepClock) -> Iterator[None]:
        """Step number `step` (from 1), whose parts `clock` knows."""
        if step not in self._steps:
            yield
            return
        name = f"{self._key}-{step:06d}-rank{self._runtime.rank}"
        self._folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            if self._settings.memory:
                stack.enter_context(_memory(self._folder / f"memory-{name}.pickle"))
            if self._settings.tool == "nsight":
                stack.enter_context(torch.cuda.profiler.profile())
                clock.ranges = torch.cuda.nvtx.range
            else:
                stack.enter_context(_trace(self._folder / f"{name}.json.gz", self._runtime.device))
                clock.ranges = record_function
            try:
                yield
            finally:
                clock.ranges = None


@contextmanager
def _trace(path: Path, device: torch.device) -> Iterator[None]:
    """A Chrome trace of what happens within it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True) as profile:
        yield
    profile.export_chrome_trace(str(path))


@contextmanager
def _memory(path: Path) -> Iterator[None]:
    """What was allocated and freed on the GPU within it, and where in the code."""
    torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS, stacks="python")
    try:
        yield
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
