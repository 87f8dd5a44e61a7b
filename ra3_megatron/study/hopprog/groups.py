"""Groups of cells of a HopProg study with the truth of every held-out line, and figures of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ra3_megatron.config.load import load_config
from ra3_megatron.corpus.generated import Tasks
from ra3_megatron.report.held_out import DocumentFigures
from ra3_megatron.study.predictions import Estimate, estimate
from ra3_megatron.study.results import Finished, arms_only, by_group
from ra3_megatron.study.spec import BASE
from ra3_megatron.tasks import measures
from ra3_megatron.tasks.measures import Line, joined

PRICE = "estep.latent_price"


@dataclass(frozen=True)
class Group:
    """One arm and grid point: its held-out documents, lines of items alone, and these lines with the truth, by seed."""

    name: str
    point: Mapping[str, Any]
    documents: Mapping[int, list[DocumentFigures]]
    lines: Mapping[int, list[Line]]
    outside: Mapping[int, float | None] = field(default_factory=dict)
    """Share of the other lines (requests and the ending) with a thought, by seed."""

    @property
    def outside_rate(self) -> Estimate | None:
        """The same over seeds; None where a seed has no such lines."""
        values = [value for value in self.outside.values() if value is not None]
        return estimate(values) if len(values) == len(self.outside) else None

    def over_seeds(self, value: Callable[[list[Line]], float | None]) -> Estimate | None:
        """A figure of the lines, over seeds; None where a seed has none."""
        values = [value(lines) for lines in self.lines.values()]
        return estimate([v for v in values if v is not None]) if None not in values else None


def groups_of(done: Sequence[Finished]) -> dict[str, Group]:
    """Groups whose corpora are tasks, by name; `base` is the model that the arms start from, on the arms' tasks.

    A group whose primitive actions have parts of several lines has no truth line by line and is left out.
    """
    groups = by_group(arms_only(done))
    found = {name: _group(name, cells) for name, cells in groups.items()}
    if "ntp" in groups:
        found[BASE] = _group(BASE, groups["ntp"], iteration=0)
    return {name: group for name, group in found.items() if group.lines}


def _group(name: str, cells: Sequence[Finished], iteration: int | None = None) -> Group:
    """The figures after an EM iteration; None: the last one."""
    documents, lines, outside = {}, {}, {}
    for cell in cells:
        config = load_config(cell.folder / "config.yaml", resolved=True)
        held_out = cell.held_out(cell.last.iteration if iteration is None else iteration)
        if held_out and config.corpus.source == "tasks":
            tasks = Tasks(config.corpus)
            if config.text.granularity == "token":
                held_out = _by_line(held_out, tasks)
                if held_out is None:
                    continue
            outside[cell.cell.seed] = measures.outside_rate(held_out, tasks.task_named)
            by_document = [measures.lines_of([document], tasks.task_named) for document in held_out]
            lines[cell.cell.seed] = [line for found in by_document for line in found]
            documents[cell.cell.seed] = [
                replace(document, lines=[line.figures for line in found])
                for document, found in zip(held_out, by_document, strict=True)
            ]
    return Group(name, cells[0].cell.point, documents, lines, outside)


def _by_line(held_out: Sequence[DocumentFigures], tasks: Tasks) -> list[DocumentFigures] | None:
    found = []
    for document in held_out:
        task = tasks.task_named(document.document)
        lines = joined(document.lines, task.code.removeprefix(task.prompt).splitlines(keepends=True))
        if lines is None:
            return None
        found.append(replace(document, lines=lines))
    return found


def price_sweep(groups: Mapping[str, Group]) -> list[tuple[float, Group]]:
    """The groups of the arm `price`, from the cheapest thought to the dearest."""
    sweep = [(float(g.point[PRICE]), g) for name, g in groups.items() if name.startswith("price,") and PRICE in g.point]
    return sorted(sweep, key=lambda pair: pair[0])


def recall(lines: list[Line]) -> float:
    """Share of the boundaries with a thought."""
    return measures.selectivity(lines).recall


def recall_by_hops(group: Group) -> dict[int, float]:
    """The same by hops, over all seeds."""
    lines = [line for run in group.lines.values() for line in run]
    hops = sorted({line.truth.hops for line in lines})
    return {h: recall([line for line in lines if line.truth.hops == h]) for h in hops}


def item_accuracy(lines: list[Line]) -> float:
    """Share of items whose lines greedy decoding would all write, its thoughts in the context."""
    by_hops = measures.item_accuracy(lines, raw=False)
    counts = {hops: sum(line.truth.boundary and line.truth.hops == hops for line in lines) for hops in by_hops}
    return sum(by_hops[hops] * counts[hops] for hops in by_hops) / max(1, sum(counts.values()))


def thoughts_right(lines: list[Line]) -> float | None:
    """Share of the thoughts at boundaries that are right; None without any."""
    said = [line.right_thought for line in lines if line.truth.boundary and line.right_thought is not None]
    return sum(said) / len(said) if said else None
