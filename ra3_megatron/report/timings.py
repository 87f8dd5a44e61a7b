"""The table "Where the time goes": mean seconds a step in each part of it, phase by phase."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ra3_megatron.report.metrics import PARTS
from ra3_megatron.report.numbers import ABSENT, step_time, whole_percent
from ra3_megatron.report.plots import PHASE_TITLES

MEMORY = ("peak_memory_gib", "peak_rss_gib")


class TimeTable(NamedTuple):
    """Titles of the phases, a column each; of each row its name and cells (a figure, and one beside it or "")."""

    columns: list[str]
    rows: list[tuple[str, list[tuple[str, str]]]]


def time_table(records: Sequence[Mapping[str, Any]]) -> TimeTable:
    """The table of all steps that were logged with their parts; no rows when none was."""
    phases: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if "seconds_other" in record:
            phases.setdefault(record["phase"], []).append(record)
    parts = [part for part in PARTS if any(f"seconds_{part}" in r for steps in phases.values() for r in steps)]
    names = ["steps", "a step", *(part.replace("_", " ") for part in parts), "checkpoints", "peak memory"]
    cells = zip(*(_cells(of, parts) for of in phases.values()), strict=True)
    rows = [(name, list(row)) for name, row in zip(names, cells, strict=True)] if phases else []
    return TimeTable([PHASE_TITLES.get(name, name) for name in phases], rows)


def _covered(steps: list[Mapping[str, Any]]) -> int:
    """Steps that were taken, logged or not: saving is logged behind the next step that is."""
    last: dict[int, int] = {}
    for step in steps:
        last[step["iteration"]] = max(last.get(step["iteration"], 0), step["step"])
    return sum(last.values())


def _cells(steps: list[Mapping[str, Any]], parts: list[str]) -> list[tuple[str, str]]:
    def mean(name: str) -> float | None:
        found = [step[name] for step in steps if name in step]
        return sum(found) / len(steps) if found else None

    whole = mean("seconds") or 0.0
    cells = [(str(len(steps)), ""), (step_time(whole), "")]
    for part in parts:
        seconds = mean(f"seconds_{part}")
        cells.append((ABSENT, "") if seconds is None else (whole_percent(seconds / whole), step_time(seconds)))
    saving = sum(step.get("seconds_checkpoint", 0.0) for step in steps)
    cells.append((step_time(saving / _covered(steps)), ""))
    memory = max((step[name] for step in steps for name in MEMORY if name in step), default=None)
    return [*cells, (ABSENT if memory is None else f"{memory:.2f} GiB", "")]
