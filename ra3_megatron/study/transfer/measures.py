"""Figures of each start, and its differences from a reference, paired by seed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ra3_megatron.report.numbers import ABSENT, count, duration, number, percent
from ra3_megatron.study.intervals import t_interval
from ra3_megatron.study.results import seeds_of_means, with_shared_seeds
from ra3_megatron.study.tables import Table
from ra3_megatron.study.transfer.curves import LEVELS, Curve, Run, by_start

Read = Callable[[Curve], float | None]


@dataclass(frozen=True)
class Measure:
    """One figure of a curve. None: the level was never reached."""

    title: str
    read: Read
    write: Callable[[float], str]
    budget: Read | None = None
    """Of a figure that is None where a level was never reached: all that was spent on the way."""


def _reached(level: float, axis: str) -> Read:
    return lambda curve: curve.reached(level, axis)


def _spent(axis: str) -> Read:
    return lambda curve: float(getattr(curve, axis)[-1])


MEASURES: list[Measure] = [
    Measure("start", lambda c: c.rate[0], percent),
    *(
        Measure(
            f"{axis} to {level:.0%}",
            _reached(level, axis),
            {"steps": lambda v: number(v, 1), "tokens": count, "seconds": duration}[axis],
            _spent(axis),
        )
        for level in LEVELS
        for axis in ("steps", "tokens", "seconds")
    ),
    Measure("area", lambda c: c.area, lambda v: number(v, 3)),
    Measure("asymptote", lambda c: c.asymptote, percent),
    Measure("groups with a signal", lambda c: sum(c.signal) / len(c.signal) if c.signal else None, percent),
]


def transfer_table(runs: Sequence[Run]) -> Table:
    """Means of each start over the seeds that all of them have."""
    rows = []
    for start, members in by_start(with_shared_seeds(runs)).items():
        cells = []
        for measure in MEASURES:
            found = [value for run in members if (value := measure.read(run.curve)) is not None]
            if not found:
                cells.append("never" if measure.budget else ABSENT)
                continue
            text = measure.write(sum(found) / len(found))
            cells.append(text if len(found) == len(members) else f"{text} ({len(found)} of {len(members)})")
        rows.append([start, str(len(members)), *cells])
    return Table(
        "RLVR from each start",
        ["start", "seeds", *(measure.title for measure in MEASURES)],
        rows,
        f"{seeds_of_means(runs, 'start')}. Rates are pass@1 on the held-out problems, sampled. Steps, sampled "
        "tokens and seconds of training to a rate: where the curve first reaches it, linear between evaluations (in "
        "brackets: in how many of the seeds it ever did; the mean is over those). Area: mean rate over the updates. "
        "Asymptote: mean of the last quarter. Groups with a signal: training groups whose rewards differed.",
    )


def differences_table(runs: Sequence[Run], references: Mapping[str, str]) -> Table:
    """Each start minus its reference: mean over seeds that both have, with Student's 95% interval. Starts that
    `references` does not name are left out."""
    groups = by_start(runs)
    rows = []
    for start, reference in references.items():
        base = {run.cell.seed: run.curve for run in groups.get(reference, [])}
        shared = [run for run in groups.get(start, []) if run.cell.seed in base]
        if not shared:
            continue
        cells = []
        for measure in MEASURES:
            found = [difference(measure, run.curve, base[run.cell.seed]) for run in shared]
            values = [value for value in found if value is not None]
            text = _interval(measure, values)
            cells.append(text if len(values) in (0, len(shared)) else f"{text} ({len(values)} of {len(shared)})")
        rows.append([f"{start} - {reference}", str(len(shared)), *cells])
    return Table(
        "Differences, paired by seed",
        ["", "seeds", *(measure.title for measure in MEASURES)],
        rows,
        "Mean over seeds with the 95% interval of Student's t (from three seeds on); rates in percentage points (pp). "
        "Where one of a pair never reached a level and both spent as much, all that was spent takes its place, which "
        "understates the difference. Where neither reached it, or what they spent differs (tokens and seconds mostly "
        "do), there is nothing to compare, and the pair is left out (in brackets: how many of the seeds are in).",
    )


def difference(measure: Measure, one: Curve, other: Curve) -> float | None:
    """A figure of one run minus that of another; None where there is nothing to compare.

    A level that one of them alone never reached counts as all that was spent, if both spent as much: otherwise even
    the sign would be that of the budgets.
    """
    a, b = measure.read(one), measure.read(other)
    if (a is None) != (b is None) and measure.budget is not None and measure.budget(one) == measure.budget(other):
        a, b = (measure.budget(one) if value is None else value for value in (a, b))
    return None if a is None or b is None else a - b


def _interval(measure: Measure, values: Sequence[float]) -> str:
    if not values:
        return ABSENT
    mean = sum(values) / len(values)
    ends = t_interval(values)
    signed = _signed(measure, mean)
    return signed if ends is None else f"{signed} [{_signed(measure, ends[0])}, {_signed(measure, ends[1])}]"


def _signed(measure: Measure, value: float) -> str:
    if measure.write is percent:
        return f"{100 * value:+.1f} pp"
    return ("-" if value < 0 else "+") + measure.write(abs(value))
