"""The pictures of the studies: white, with colours that stay apart in grey and for the colour-blind."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from ra3_megatron.theory.findings import Study

Numbers = dict[str, Any]

FIGURE_WIDTH = 9.2
"""Inches, that of the figures of a run."""
BLUE, ORANGE, GREEN, PURPLE, YELLOW, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#333333"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, BLACK)

CAPTIONS = {
    "regret": "Left: pruning error and RL error of random subsets of the abstractions after a fixed number of "
    "natural-gradient updates. A smaller set loses more to pruning and less to RL. Right: how exactly the two add up "
    "to the regret.",
    "pruning": "Demonstrations until all suboptimal sets of abstractions are gone. Points: simulation; lines: the "
    "union bound; dashed: (|Zε| log|Z| + log(1/δ)) / σ. Top: failure probability. Bottom: demonstrations for a failure "
    "probability of 10%.",
    "convergence": "Iterations to within 1% of the best value against the length of the abstractions; median over "
    "problems. A line that is parallel to the bound has its speed-up.",
    "speed_up": "Slope of log N on log bound with 95% intervals over problems: 1 is the bound's speed-up, 0 none.",
    "price": "The price c of a new thought that the prior implies. Dotted: the paper's default, c = 0.05.",
}

_MARKERS = "osD^vP"
_FAMILIES = {
    "expert": "then follow the expert",
    "repeats_random": "repeats in random MDPs",
    "repeats_grid": "repeats in gridworlds",
}
_ALGORITHMS = {
    "value_iteration": ("value iteration", BLUE, "o"),
    "policy_iteration": ("policy iteration", BLACK, "s"),
    "policy_gradient": ("policy gradient, one step size", ORANGE, "D"),
    "natural": ("natural gradient, one step size", PURPLE, "^"),
    "natural_gamma": ("natural gradient, steps × 1/γ", YELLOW, "v"),
    "natural_gbar": ("natural gradient, steps × 1/γ̄", GREEN, "P"),
}


def draw_figures(studies: Mapping[str, Study]) -> dict[str, Figure]:
    """All figures by file name without ending, in the order of `CAPTIONS`."""
    convergence = studies["convergence"].numbers
    return {
        "regret": _regret(studies["regret"].numbers),
        "pruning": _pruning(studies["pruning"].numbers),
        "convergence": _convergence(convergence),
        "speed_up": _speed_up(convergence),
        "price": _price(studies["prior"].numbers),
    }


def _regret(numbers: Numbers) -> Figure:
    figure, (left, right) = _panels(1, 2)
    sizes = np.array(numbers["sizes"])
    pruning, rl = (100 * np.array(numbers[name]) for name in ("pruning_error", "rl_error"))
    left.bar(sizes, pruning, color=BLUE, label="pruning error")
    left.bar(sizes, rl, bottom=pruning, color=YELLOW, label=f"RL error after {numbers['updates']} updates")
    _finish(left, "regret by size of the subset", "abstractions kept", "regret (% of the best value)", legend=True)
    left.set_xticks(sizes)
    left.set_ylim(0, 1.3 * (pruning + rl).max())
    right.hist(np.log10(np.maximum(numbers["residuals"], 1e-17)), bins=24, color=BLUE)
    right.axvline(-10, color=BLACK, linestyle="--", linewidth=1, label="$10^{-10}$")
    _finish(right, "|regret - pruning error - RL error|", "log10 of the largest over states", "policies")
    right.legend(fontsize=7.5, frameon=False, loc="upper center")
    return figure


def _pruning(numbers: Numbers) -> Figure:
    figure, (curves, grid, by_size, by_abstractions) = _panels(2, 2)
    settings = {(s["abstractions"], s["size"], s["sigma"]): s for s in numbers["settings"] if s["lucky"]}
    shown = [(32, 1, 0.1), (32, 3, 0.1), (32, 5, 0.1), (32, 3, 0.05)]
    for key, colour, marker in zip(shown, COLOURS, _MARKERS, strict=False):
        label = f"|Z|={key[0]}, |Zε|={key[1]}, σ={key[2]}"
        _failure(curves, settings[key], colour, marker, label, numbers["repeats"])
    curves.set_xlim(0, 1.02 * settings[32, 3, 0.05]["n"][-1])
    _finish(curves, "failure probability, tasks of one decision", "demonstrations n", "Pr(failure)", legend=True)
    for curve, colour, marker in zip(numbers["grid"]["curves"], COLOURS, _MARKERS, strict=False):
        _failure(grid, curve, colour, marker, f"σ={curve['sigma']}", numbers["repeats"])
    sizes = f"|Z|={numbers['grid']['abstractions']}, |Zε|={numbers['grid']['size']}"
    title = f"failure probability, gridworld tasks ({sizes})"
    _finish(grid, title, "demonstrations n", "Pr(failure)", legend=True)
    _needed(by_size, numbers["by_size"], BLUE, "simulation")
    _finish(by_size, "demonstrations against |Zε| (|Z|=32, σ=0.1)", "|Zε|", "demonstrations", legend=True)
    by_size.set_xticks(numbers["by_size"]["x"])
    _needed(by_abstractions, numbers["by_log_abstractions"], BLUE, "others suit by chance, σ=0.1")
    _needed(by_abstractions, numbers["unlucky_by_log_abstractions"], ORANGE, "others never suit, σ=1/3")
    _finish(by_abstractions, "demonstrations against |Z| (|Zε|=3)", "|Z|", "demonstrations", legend=True)
    abstractions = np.exp(numbers["by_log_abstractions"]["x"])
    by_abstractions.set_xticks(np.log(abstractions), [f"{n:.0f}" for n in abstractions])
    for axes in (by_size, by_abstractions):
        axes.set_ylim(0, axes.get_ylim()[1] * 1.25)
    return figure


def _failure(axes: Axes, curve: Numbers, colour: str, marker: str, label: str, repeats: int) -> None:
    n, failure, bound = (np.array(curve[name], dtype=float) for name in ("n", "failure", "bound"))
    seen = failure >= 10 / repeats
    axes.semilogy(n[seen], failure[seen], marker, color=colour, markersize=3, label=label)
    axes.semilogy(n, bound, color=colour, linewidth=1.1)
    axes.set_ylim(5 / repeats, 1.6)


def _needed(axes: Axes, growth: Numbers, colour: str, label: str) -> None:
    axes.plot(growth["x"], growth["needed"], "o", color=colour, markersize=5, label=label)
    axes.plot(growth["x"], growth["predicted"], color=colour, linewidth=1.2, label="union bound")
    axes.plot(growth["x"], growth["sufficient"], color=colour, linewidth=1, linestyle="--", label="theorem's number")


def _convergence(numbers: Numbers) -> Figure:
    figure, panels = _panels(1, 3, height=3.5, sharey=True)
    tolerance = str(numbers["tolerances"][0])
    for axes, (family, title) in zip(panels, _FAMILIES.items(), strict=True):
        result = numbers["families"][family]["by_tolerance"][tolerance]
        lengths = numbers["lengths"]
        axes.loglog(lengths, result["bound"], color=BLACK, linestyle="--", linewidth=1.4, label="the paper's bound")
        for name, (label, colour, marker) in _ALGORITHMS.items():
            median = [np.nan if n is None else max(n, 1) for n in result["algorithms"][name]["median"]]
            axes.loglog(lengths, median, marker + "-", color=colour, markersize=4, linewidth=1.2, label=label)
        _finish(axes, title, "length τ (primitive steps)", "iterations N" if axes is panels[0] else None)
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _speed_up(numbers: Numbers) -> Figure:
    figure, (axes,) = _panels(1, 1, height=3.1)
    tolerance = str(numbers["tolerances"][0])
    for offset, (family, title), colour, marker in zip(
        (-0.2, 0.0, 0.2), _FAMILIES.items(), COLOURS, _MARKERS, strict=False
    ):
        result = numbers["families"][family]["by_tolerance"][tolerance]["algorithms"]
        points = [(row, result[name]["slope"]) for row, name in enumerate(_ALGORITHMS) if "slope" in result[name]]
        value = np.array([point["value"] for _, point in points])
        errors = [value - [p["low"] for _, p in points], [p["high"] for _, p in points] - value]
        rows = [row + offset for row, _ in points]
        axes.errorbar(value, rows, xerr=errors, fmt=marker, color=colour, markersize=5, capsize=2, label=title)
    axes.axvline(0, color=BLACK, linewidth=0.8)
    axes.axvline(1, color=BLACK, linewidth=1.2, linestyle="--")
    axes.set_yticks(range(len(_ALGORITHMS)), [label for label, _, _ in _ALGORITHMS.values()])
    axes.invert_yaxis()
    _finish(axes, "share of the bound's speed-up", "slope of log N on log bound", None)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _price(numbers: Numbers) -> Figure:
    figure, (left, right) = _panels(1, 2)
    alpha = np.array(numbers["alpha"])
    for (latents, prices), colour in zip(numbers["price"].items(), COLOURS, strict=False):
        price = np.array(prices)
        left.plot(alpha, price, color=colour, linewidth=1.3, label=f"K={int(latents):,}")
        inside = alpha > 0
        right.loglog(alpha[inside] / (1 - alpha[inside]), price[inside], color=colour, linewidth=1.3)
        found = [(a / (1 - a), float(c)) for c, a in numbers["alpha_of_published_price"][latents].items()]
        right.loglog([odds for odds, _ in found], [c for _, c in found], "o", color=colour, markersize=3)
    _finish(left, "c(α)", "α", "price c (nats)", legend=True)
    _finish(right, "points: the prices of the paper's sweep", "α / (1 - α)", "price c (nats)")
    for axes in (left, right):
        axes.axhline(0.05, color=BLACK, linestyle=":", linewidth=1)
    return figure


def _panels(rows: int, columns: int, height: float = 2.9, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(FIGURE_WIDTH, height * rows), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_facecolor("white")
    return figure, list(figure.subplots(rows, columns, sharey=sharey, squeeze=False).flat)


def _finish(axes: Axes, title: str, x: str, y: str | None, legend: bool = False) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x, fontsize=9)
    if y:
        axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if legend:
        axes.legend(fontsize=7.5, frameon=False)
