"""The curves of a run as pictures. A figure is drawn from whatever was logged; None when nothing of it was.

Pictures have a white background, black text and colours that stay apart in grey and for the colour-blind.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ra3_megatron.report.summary import Summary

Record = Mapping[str, Any]

COLOURS = {"base": "#777777", "ntp": "#0072B2", "ra3": "#D55E00", "thought": "#E69F00", "plain": "#333333"}

FIGURE_WIDTH = 9.2
"""Inches; the same for all figures, so that their text has one size in the report."""

PHASE_TITLES = {
    "warm_start": "warm start",
    "estep": "E-step",
    "infuse": "infusion",
    "mstep": "M-step (RA3)",
    "ntp": "NTP control",
}

ESTEP_CURVES = {
    "reward": "reward (nats/line)",
    "think_rate": "thinking rate (share of lines)",
    "mean_thought_tokens": "thought length (tokens)",
    "decision_entropy": "decision entropy (nats)",
    "advantage_std": "advantage, standard deviation",
    "grad_norm": "gradient norm",
    "log_prob_mismatch": "engine against trainer (mean |ratio - 1|)",
    "largest_log_prob_difference": "engine against trainer (largest |log ratio|, nats)",
    "refit_seconds": "weights into the engines (s)",
}
"""Metric of the E-step and the title of its panel."""


@dataclass(frozen=True)
class Series:
    """One curve: values over the steps of a phase, EM iterations one behind the other."""

    steps: list[int]
    values: list[float]
    boundaries: list[int]
    """The last step before each new EM iteration."""

    def pieces(self) -> list[tuple[list[int], list[float]]]:
        """Steps and values of each EM iteration that has any."""
        edges = [0, *(bisect_right(self.steps, boundary) for boundary in self.boundaries), len(self.steps)]
        parts = [(self.steps[start:end], self.values[start:end]) for start, end in pairwise(edges)]
        return [part for part in parts if part[0]]


@dataclass(frozen=True)
class Curve:
    """One curve of a panel with several."""

    label: str
    values: Series
    phase: str
    """Which gives it its colour."""
    dashed: bool = False


def series(records: Sequence[Record], phase: str, name: str) -> Series:
    """The curve of one metric in one phase; steps at which it was not logged, or not finite, are left out."""
    result = Series([], [], [])
    offset, last, iteration = 0, 0, None
    for record in records:
        if record.get("phase") != phase:
            continue
        if iteration is not None and record["iteration"] != iteration:
            offset, last = offset + last, 0
            result.boundaries.append(offset)
        iteration = record["iteration"]
        last = max(last, record["step"])
        value = record.get(name)
        if isinstance(value, int | float):
            result.steps.append(offset + record["step"])
            result.values.append(float(value))
    return result


def draw_figures(records: Sequence[Record], summary: Summary | None) -> dict[str, Figure]:
    """All figures that the run has data for, by file name without ending."""
    drawn = {
        "cross_entropy": _cross_entropy(records, summary),
        "loss": _loss(records),
        "code_ce": _code_ce(records),
        "estep": _estep(records),
        "grad_norm": _grad_norm(records),
        "throughput": _throughput(records),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _cross_entropy(records: Sequence[Record], summary: Summary | None) -> Figure | None:
    """Held-out cross-entropy of code tokens: one point an arm and EM iteration."""
    points = _held_out(records, summary)
    if not points:
        return None
    figure, (axes,) = _panels(1)
    base = points.get("base", {}).get(0)
    if base is not None:
        axes.axhline(base, color=COLOURS["base"], linestyle="--", linewidth=1.2, label="base")
    for arm in ("ntp", "ra3"):
        curve = dict(points.get(arm, {}))
        if not curve:
            continue
        if base is not None:
            curve.setdefault(0, base)
        iterations = sorted(curve)
        axes.plot(iterations, [curve[i] for i in iterations], "o-", color=COLOURS[arm], label=arm.upper())
    _finish(axes, "held-out cross-entropy of code tokens", "EM iteration", "nats/token", legend=True)
    return figure


def _held_out(records: Sequence[Record], summary: Summary | None) -> dict[str, dict[int, float]]:
    """Code cross-entropy by arm and iteration: from the summary, else from the evaluations logged so far."""
    points: dict[str, dict[int, float]] = {}
    if summary is not None:
        points["base"] = {0: summary.base.code_ce}
        for entry in summary.iterations:
            points.setdefault(entry.arm, {})[entry.iteration] = entry.code_ce
        return points
    for record in records:
        if record.get("phase") == "evaluation" and isinstance(record.get("code_ce"), int | float):
            points.setdefault(str(record.get("arm")), {})[record["iteration"]] = record["code_ce"]
    if "base" in points:
        points["base"] = {0: next(iter(points["base"].values()))}
    return points


def _loss(records: Sequence[Record]) -> Figure | None:
    """Training loss, one panel a phase."""
    return one_panel_each(records, _of_phases(records, "loss", without="estep"), "loss")


def _code_ce(records: Sequence[Record]) -> Figure | None:
    """M-step against its control on training batches, code and thought tokens apart."""
    curves = [
        ("NTP: code", "ntp", "code_ce", COLOURS["ntp"]),
        ("RA3: code", "mstep", "code_ce", COLOURS["ra3"]),
        ("RA3: thoughts", "mstep", "thought_ce", COLOURS["thought"]),
    ]
    found = [(label, series(records, phase, name), colour) for label, phase, name, colour in curves]
    if not any(curve.steps for _, curve, _ in found):
        return None
    figure, (axes,) = _panels(1)
    for label, curve, colour in found:
        if curve.steps:
            _draw(axes, curve, colour, label)
    _finish(axes, "training cross-entropy: M-step and NTP", "step", "nats/token", legend=True)
    return figure


def _estep(records: Sequence[Record]) -> Figure | None:
    curves = [("estep", name, title) for name, title in ESTEP_CURVES.items()]
    return one_panel_each(records, [curve for curve in curves if series(records, *curve[:2]).steps], None)


def _grad_norm(records: Sequence[Record]) -> Figure | None:
    return one_panel_each(records, _of_phases(records, "grad_norm", without="estep"), "gradient norm")


def _throughput(records: Sequence[Record]) -> Figure | None:
    return one_panel_each(records, _of_phases(records, "tokens_per_second"), "tokens/s", from_zero=True)


def _of_phases(records: Sequence[Record], name: str, without: str = "") -> list[tuple[str, str, str]]:
    """The phases that logged a metric, in the order in which they began, as (phase, metric, title)."""
    phases = dict.fromkeys(record["phase"] for record in records)
    found = [phase for phase in phases if phase != without and series(records, phase, name).steps]
    return [(phase, name, PHASE_TITLES.get(phase, phase)) for phase in found]


def one_panel_each(
    records: Sequence[Record], curves: Sequence[tuple[str, str, str]], unit: str | None, from_zero: bool = False
) -> Figure | None:
    """One panel a curve (phase, metric, title)."""
    if not curves:
        return None
    figure, panels = _panels(len(curves))
    for axes, (phase, name, title) in zip(panels, curves, strict=True):
        _draw(axes, series(records, phase, name), _colour(phase))
        _finish(axes, title, "step", unit)
        if from_zero:
            axes.set_ylim(bottom=0)
    return figure


def curve_panels(panels: Mapping[str, Sequence[Curve]], unit: str) -> Figure | None:
    """One panel for each title, with the curves that have values; None without any."""
    kept = {title: [curve for curve in curves if curve.values.steps] for title, curves in panels.items()}
    kept = {title: curves for title, curves in kept.items() if curves}
    if not kept:
        return None
    figure, places = _panels(len(kept))
    for axes, (title, curves) in zip(places, kept.items(), strict=True):
        for curve in curves:
            _draw(axes, curve.values, _colour(curve.phase), curve.label, "--" if curve.dashed else "-")
        _finish(axes, title, "step", unit, legend=True)
        axes.set_ylim(-0.03, 1.03)
    return figure


def _colour(phase: str) -> str:
    return COLOURS.get({"mstep": "ra3"}.get(phase, phase), COLOURS["plain"])


def _draw(axes: Axes, curve: Series, colour: str, label: str | None = None, line: str = "-") -> None:
    marker = "o" if len(curve.steps) < 25 else ""
    for steps, values in curve.pieces():
        axes.plot(steps, values, line, color=colour, linewidth=1.3, label=label, marker=marker, markersize=3)
        label = None
    for boundary in curve.boundaries:
        axes.axvline(boundary + 0.5, color="#999999", linestyle=":", linewidth=1)


def _panels(number: int) -> tuple[Figure, list[Axes]]:
    """A figure with `number` panels: up to three in one row, else two a row."""
    columns = number if number <= 3 else 2
    rows = -(-number // columns)
    figure = Figure(figsize=(FIGURE_WIDTH, 2.7 * rows), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_facecolor("white")
    panels = [figure.add_subplot(rows, columns, index + 1) for index in range(number)]
    return figure, panels


def _finish(axes: Axes, title: str, x: str, y: str | None, legend: bool = False) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x, fontsize=9)
    if y:
        axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if legend:
        axes.legend(fontsize=8, frameon=False)
