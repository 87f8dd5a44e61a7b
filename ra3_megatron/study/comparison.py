"""What a study says: figures of each arm and grid point, their differences from the reference, and EM step by step."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from ra3_megatron.config.errors import UserError
from ra3_megatron.report.held_out import DocumentFigures
from ra3_megatron.study.intervals import LINE_MEASURES, Interval, paired_difference, side_of
from ra3_megatron.study.plan import Cell, match_point
from ra3_megatron.study.results import Finished, by_group
from ra3_megatron.study.spec import BASE, StudyConfig

FALL = "token_nll"
"""Held-out measure by which an M-step is judged line by line."""


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of the values that there are; None without any."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def reference_of(study: StudyConfig, cells: Sequence[Cell]) -> dict[str, str]:
    """For each group the group that it is compared with; groups without one, and the reference itself, are left out.

    Raises UserError when `reference` names neither an arm nor a group.
    """
    name = study.reference if study.reference is not None else ("ntp" if "ntp" in study.arms else None)
    if name is None:
        return {}
    groups = {cell.group: cell for cell in cells if study.base is None or cell.arm != BASE}
    if name not in study.arms and name not in groups:
        raise UserError(f"reference={name}: must be an arm ({', '.join(study.arms)}) or one of {', '.join(groups)}")
    candidates = [groups[name]] if name in groups else [cell for cell in groups.values() if cell.arm == name]
    found = {}
    for group, cell in groups.items():
        match = match_point(cell.point, candidates)
        if match is not None and group not in {candidate.group for candidate in candidates}:
            found[group] = match.group
    return found


def first_reference(study: StudyConfig, cells: Sequence[Cell]) -> str | None:
    """The group that others are compared with (the first one, if there are several); None without any."""
    return next(iter(reference_of(study, cells).values()), None)


@dataclass(frozen=True)
class Difference:
    """One group against its reference."""

    group: str
    reference: str
    intervals: dict[str, Interval]
    """By measure of `LINE_MEASURES`."""


def differences(study: StudyConfig, cells: Sequence[Cell], done: Sequence[Finished]) -> list[Difference]:
    """Every group that shares seeds and held-out documents with its reference, after the last EM iteration of each."""
    groups = by_group(done)
    last = {group: _held_out(members, None) for group, members in groups.items()}
    found = []
    for group, reference in reference_of(study, cells).items():
        a, b = last.get(group, {}), last.get(reference, {})
        if a.keys() & b.keys():
            with suppress(ValueError):  # no document in common: the arms have other corpora
                intervals = {name: paired_difference(a, b, name) for name in LINE_MEASURES}
                found.append(Difference(group, reference, intervals))
    return found


def _held_out(members: Sequence[Finished], iteration: int | None) -> dict[int, list[DocumentFigures]]:
    """Held-out documents by seed after an iteration (None: the last one), where they were kept."""
    found = {}
    for member in members:
        number = member.last.iteration if iteration is None else iteration
        documents = member.held_out(number)
        if documents and any(row.iteration == number for row in member.rows):
            found[member.cell.seed] = documents
    return found


@dataclass(frozen=True)
class MStepCheck:
    """Whether one M-step lowered the held-out cross-entropy of code."""

    group: str
    iteration: int
    before: float
    """Code cross-entropy before, nats/token; mean over seeds."""
    after: float
    """Behind it."""
    interval: Interval | None
    """After minus before in nats per visible token, paired by seed and document."""

    @property
    def verdict(self) -> str:
        """In words: which way it went where the intervals leave out 0 on that side."""
        change = self.after - self.before
        text = f"fell by {-change:.4f}" if change < 0 else f"rose by {change:.4f}"
        if self.interval is None:
            return f"{text} (no interval)"
        if change == 0 or side_of(self.interval) != ("lower" if change < 0 else "higher"):
            return "not told apart"
        return text if self.interval.seeds_low is not None else f"{text} (these seeds)"


def mstep_checks(done: Sequence[Finished]) -> list[MStepCheck]:
    """Each M-step of each group, over the seeds that have it."""
    checks = []
    for group, members in by_group(done).items():
        figures = [{row.iteration: row.figures["code_ce"] for row in member.rows} for member in members]
        for iteration in range(1, max(max(per_seed) for per_seed in figures) + 1):
            pairs = [(f[iteration - 1], f[iteration]) for f in figures if iteration in f]
            before, after = (mean_of([pair[place] for pair in pairs]) for place in (0, 1))
            if before is None or after is None:
                continue
            a, b = _held_out(members, iteration), _held_out(members, iteration - 1)
            interval = paired_difference(a, b, FALL) if a.keys() & b.keys() else None
            checks.append(MStepCheck(group, iteration, before, after, interval))
    return checks
