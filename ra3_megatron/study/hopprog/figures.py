"""Figures of a HopProg study: the arms, where thoughts stand and what they save, the staircase of the price."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ra3_megatron.report.plots import FIGURE_WIDTH
from ra3_megatron.study.figures import COLOURS, LINES, MARKERS
from ra3_megatron.study.hopprog.groups import Group, price_sweep, recall, recall_by_hops
from ra3_megatron.study.predictions import estimate
from ra3_megatron.tasks import measures
from ra3_megatron.tasks.measures import Line


def draw_figures(groups: Mapping[str, Group]) -> dict[str, Figure]:
    """Figures by caption: those that there is something to draw for."""
    found = {}
    if groups:
        caption = "Held-out code of items by arm: mean, 95% interval over seeds where there are three, and each seed."
        found[caption] = _arms(groups)
    shown = {name: groups[name] for name in ("base", "ntp", "ra3") if name in groups}
    if len(shown) > 1:
        found["Lines of an item by their place in it: where thoughts stand, and what a line costs."] = _places(shown)
    sweep = price_sweep(groups)
    if len(sweep) > 1:
        caption = "Share of the boundaries with a thought against the price c of a thought, by hops."
        found[caption] = _staircase(sweep, groups.get("gate"))
    return found


def _arms(groups: Mapping[str, Group]) -> Figure:
    figure = Figure(figsize=(FIGURE_WIDTH, 0.8 + 0.3 * len(groups)), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, group in enumerate(groups.values()):
        values = [measures.nats_a_line(lines) for lines in group.lines.values()]
        found = estimate(values)
        assert found is not None, "a group has lines"
        axes.plot(values, [row] * len(values), ".", color="#999999", markersize=5)
        if found.low is not None and found.high is not None:
            axes.plot([found.low, found.high], [row, row], color=COLOURS[0], linewidth=2)
        axes.plot(found.mean, row, "o", color=COLOURS[0])
    axes.set_yticks(range(len(groups)), list(groups), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("nats a line of an item", fontsize=9)
    axes.grid(axis="x", color="#e5e5e5")
    return figure


def _places(groups: Mapping[str, Group]) -> Figure:
    figure = Figure(figsize=(FIGURE_WIDTH, 3.2), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    thinking, cost = figure.subplots(1, 2)
    for number, (name, group) in enumerate(groups.items()):
        lines = [line for run in group.lines.values() for line in run]
        rates, nats = _think_rate_by_place(lines), measures.nats_by_place(lines, raw=False)
        style: dict[str, Any] = {
            "color": COLOURS[number],
            "marker": MARKERS[number],
            "linestyle": LINES[number],
            "label": name,
        }
        thinking.plot(list(rates), list(rates.values()), **style)
        cost.plot(list(nats), list(nats.values()), **style)
    _finish(thinking, "thinking rate", "line of the item (0: the boundary)")
    thinking.yaxis.set_major_formatter(PercentFormatter(1.0))
    _finish(cost, "nats a line", "line of the item (0: the boundary)")
    return figure


def _think_rate_by_place(lines: list[Line]) -> dict[int, float]:
    places = sorted({line.truth.place for line in lines})
    at = {place: [line.figures.thought is not None for line in lines if line.truth.place == place] for place in places}
    return {place: sum(there) / len(there) for place, there in at.items()}


def _staircase(sweep: list[tuple[float, Group]], base: Group | None) -> Figure:
    figure = Figure(figsize=(FIGURE_WIDTH, 3.4), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    gains = {} if base is None else measures.gain_by_hops([line for run in base.lines.values() for line in run])
    for number, hops in enumerate(sorted(recall_by_hops(sweep[0][1]))):
        by_seed = [
            estimate([recall([line for line in run if line.truth.hops == hops]) for run in group.lines.values()])
            for _, group in sweep
        ]
        style: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": LINES[number % len(LINES)],
        }
        label = f"h = {hops}" + (f": a thought saves {gains[hops]:.1f} nats" if hops in gains else "")
        axes.plot(range(len(sweep)), [found.mean for found in by_seed if found], label=label, **style)
    axes.set_xticks(range(len(sweep)), [f"{price:g}" for price, _ in sweep])
    _finish(axes, "boundaries with a thought", "price c of a thought (nats)")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _finish(axes: Axes, title: str, x: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylim(bottom=0)
    axes.grid(color="#e5e5e5")
    axes.legend(fontsize=8, frameon=False)
