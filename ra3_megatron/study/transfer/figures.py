"""Pictures of a transfer study: pass@1 against updates, tokens and seconds, one colour a start."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from ra3_megatron.report.plots import FIGURE_WIDTH
from ra3_megatron.study.figures import COLOURS, Picture
from ra3_megatron.study.results import seeds_of_means, with_shared_seeds
from ra3_megatron.study.transfer.curves import Run, by_start

AXES = {"steps": "updates", "tokens": "sampled tokens", "seconds": "seconds of training"}


def draw(runs: Sequence[Run]) -> list[Picture]:
    """All figures that there is something to draw for."""
    if not runs:
        return []
    runs = with_shared_seeds(runs)
    figure = _figure(3.4, len(AXES))
    for axes, (axis, title) in zip(figure.axes, AXES.items(), strict=True):
        for number, (start, members) in enumerate(by_start(runs).items()):
            _draw(axes, members, axis, COLOURS[number % len(COLOURS)], start)
        axes.set_xlabel(title, fontsize=9)
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.axhline(0.5, color="#bbbbbb", lw=0.7, zorder=0)
        axes.axhline(0.9, color="#bbbbbb", lw=0.7, zorder=0)
        if axis != "steps":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.axes[0].set_ylabel("held-out pass@1", fontsize=9)
    figure.axes[0].legend(fontsize=8, frameon=False)
    caption = (
        "pass@1 on the held-out problems. Thick: mean; thin: each seed. Grey lines: 50% and 90%, whose first "
        f"crossing the table times. {seeds_of_means(runs, 'start')}."
    )
    return [Picture("transfer", caption, figure), *_signal(runs)]


def _draw(axes: Axes, members: Sequence[Run], axis: str, colour: str, label: str) -> None:
    curves = [run.curve for run in members]
    for curve in curves:
        axes.plot(getattr(curve, axis), curve.rate, color=colour, lw=0.6, alpha=0.45)
    if all(curve.steps == curves[0].steps for curve in curves):
        at = np.mean([getattr(curve, axis) for curve in curves], axis=0)
        axes.plot(at, np.mean([curve.rate for curve in curves], axis=0), color=colour, lw=2, label=label)


def _signal(runs: Sequence[Run]) -> list[Picture]:
    figure = _figure(2.6, 1)
    (axes,) = figure.axes
    for number, (start, members) in enumerate(by_start(runs).items()):
        rows = [run.curve.signal for run in members]
        length = min(map(len, rows))
        if not length:
            return []
        mean = np.mean([row[:length] for row in rows], axis=0)
        width = max(1, length // 25)
        smooth = np.convolve(mean, np.ones(width) / width, mode="valid")
        at = np.arange(len(smooth)) + (width + 1) / 2
        axes.plot(at, smooth, color=COLOURS[number % len(COLOURS)], lw=1.6, label=start)
    axes.set_xlabel("updates", fontsize=9)
    axes.set_ylabel("groups with a signal", fontsize=9)
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(fontsize=8, frameon=False)
    caption = (
        "Training groups whose rewards differed, the only ones with a gradient: mean over seeds, smoothed. They become "
        "few when nothing is solved, and again when everything is."
    )
    return [Picture("signal", caption, figure)]


def _figure(height: float, columns: int) -> Figure:
    figure = Figure(figsize=(FIGURE_WIDTH, height), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_facecolor("white")
    for axes in np.atleast_1d(figure.subplots(1, columns)):
        axes.tick_params(labelsize=8)
        axes.grid(True, color="#eeeeee", lw=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure
