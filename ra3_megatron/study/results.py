"""What came out of a study: one row a cell and EM iteration, from the summaries of the cells that are done.

`results.jsonl` is always written as a whole from the cells' own files, so it holds whatever is done, in the order of
the study. Cumulative figures (tokens, time, FLOPs) are up to the iteration; iteration 0 is the warm start.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ra3_megatron.report.held_out import DocumentFigures, lines_file, read_held_out
from ra3_megatron.report.run_folder import write_text
from ra3_megatron.report.summary import Arm, Summary, read_summary
from ra3_megatron.study.flops import known_flops
from ra3_megatron.study.measures import MEASURES
from ra3_megatron.study.plan import Cell
from ra3_megatron.study.spec import BASE
from ra3_megatron.study.state import json_value, stage

RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Row:
    """One cell after one EM iteration."""

    cell: str
    """Name of the cell."""
    arm: str
    """Its arm."""
    point: Mapping[str, Any]
    """Its grid point."""
    seed: int
    """Its seed."""
    iteration: int
    """EM iteration; 0: the model that it starts from."""
    figures: Mapping[str, float | None]
    """Measures by name (`MEASURES`)."""

    def json(self) -> dict[str, Any]:
        """As in `results.jsonl`."""
        grid = {key: json_value(value) for key, value in self.point.items()}
        head = {"cell": self.cell, "arm": self.arm, "grid": grid, "seed": self.seed, "iteration": self.iteration}
        return {**head, **self.figures}


@dataclass(frozen=True)
class Finished:
    """A cell that is done."""

    cell: Cell
    folder: Path
    """Its folder."""
    summary: Summary
    rows: list[Row]
    """The model that it starts from, then each EM iteration."""

    @property
    def last(self) -> Row:
        """After the last EM iteration."""
        return self.rows[-1]

    def held_out(self, iteration: int) -> list[DocumentFigures] | None:
        """Its held-out documents line by line after an EM iteration (0: the start); None when they were not kept."""
        arm = "base" if iteration == 0 else self.summary.method
        file = lines_file(self.folder, arm, iteration)
        return read_held_out(file) if file.is_file() else None


def finished(study: Path, cells: Sequence[Cell]) -> list[Finished]:
    """The cells that are done, in their order. UserError when one has a damaged summary."""
    found = []
    for cell in cells:
        folder = cell.folder(study)
        if stage(folder) == "done":
            summary = read_summary(folder)
            found.append(Finished(cell, folder, summary, _rows(cell, summary)))
    return found


def write_results(study: Path, done: Sequence[Finished]) -> Path:
    """Write `results.jsonl`; its path. The base runs are in it too, under the arm `base`."""
    lines = (json.dumps(row.json(), ensure_ascii=False, allow_nan=False) + "\n" for cell in done for row in cell.rows)
    path = study / RESULTS
    write_text(path, "".join(lines))
    return path


def arms_only(done: Sequence[Finished]) -> list[Finished]:
    """Without the base runs."""
    return [cell for cell in done if cell.cell.arm != BASE]


def by_group(done: Sequence[Finished]) -> dict[str, list[Finished]]:
    """Finished cells by arm and grid point; those of a group differ in their seed."""
    groups: dict[str, list[Finished]] = {}
    for cell in done:
        groups.setdefault(cell.cell.group, []).append(cell)
    return groups


class OfCell(Protocol):
    """What a cell left."""

    @property
    def cell(self) -> Cell:
        """The cell."""


Done = TypeVar("Done", bound=OfCell)


def shared_seeds(done: Sequence[OfCell]) -> set[int]:
    """Seeds that every arm and grid point has."""
    seeds: dict[str, set[int]] = {}
    for one in done:
        seeds.setdefault(one.cell.group, set()).add(one.cell.seed)
    return set.intersection(*seeds.values()) if seeds else set()


def with_shared_seeds(done: Sequence[Done]) -> list[Done]:
    """The cells of those seeds that every arm and grid point has, so that means compare; all cells if there is none."""
    shared = shared_seeds(done)
    return [one for one in done if one.cell.seed in shared] if shared else list(done)


def seeds_of_means(done: Sequence[OfCell], arm: str = "arm") -> str:
    """Over which seeds the means of these cells are, for a note; arm: what the groups are called."""
    if shared_seeds(done):
        return f"Means over the seeds that every {arm} has"
    return f"Means over seeds that differ from {arm} to {arm}, as none is done of all: they do not compare"


def _rows(cell: Cell, summary: Summary) -> list[Row]:
    phases = {name: asdict(phase) for name, phase in summary.phases.items()}

    def row(iteration: int, arm: Arm) -> Row:
        values = asdict(arm)
        figures = {name: values.get(name) for name in MEASURES if name != "flops"}
        figures["flops"] = known_flops(phases, summary.method, iteration)
        return Row(cell.name, cell.arm, cell.point, cell.seed, iteration, figures)

    mine = [entry for entry in summary.iterations if entry.arm == summary.method]
    return [row(0, summary.base), *(row(entry.iteration, entry) for entry in mine)]
