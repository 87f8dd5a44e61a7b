"""Curves and a table of the evaluations that a run made on suites of tasks while it trained (`benchmarks.suites`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from ra3_megatron.report.numbers import ABSENT, percent
from ra3_megatron.report.pages import write_picture
from ra3_megatron.report.plots import PHASE_TITLES, Curve, curve_panels, series

PHASE = "benchmarks"
"""Of the lines of metrics: `of` names the phase that was evaluated in, `SUITE/MODE/METRIC` are shares of 1."""
CAPTION = "Suites of tasks, evaluated while the model trained. x: updates of the phase."
_BESIDE = ("tokens", "thought_share", "reference")


class BenchmarkTable(NamedTuple):
    """Names of the columns, and a row for each evaluation."""

    header: list[str]
    rows: list[list[str]]


def benchmark_section(records: Sequence[dict[str, Any]], figures: Path) -> dict[str, Any] | None:
    """What the page says of them; its picture is written to `figures`. None, and no picture, without an evaluation."""
    file = figures / f"{PHASE}.png"
    figure = benchmark_figure(records)
    if figure is None:
        file.unlink(missing_ok=True)
        return None
    return {"uri": write_picture(file, figure), "caption": CAPTION, "table": benchmark_table(records)}


def benchmark_figure(records: Sequence[dict[str, Any]]) -> Figure | None:
    """One panel for each suite and metric; a curve for each phase and mode. None without an evaluation."""
    found = _evaluations(records)
    phases = dict.fromkeys(record["of"] for record in found)
    panels: dict[str, list[Curve]] = {}
    for name in _scores(found):
        suite, mode, metric = name.split("/")
        for phase in phases:
            curve = series([record for record in found if record["of"] == phase], PHASE, name)
            label = f"{PHASE_TITLES.get(phase, phase)}, {mode}"
            panels.setdefault(f"{suite}: {metric}", []).append(Curve(label, curve, phase, mode == "no-think"))
    return curve_panels(panels, "share of tasks")


def benchmark_table(records: Sequence[dict[str, Any]]) -> BenchmarkTable:
    """Every evaluation, with what right solutions scored on the machine where that was measured."""
    found = _evaluations(records)
    names = _scores(found)
    references = [name for record in found for name in record if "/reference/" in name]
    names += list(dict.fromkeys(references))
    rows = []
    for record in found:
        phase = PHASE_TITLES.get(record["of"], record["of"])
        where = phase if record["iteration"] == 0 else f"{phase} {record['iteration']}"
        values = [percent(record[name]) if record.get(name) is not None else ABSENT for name in names]
        rows.append([where, str(record["step"]), *values])
    return BenchmarkTable(["phase", "updates", *(name.replace("/", " ") for name in names)], rows)


def _evaluations(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["phase"] == PHASE]


def _scores(found: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the metrics that are scores of the model."""
    names = dict.fromkeys(name for record in found for name in record if name.count("/") == 2)
    return [name for name in names if not set(name.split("/")) & set(_BESIDE)]
