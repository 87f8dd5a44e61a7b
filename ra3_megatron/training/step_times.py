"""What a phase logs of its steps' time and memory, and the line it ends with.

All of it is the main process's: under pipeline parallelism that is the first stage. `seconds` and the seconds of the
parts add up; saving checkpoints comes between steps, and is logged with the step that follows.
"""

import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ra3_megatron.mcore.step_clock import StepClock
from ra3_megatron.report.numbers import step_time, whole_percent

_GIB = 2.0**30


class StepTimes:
    """Times of the steps that one process takes in one phase."""

    def __init__(self, clock: StepClock, device: torch.device) -> None:
        self._clock, self._cuda, self._device = clock, device.type == "cuda", device
        self._steps = 0
        self._total: Counter[str] = Counter()
        self._unlogged = self._saving = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        with self._clock.step():
            yield
        self._steps += 1
        self._total.update(self._clock.seconds)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Work on checkpoints between steps."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._unlogged += time.perf_counter() - begin
            self._saving += time.perf_counter() - begin

    @property
    def seconds(self) -> float:
        """Of the last step."""
        return sum(self._clock.seconds.values())

    def values(self) -> dict[str, float]:
        """Metrics of the last step, and of the saving since the last call."""
        saving, self._unlogged = self._unlogged, 0.0
        parts = {f"seconds_{part}": seconds for part, seconds in self._clock.seconds.items()}
        return {**parts, "seconds_checkpoint": saving, **self._memory()}

    def _memory(self) -> dict[str, float]:
        if self._cuda:
            return {"peak_memory_gib": torch.cuda.max_memory_allocated(self._device) / _GIB}
        return {"peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB}

    def line(self) -> str | None:
        """Where the seconds of all steps went, largest part first; None without a step."""
        if not self._steps:
            return None
        total = sum(self._total.values())
        parts = sorted(self._total, key=lambda part: (part == "other", -self._total[part]))
        shares = ", ".join(f"{part} {whole_percent(self._total[part] / total)}" for part in parts)
        saving = f"; checkpoints beside it: {step_time(self._saving)}" if self._saving else ""
        return f"{step_time(total / self._steps)} a step: {shares}{saving}"
