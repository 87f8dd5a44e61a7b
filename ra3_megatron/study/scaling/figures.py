"""Pictures of a scaling study: throughput, efficiency, and parts of a step."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from ra3_megatron.report.numbers import count
from ra3_megatron.report.plots import FIGURE_WIDTH
from ra3_megatron.scaling.search import Planned
from ra3_megatron.study.figures import COLOURS, MARKERS, Picture
from ra3_megatron.study.scaling.results import Row

TITLES = {"strong": "strong scaling: the same rows a step", "weak": "weak scaling: rows grow with the processes"}


def draw(rows: Sequence[Row], predictions: Mapping[str, Planned]) -> list[Picture]:
    """All figures that there is something to draw for. predictions: by arm."""
    pictures = []
    for mode in dict.fromkeys(row.point.mode for row in rows):
        mine = [row for row in rows if row.point.mode == mode]
        for size in dict.fromkeys(row.point.size for row in mine):
            of_size = [row for row in mine if row.point.size == size]
            caption = (
                f"{TITLES[mode].capitalize()} ({size}). Points: medians of the repeats, bars from the smallest to the "
                "largest. Grey: as many times the tokens/s as processes. Dotted: what the planner predicts."
            )
            pictures.append(Picture(f"{mode}-{size}", caption, _figure(of_size, predictions)))
    shown = [row for row in rows if row.cells[0].parts]
    if shown:
        caption = "Parts of a step as the trainer measured them, on the first process; medians over steps and repeats."
        pictures.append(Picture("parts", caption, _parts(shown)))
    return pictures


def _figure(rows: Sequence[Row], predictions: Mapping[str, Planned]) -> Figure:
    figure = _empty()
    left, right = figure.subplots(1, 2)
    for number, layout in enumerate(dict.fromkeys(row.point.layout for row in rows)):
        line = [row for row in rows if row.point.layout == layout]
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        at = [row.point.processes for row in line]
        rates = [row.tokens_per_second for row in line]
        bars = [[r.median - r.low for r in rates], [r.high - r.median for r in rates]]
        left.errorbar(at, [r.median for r in rates], bars, **style, markersize=4, capsize=2, lw=1.4, label=layout)
        right.plot(at, [row.efficiency for row in line], **style, markersize=4, lw=1.4, label=layout)
        known = [(row.point.processes, _rate(row, predictions)) for row in line if row.point.arm in predictions]
        if known:
            left.plot(*zip(*known, strict=True), ":", color=style["color"], marker="x", markersize=4, lw=1.2)
    first = min(rows, key=lambda row: row.point.processes)
    most = max(row.point.processes for row in rows)
    start, ends = first.tokens_per_second.median, (first.point.processes, most)
    left.plot(ends, [start * n / ends[0] for n in ends], "--", color="#777777", lw=1, label="ideal")
    right.axhline(1.0, color="#777777", linestyle="--", lw=1)
    left.set_yscale("log")
    for axis in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        axis(FuncFormatter(lambda value, _: count(value)))
    right.set_ylim(bottom=0)
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    ticks = sorted({row.point.processes for row in rows})
    _finish(left, "tokens/s of all processes", ticks)
    _finish(right, "efficiency", ticks)
    left.legend(frameon=False, fontsize=8)
    return figure


def _rate(row: Row, predictions: Mapping[str, Planned]) -> float:
    return predictions[row.point.arm].tokens_per_second_per_gpu * row.point.processes


def _parts(rows: Sequence[Row]) -> Figure:
    """A bar for each arm."""
    figure = _empty(height=0.9 + 0.42 * len({row.point.arm for row in rows}))
    axes = figure.subplots()
    arms = {row.point.arm: row for row in rows}
    names = list(dict.fromkeys(name for row in arms.values() for name in row.cells[0].parts))
    for place, row in enumerate(arms.values()):
        begun = 0.0
        for number, name in enumerate(names):
            seconds = median(cell.parts.get(name, 0.0) for cell in row.cells)
            label = name if place == 0 else None
            axes.barh(place, seconds, left=begun, color=COLOURS[number % len(COLOURS)], height=0.6, label=label)
            begun += seconds
    axes.set_yticks(range(len(arms)), list(arms), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a step", fontsize=9)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))  # above the bars
    return figure


def _empty(height: float = 3.8) -> Figure:
    figure = Figure(figsize=(FIGURE_WIDTH, height), dpi=140, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _finish(axes: Axes, label: str, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{number:,}" for number in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("processes", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.tick_params(labelsize=8, which="both")
