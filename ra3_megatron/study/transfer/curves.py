"""The held-out curve of one RLVR run, and what is read off it: speed, area, asymptote."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.report.metrics import read_metrics
from ra3_megatron.study.plan import Cell
from ra3_megatron.study.state import stage

LEVELS = (0.5, 0.9)
"""Success rates whose first crossing is timed."""
LAST = 0.25
"""Share of the updates over which the asymptote is the mean."""


@dataclass(frozen=True)
class Curve:
    """pass@1 on the held-out problems behind so many updates, sampled tokens and seconds of training, [evaluations]."""

    steps: list[int]
    tokens: list[float]
    seconds: list[float]
    """Of the updates, without the evaluations."""
    rate: list[float]
    signal: list[float]
    """Share of the groups of each training update whose rewards differed, [updates]."""

    def reached(self, level: float, axis: str) -> float | None:
        """Where the rate first reaches `level` (linear between evaluations), in `steps`, `tokens` or `seconds`."""
        places: Sequence[float] = getattr(self, axis)
        for number, rate in enumerate(self.rate):
            if rate >= level:
                if number == 0:
                    return float(places[0])
                low, high = self.rate[number - 1], rate
                share = (level - low) / (high - low)
                return float(places[number - 1] + share * (places[number] - places[number - 1]))
        return None

    @property
    def area(self) -> float:
        """Mean rate over the updates (trapezoids): 1 is right from the start."""
        width = self.steps[-1] - self.steps[0]
        if not width:
            return self.rate[0]
        pairs = zip(
            zip(self.steps, self.rate, strict=True), zip(self.steps[1:], self.rate[1:], strict=False), strict=False
        )
        return sum((b - a) * (p + q) / 2 for (a, p), (b, q) in pairs) / width

    @property
    def asymptote(self) -> float:
        """Mean rate of the evaluations in the last quarter of the updates."""
        begin = self.steps[-1] - LAST * (self.steps[-1] - self.steps[0])
        last = [rate for step, rate in zip(self.steps, self.rate, strict=True) if step >= begin]
        return sum(last) / len(last)


def curve_of(records: Sequence[Mapping[str, Any]]) -> Curve:
    """The curve in the metrics of a run. ValueError when it has no evaluation."""
    tokens = seconds = 0.0
    by_step: dict[int, tuple[float, float]] = {0: (0.0, 0.0)}
    signal = []
    for record in records:
        if record["phase"] == "rlvr" and "sampled_tokens" in record:
            tokens += record["sampled_tokens"]
            seconds += record["seconds"] - record.get("seconds_evaluation", 0.0)
            by_step[record["step"]] = (tokens, seconds)
            signal.append(1 - record["all_right"] - record["all_wrong"])
    held = [record for record in records if record["phase"] == "held_out"]
    if not held:
        raise ValueError("no evaluation on held-out problems")
    steps = [record["step"] for record in held]
    at = [by_step[max(known for known in by_step if known <= step)] for step in steps]
    return Curve(steps, [a for a, _ in at], [b for _, b in at], [record["pass_at_1"] for record in held], signal)


@dataclass(frozen=True)
class Run:
    """A cell that is done."""

    cell: Cell
    curve: Curve


def finished_runs(folder: Path, cells: Sequence[Cell]) -> list[Run]:
    """The cells that are done, in their order. UserError for one that has no evaluation."""
    return [Run(cell, _curve_in(cell.folder(folder))) for cell in cells if stage(cell.folder(folder)) == "done"]


def _curve_in(folder: Path) -> Curve:
    try:
        return curve_of(read_metrics(folder))
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error


def by_start(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by the start that they went from; those of one start differ in their seed."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.cell.group, []).append(run)
    return found
