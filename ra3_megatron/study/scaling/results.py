"""What the cells measured, and what follows: medians over repeats, speed-up, efficiency, MFU."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.report.run_folder import RunFolder, read_json
from ra3_megatron.scaling.counts import token_flops
from ra3_megatron.study.plan import Cell
from ra3_megatron.study.scaling.points import Measured, Point
from ra3_megatron.study.state import stage

KIND = "scaling"
"""`kind` of a cell's `summary.json`."""
BUSY = 0.25
"""From so many cores on that others use, the machine counts as busy."""


@dataclass(frozen=True)
class CellFigures:
    """One cell that is done."""

    cell: Cell
    config: RunConfig
    raw: dict[str, Any]
    """Its `summary.json`."""

    @property
    def processes(self) -> int:
        """Of its layout."""
        return self.config.parallel.world_size

    @property
    def measured(self) -> list[dict[str, float]]:
        """The steps behind the warm-up."""
        return list(self.raw["steps"][self.raw["warmup"] :])

    @property
    def seconds(self) -> list[float]:
        """Of each measured step."""
        return [step["seconds"] for step in self.measured]

    @property
    def step_seconds(self) -> float:
        """Median."""
        return median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Median over the steps, of all processes."""
        return median(step["tokens"] / step["seconds"] for step in self.measured)

    @property
    def peak_gib(self) -> float:
        """Of the fullest process."""
        return float(max(each["peak_gib"] for each in self.raw["memory"]))

    @property
    def precision(self) -> str:
        """As the planner calls it: all recipes of FP8 are fp8."""
        return self.config.model.precision.partition("_")[0]

    @property
    def peak_tflops(self) -> float | None:
        """What all processes reached at once in products of the run's precision, added up; None where that was not
        measured (FP8)."""
        found = [each["tflops"].get(self.precision) for each in self.raw["probes"]]
        return None if None in found else float(sum(found))

    @property
    def oversubscribed(self) -> bool:
        """Whether its processes' threads were more than the cores of a machine. Not told of GPUs."""
        on_cpu = self.raw["probes"][0]["device"] == "cpu"
        return bool(on_cpu and self.raw["host_processes"] * (self.raw["threads"] or 1) > self.raw["cores"])

    @property
    def disturbed(self) -> bool:
        """Whether others used the machine right before it began."""
        return bool(self.raw["busy_cores"] >= BUSY)

    def mfu(self, peak_flops: float | None) -> float | None:
        """3 * forward FLOPs (`token_flops`) / (seconds * peak). peak: FLOP/s of all processes; None: as
        measured. None without either."""
        flops = token_flops(self.config.model, self.raw["vocab_size"], self.config.model.context_length)
        peak = peak_flops or (self.peak_tflops or 0.0) * 1e12
        if not peak:
            return None
        return 3 * sum(flops.values()) * self.tokens_per_second / peak

    def json(self) -> dict[str, Any]:
        """A line of `results.jsonl`."""
        low, high = np.percentile(self.seconds, (10, 90))
        head = {"cell": self.cell.name, "arm": self.cell.arm, "repeat": self.cell.seed, "processes": self.processes}
        values = {
            "step_seconds": self.step_seconds,
            "step_seconds_p10": float(low),
            "step_seconds_p90": float(high),
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_process": self.tokens_per_second / self.processes,
            "measured_peak_tflops": self.peak_tflops,
            "peak_gib": self.peak_gib,
            "busy_cores": self.raw["busy_cores"],
            "oversubscribed": self.oversubscribed,
        }
        return head | values | self.estep

    @property
    def estep(self) -> dict[str, float]:
        """Medians over the E-step updates; empty without any."""
        measured = self.raw.get("estep")
        if not measured:
            return {}
        updates = measured["updates"]
        found = {
            "estep_seconds": median(update["seconds"] for update in updates),
            "estep_documents_per_second": median(measured["documents"] / update["seconds"] for update in updates),
            "estep_think_rate": median(update["think_rate"] for update in updates),
        }
        refits = [update["refit_seconds"] for update in updates if "refit_seconds" in update]
        return found | ({"refit_seconds": median(refits)} if refits else {})

    @property
    def parts(self) -> dict[str, float]:
        """Medians of the parts that the trainer tells of its steps (`seconds_…`); empty where it tells none."""
        names = [name for name in self.measured[0] if name.startswith("seconds_")]
        return {name.removeprefix("seconds_"): median(s.get(name, 0.0) for s in self.measured) for name in names}


@dataclass(frozen=True)
class Spread:
    """A figure over repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Median, smallest and largest."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """A point with what its repeats measured."""

    point: Point
    cells: list[CellFigures]
    speedup: float
    """Tokens a second over those of the smallest number of processes of its series."""
    efficiency: float
    """Strong scaling T1 / (n Tn), weak scaling T1 / Tn; n relative to the smallest number of processes."""
    relative_to: int
    """That smallest number: the first of the series that is done."""

    @property
    def step_seconds(self) -> Spread:
        """Medians of the cells."""
        return Spread.of([cell.step_seconds for cell in self.cells])

    @property
    def tokens_per_second(self) -> Spread:
        """Of all processes."""
        return Spread.of([cell.tokens_per_second for cell in self.cells])

    @property
    def percentiles(self) -> tuple[float, float]:
        """10th and 90th percentile of the steps of all repeats, in seconds."""
        low, high = np.percentile([seconds for cell in self.cells for seconds in cell.seconds], (10, 90))
        return float(low), float(high)

    def mfu(self, peaks: Mapping[str, float | None]) -> list[float | None]:
        """Of each repeat. peaks: FLOP/s of all processes by arm, None: as measured in the cell; an arm that is not in
        it has no peak, and no MFU."""
        arm = self.point.arm
        return [cell.mfu(peaks[arm]) if arm in peaks else None for cell in self.cells]


def finished_cells(folder: Path, measured: Measured) -> list[CellFigures]:
    """The cells that are done. UserError when a summary is damaged or of something else."""
    found = []
    for cell in measured.cells:
        place = cell.folder(folder)
        if stage(place) == "done":
            file = RunFolder(place).summary
            raw = read_json(file)
            if not isinstance(raw, dict) or raw.get("kind") != KIND:
                raise UserError(f"{file}: is no cell of a scaling study: choose another folder")
            found.append(CellFigures(cell, measured.configs[cell.name], raw))
    return found


def rows_of(measured: Measured, done: Sequence[CellFigures]) -> list[Row]:
    """Every point with at least one repeat, series by series. Efficiency is of medians."""
    by_arm: dict[str, list[CellFigures]] = {}
    for cell in done:
        by_arm.setdefault(cell.cell.arm, []).append(cell)
    first: dict[tuple[str, str, str], tuple[int, float]] = {}
    rows = []
    for point in sorted(measured.points, key=lambda point: (*_order(point, measured), point.processes)):
        cells = by_arm.get(point.arm)
        if not cells:
            continue
        seconds = median(cell.step_seconds for cell in cells)
        processes, smallest = first.setdefault(point.series, (point.processes, seconds))
        ratio = point.processes / processes
        rows.append(Row(point, cells, *scaled(point.mode, ratio, smallest, seconds), relative_to=processes))
    return rows


def scaled(mode: str, ratio: float, smallest: float, seconds: float) -> tuple[float, float]:
    """Speed-up and efficiency of a step of `seconds` on `ratio` times the processes of one that took `smallest`.

    In weak scaling the step has `ratio` times the rows, so that its throughput is what is speeded up.
    """
    gained = smallest / seconds
    return (gained, gained / ratio) if mode == "strong" else (ratio * gained, gained)


def _order(point: Point, measured: Measured) -> tuple[int, ...]:
    """Series in the order in which the study names them."""
    series = list(dict.fromkeys(each.series for each in measured.points))
    modes = ("strong", "weak")
    return (modes.index(point.mode), series.index(point.series))
