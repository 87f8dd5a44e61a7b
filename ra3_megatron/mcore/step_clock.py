"""Where the seconds of a training step go: parts that exclude each other and add up to the whole step.

Each moment belongs to the innermost part that is open, so a part inside another pauses it; moments in none are `other`.
Outside of a step nothing is measured. One thread drives a clock.

On a GPU, moments are events on the current stream, and what is measured is the device's time line: work of the host
that hides behind kernels costs nothing, and a part in which the device waits (for the host, a message, an engine) lasts
as long as it waits. Events are read once, at the end of a step, when the last one has passed; there is no other
synchronisation and no barrier. On a CPU, moments are readings of a clock.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any, Literal

import torch

Part = Literal[
    "data",
    "sampling",
    "refit",
    "grading",
    "scoring",
    "forward",
    "backward",
    "pipeline",
    "grad_reduce",
    "optimizer",
    "evaluation",
    "other",
]
"""Parts of a step; docs/profiling.md says what each holds."""

_OF_SCHEDULE: dict[str, Part] = {"forward-compute": "forward", "backward-compute": "backward"}
"""Megatron's timers that run around the work of one micro-batch, and nothing else."""


class StepClock:
    """Measures one step after another on `device`."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._cuda = device is not None and device.type == "cuda"
        self._running = False
        self._scheduling = False
        self._open: list[tuple[Part, AbstractContextManager[Any] | None]] = []
        self._moments: list[tuple[Any, Part]] = []  # and the part that ends there
        self._spare: list[torch.cuda.Event] = []
        self.ranges: Callable[[str], AbstractContextManager[Any]] | None = None
        """Marks each part for a profiler, by its name."""
        self.seconds: dict[Part, float] = {}
        """Of the last step that ended: seconds in each part that it entered, and in `other`; they add up to it."""

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step; `seconds` is about it afterwards."""
        self._open, self._moments, self._running = [], [], True
        begin = time.perf_counter()
        try:
            self._mark()
            yield
            self._mark()
            self.seconds = self._resolve(begin)
        finally:
            self._spare += [moment for moment, _ in self._moments] if self._cuda else []
            self._running = False

    @contextmanager
    def part(self, part: Part) -> Iterator[None]:
        """Within it, seconds are this part's, but for the parts inside it."""
        depth = len(self._open)
        self.enter(part)
        try:
            yield
        finally:
            self._leave_to(depth)

    @contextmanager
    def schedule(self, pipelined: bool) -> Iterator[None]:
        """Megatron's schedule of one batch: what is neither forward nor backward is `pipeline` (or `other`)."""
        self._scheduling = True
        try:
            with self.part("pipeline" if pipelined else "other"):
                yield
        finally:
            self._scheduling = False

    def timers(self, name: str, log_level: int = 0) -> "ScheduleTimer":
        """What Megatron takes for `config.timers`: inside `schedule`, each micro-batch's forward and backward count."""
        return ScheduleTimer(self, _OF_SCHEDULE.get(name) if self._scheduling else None)

    def enter(self, part: Part) -> None:
        """Open a part, inside those that are open."""
        if self._running:
            self._mark()
            marker = None if self.ranges is None else self.ranges(part)
            if marker is not None:
                marker.__enter__()
            self._open.append((part, marker))

    def leave(self, part: Part) -> None:
        """Close the innermost part, if it is this one."""
        if self._open and self._open[-1][0] == part:
            self._leave_to(len(self._open) - 1)

    def _leave_to(self, depth: int) -> None:
        if self._running and len(self._open) > depth:
            self._mark()
            while len(self._open) > depth:
                _, marker = self._open.pop()
                if marker is not None:
                    marker.__exit__(None, None, None)

    def _mark(self) -> None:
        now: Any
        if self._cuda:
            now = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._moments.append((now, self._open[-1][0] if self._open else "other"))

    def _resolve(self, begin: float) -> dict[Part, float]:
        """Seconds of each part, from the moments of a step that began at `begin` on the host's clock."""
        found: dict[Part, float] = {}
        if self._cuda:
            self._moments[-1][0].synchronize()
        wall = time.perf_counter() - begin
        for (before, _), (after, part) in pairwise(self._moments):
            found[part] = found.get(part, 0.0) + (before.elapsed_time(after) / 1e3 if self._cuda else after - before)
        rest = max(0.0, wall - sum(found.values()))  # what the device did not see of the step: its first launch
        found["other"] = found.get("other", 0.0) + rest
        return found


class ScheduleTimer:
    """One of Megatron's timers: feeds a clock, or (with no part) nothing. It never waits for other processes."""

    def __init__(self, clock: StepClock, part: Part | None) -> None:
        self._clock, self._part = clock, part

    def start(self, barrier: bool = False) -> None:
        if self._part is not None:
            self._clock.enter(self._part)

    def stop(self, barrier: bool = False) -> None:
        if self._part is not None:
            self._clock.leave(self._part)
