"""Throughput against the number of GPUs: the best layout at each, with the same and with a growing global batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from ra3_megatron.scaling.memory import Work
from ra3_megatron.scaling.search import Planned, describe, search
from ra3_megatron.scaling.tables import Architecture, Gpu

MOST_GPUS = 8192
STRONG, WEAK = "the same global batch (strong scaling)", "a global batch that grows with the GPUs (weak scaling)"
COLOURS = {STRONG: "#0072B2", WEAK: "#D55E00"}
MARKERS = {STRONG: "o", WEAK: "s"}


@dataclass(frozen=True)
class Point:
    """The best layout of a number of GPUs."""

    kind: str
    gpus: int
    planned: Planned

    def row(self) -> dict[str, str]:
        """Cells of a table."""
        planned = self.planned
        return {
            "GPUs": f"{self.gpus:,}",
            "rows a step": f"{planned.work.global_batch:,}",
            "layout": describe(planned.parallel, planned.work.micro_batch),
            "tokens/s": f"{planned.tokens_per_second_per_gpu * self.gpus:,.0f}",
            "tokens/s/GPU": f"{planned.tokens_per_second_per_gpu:,.0f}",
            "MFU": f"{planned.mfu:.1%}",
            "step s": f"{planned.step.total:.2f}",
            "GiB": f"{planned.memory.total:.1f}",
        }


def sizes(gpus: int, most: int = MOST_GPUS) -> list[int]:
    """Numbers of GPUs: `gpus` halved and doubled, up to `most`."""
    found = [gpus]
    while found[0] % 2 == 0:
        found.insert(0, found[0] // 2)
    while found[-1] * 2 <= most:
        found.append(found[-1] * 2)
    return found


def points(made: Architecture, gpus: int, work: Work, gpu: Gpu, rollouts_gib: float) -> Iterator[list[Point]]:
    """The best layouts of each of `sizes(gpus)`, as they are found; none where nothing fits. The weak batch is `work`'s
    at `gpus` GPUs."""
    for number in sizes(gpus):
        found = []
        for kind, batch in ((STRONG, work.global_batch), (WEAK, work.global_batch * number // gpus)):
            if batch:
                plan = search(made, number, replace(work, global_batch=batch), gpu, rollouts_gib)
                found += [Point(kind, number, plan.best[0])] if plan.best else []
        yield found


def draw(found: list[Point], title: str) -> Figure:
    """Tokens a second of all GPUs beside the ideal line, and MFU."""
    figure = Figure(figsize=(9.2, 4.0), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for kind in (STRONG, WEAK):
        line = sorted((p for p in found if p.kind == kind), key=lambda p: p.gpus)
        if not line:
            continue
        gpus = [p.gpus for p in line]
        rates = [p.planned.tokens_per_second_per_gpu * p.gpus for p in line]
        style = {"color": COLOURS[kind], "marker": MARKERS[kind], "markersize": 4, "label": kind}
        left.plot(gpus, rates, **style)
        right.plot(gpus, [100 * p.planned.mfu for p in line], **style)
    first = min(found, key=lambda p: p.gpus)
    most = max(p.gpus for p in found)
    ideal = [first.planned.tokens_per_second_per_gpu * gpus for gpus in (first.gpus, most)]
    left.plot([first.gpus, most], ideal, color="#777777", linestyle="--", linewidth=1, label="ideal")
    left.set_yscale("log")
    right.set_ylim(bottom=0)
    _finish(left, "tokens/s of all GPUs")
    _finish(right, "MFU, %")
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def _finish(axes: Axes, label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("GPUs")
    axes.set_ylabel(label)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.tick_params(labelsize=8)
