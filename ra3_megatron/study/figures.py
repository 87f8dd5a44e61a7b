"""The pictures of a study: measures against a key of the grid, another measure, or the EM iteration.

White, with colours that stay apart in grey and for the colour-blind. A point is the mean over seeds; its bar is the 95%
interval over seeds where there are three, and the seeds are small dots behind it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ra3_megatron.report.plots import FIGURE_WIDTH
from ra3_megatron.study.comparison import mean_of
from ra3_megatron.study.intervals import t_interval
from ra3_megatron.study.measures import MEASURES
from ra3_megatron.study.results import Finished, by_group, seeds_of_means, with_shared_seeds
from ra3_megatron.study.settings import value_text
from ra3_megatron.study.spec import ITERATION, PlotConfig, StudyConfig

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#333333", "#56B4E9", "#8A6D00")
MARKERS = "osD^vPX*"
LINES = ("-", "--", "-.", ":")
GRID_MEASURES = ["code_ce", "code_accuracy", "think_rate"]
ITERATION_MEASURES = ["code_ce", "code_accuracy", "think_rate", "elbo"]
DECADE = 10.0
"""From this ratio of the largest to the smallest positive value on, an axis is logarithmic."""


@dataclass(frozen=True)
class Picture:
    """One figure with its caption."""

    name: str
    """File name without ending."""
    caption: str
    figure: Figure


@dataclass(frozen=True)
class _Point:
    """The cells of one group (at one iteration) at their place."""

    label: str
    """Of the group."""
    x: Any
    y: float
    """Mean over seeds."""
    seeds: list[tuple[float | None, float]]
    """x, where it is a measure, and y of each seed."""


def draw_figures(study: StudyConfig, done: Sequence[Finished]) -> list[Picture]:
    """All figures that there is something to draw for."""
    done = with_shared_seeds(done)
    pictures: list[Picture] = []
    for plot in _plots(study, done):
        figure = _draw(plot, done)
        if figure is not None:
            again = sum(picture.name.startswith(f"against-{plot.x}") for picture in pictures)
            pictures.append(
                Picture(f"against-{plot.x}{f'-{again + 1}' if again else ''}", _caption(plot, done), figure)
            )
    return pictures


def _plots(study: StudyConfig, done: Sequence[Finished]) -> list[PlotConfig]:
    """Those that the study asks for, else one a key of the grid; and the EM iterations, if there are several."""
    plots = list(study.plots or [])
    if study.plots is None:
        keys = dict.fromkeys(key for arm in study.arms for key in study.grid_of(arm))
        plots += [PlotConfig(x=key, y=GRID_MEASURES, optimum=True) for key in keys]
    several = any(cell.last.iteration > 1 for cell in done)
    if several and len(by_group(done)) <= len(COLOURS) and not any(plot.x == ITERATION for plot in plots):
        plots.append(PlotConfig(x=ITERATION, y=ITERATION_MEASURES))
    return plots


def _caption(plot: PlotConfig, done: Sequence[Finished]) -> str:
    against = {ITERATION: "EM iteration (0: the start)"}.get(plot.x)
    against = against or (MEASURES[plot.x].title if plot.x in MEASURES else plot.x)
    mark = " Ring: the best mean." if plot.optimum else ""
    return (
        f"Held-out figures against {against}. Points: means; small dots: seeds; bars: 95% intervals over seeds, not "
        f"paired, where there are three. {seeds_of_means(done)}.{mark}"
    )


def _draw(plot: PlotConfig, done: Sequence[Finished]) -> Figure | None:
    panels = {name: _series(plot.x, name, done) for name in plot.y}
    panels = {name: found for name, found in panels.items() if found}
    if not panels:
        return None
    figure, axes_list = _panels(len(panels))
    places = None if plot.x in MEASURES or plot.x == ITERATION else _Places(_values(panels))
    for axes, (name, series) in zip(axes_list, panels.items(), strict=True):
        for number, (label, points) in enumerate(series.items()):
            _curve(axes, plot.x, points, places, label, number)
        if plot.optimum:
            _mark(axes, plot.x, name, series, places)
        _finish(axes, plot.x, name, places)
    if max(len(series) for series in panels.values()) > 1:
        handles, labels = axes_list[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8, frameon=False)
    return figure


def _series(x: str, measure: str, done: Sequence[Finished]) -> dict[str, list[_Point]]:
    """Curves by label, for one panel."""
    series: dict[str, list[_Point]] = {}
    for group, members in by_group(done).items():
        first = members[0].cell
        if x == ITERATION:
            for iteration in sorted({row.iteration for member in members for row in member.rows}):
                rows = [row for member in members for row in member.rows if row.iteration == iteration]
                _add(series, group, group, iteration, [(None, row.figures[measure]) for row in rows])
            continue
        last = [member.last.figures for member in members]
        if x in MEASURES:
            pairs = [(figures[x], figures[measure]) for figures in last if figures[x] is not None]
            _add(series, first.arm, group, mean_of([pair[0] for pair in pairs]), pairs)
        elif x in first.point:
            others = [f"{key.rsplit('.', 1)[-1]}={value_text(v)}" for key, v in first.point.items() if key != x]
            ys = [(None, figures[measure]) for figures in last]
            _add(series, ",".join([first.arm, *others]), group, first.point[x], ys)
    return series


def _add(
    series: dict[str, list[_Point]], label: str, group: str, x: Any, pairs: Sequence[tuple[float | None, float | None]]
) -> None:
    seeds = [(own, y) for own, y in pairs if y is not None]
    if seeds:
        y = sum(pair[1] for pair in seeds) / len(seeds)
        series.setdefault(label, []).append(_Point(group, x, y, seeds))


def _values(panels: Mapping[str, Mapping[str, list[_Point]]]) -> list[Any]:
    found: dict[str, Any] = {}
    for series in panels.values():
        for points in series.values():
            found |= {value_text(point.x): point.x for point in points}
    return list(found.values())


class _Places:
    """Where the values of a key stand on an axis: to scale where they are numbers, else side by side.

    With values that span a decade the axis is logarithmic; then 0 stands left of it, and infinity always right of it,
    each behind a dotted line.
    """

    def __init__(self, values: Sequence[Any]) -> None:
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v >= 0]
        self.edges: list[float] = []
        if len(numbers) < len(values):
            self._of = {value_text(value): float(place) for place, value in enumerate(values)}
            return
        finite = sorted(v for v in numbers if math.isfinite(v))
        positive = [v for v in finite if v > 0]
        logarithmic = len(positive) > 1 and positive[-1] / positive[0] >= DECADE
        scaled = {v: math.log10(v) if logarithmic else float(v) for v in (positive if logarithmic else finite)}
        low, high = (min(scaled.values()), max(scaled.values())) if scaled else (0.0, 0.0)
        gap = (high - low) / 5 or 1.0
        if logarithmic and finite[0] == 0:
            scaled[0] = low - gap
            self.edges.append(low - gap / 2)
        if any(math.isinf(v) for v in numbers):
            scaled[math.inf] = high + gap
            self.edges.append(high + gap / 2)
        self._of = {value_text(v): scaled[v] for v in numbers}

    def of(self, value: Any) -> float:
        """Place of a value."""
        return self._of[value_text(value)]

    def ticks(self) -> tuple[list[float], list[str]]:
        """Places and labels of all values, without those that would cover their neighbour's label."""
        pairs = sorted((place, text) for text, place in self._of.items())
        width = (pairs[-1][0] - pairs[0][0]) / 38  # of a character, about
        kept: list[tuple[float, str]] = []
        for place, text in pairs:
            if not kept or place - kept[-1][0] >= width * (1 + (len(text) + len(kept[-1][1])) / 2):
                kept.append((place, text))
        return [place for place, _ in kept], [text for _, text in kept]


def _place(x: str, point: _Point, places: _Places | None) -> float:
    return float(point.x) if places is None else places.of(point.x)


def _curve(axes: Axes, x: str, points: Sequence[_Point], places: _Places | None, label: str, number: int) -> None:
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    ordered = sorted(points, key=lambda point: _place(x, point, places))
    where = [_place(x, point, places) for point in ordered]
    style = LINES[number % len(LINES)]
    ys = [point.y for point in ordered]
    axes.plot(where, ys, style, color=colour, marker=marker, mfc="none", markersize=5, lw=1.4, label=label)
    for place, point in zip(where, ordered, strict=True):
        if len(point.seeds) > 1:
            xs, ys = [place if own is None else own for own, _ in point.seeds], [y for _, y in point.seeds]
            axes.plot(xs, ys, ".", color=colour, markersize=3, alpha=0.6, zorder=1)
        interval = t_interval([y for _, y in point.seeds])
        if interval is not None:
            axes.vlines(place, *interval, color=colour, lw=1.0, alpha=0.5)


def _mark(axes: Axes, x: str, measure: str, series: Mapping[str, Sequence[_Point]], places: _Places | None) -> None:
    """A ring around the best point, with the name of its group where the axis does not say it."""
    better = MEASURES[measure].better
    points = [point for curve in series.values() for point in curve]
    if better == "neither" or len(points) < 2:
        return
    best = (min if better == "lower" else max)(points, key=lambda point: point.y)
    place = _place(x, best, places)
    axes.plot([place], [best.y], "o", mfc="none", mec="#000000", mew=1.4, markersize=12)
    if places is None and x != ITERATION:
        axes.text(0.02, 0.03, f"ring: {best.label}", transform=axes.transAxes, fontsize=7.5)


def _panels(number: int) -> tuple[Figure, list[Axes]]:
    """A figure with `number` panels: up to three in one row, else two a row."""
    columns = number if number <= 3 else 2
    rows = -(-number // columns)
    figure = Figure(figsize=(FIGURE_WIDTH, 3.0 * rows), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_facecolor("white")
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(number)]


def _finish(axes: Axes, x: str, measure: str, places: _Places | None) -> None:
    axes.set_title(MEASURES[measure].title, fontsize=9, loc="left")
    axes.set_xlabel("EM iteration" if x == ITERATION else MEASURES[x].title if x in MEASURES else x, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.margins(0.08, 0.12)
    if MEASURES[measure].form == "percent":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if places is not None:
        axes.set_xticks(*places.ticks())
        for edge in places.edges:
            axes.axvline(edge, color="#999999", linestyle=":", linewidth=1)
    elif x == ITERATION:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
    elif MEASURES[x].form == "percent":
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
