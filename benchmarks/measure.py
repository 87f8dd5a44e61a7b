"""Alternating repeats and their spread."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of the repeats of one side."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """Median."""
        return statistics.median(self.seconds)

    def rate(self, work: float) -> str:
        """`work` per second: median and range, as text."""
        low, high = work / max(self.seconds), work / min(self.seconds)
        return f"{work / self.median:,.1f} ({low:,.1f} to {high:,.1f})"


def alternate(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    warm_up: int = 1,
    wait: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time every side `repeats` times, one after the other in turn, after `warm_up` rounds that do not count.

    wait: until the device has done what it was told; before and behind every repeat.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm_up + repeats):
        for name, action in sides.items():
            wait()
            begin = time.perf_counter()
            action()
            wait()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - begin)
    return {name: Timing(values) for name, values in seconds.items()}


def ratio(first: Timing, second: Timing) -> tuple[float, float, float]:
    """How many times faster `first` is than `second`: median, least and greatest of the paired repeats."""
    paired = [b / a for a, b in zip(first.seconds, second.seconds, strict=True)]
    return statistics.median(paired), min(paired), max(paired)
