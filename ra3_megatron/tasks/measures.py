"""What ground truth says of a model's thoughts on held-out tasks. A rising reward proves nothing; this does.

Everything is computed from the held-out lines of a run (`report/held_out.py`) and the tasks that they were made from.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ra3_megatron.report.held_out import DocumentFigures, LineFigures
from ra3_megatron.tasks.task import LineTruth, Task


@dataclass(frozen=True)
class Line:
    """A held-out line with its truth."""

    figures: LineFigures
    truth: LineTruth
    document: str
    right_thought: bool | None
    """Whether the thought sampled here is the item's; None without one."""


def lines_of(documents: Iterable[DocumentFigures], task_named: Callable[[str], Task]) -> list[Line]:
    """All lines of these documents that belong to an item. ValueError when one is not the task it is named after."""
    found = []
    for document in documents:
        truth = task_named(document.document).truth
        if len(truth) < len(document.lines):
            raise ValueError(f"document {document.document} has {len(document.lines)} lines, its task {len(truth)}")
        for figures, true in zip(document.lines, truth, strict=False):
            if true.item is not None:
                said = None if figures.thought is None else figures.thought.lstrip("# ") == true.thought
                found.append(Line(figures, true, document.document, said))
    return found


def outside_rate(documents: Iterable[DocumentFigures], task_named: Callable[[str], Task]) -> float | None:
    """Share of the lines outside of items (requests and the ending) with a thought; None without such lines."""
    found = [
        figures.thought is not None
        for document in documents
        for figures, true in zip(document.lines, task_named(document.document).truth, strict=False)
        if true.item is None
    ]
    return sum(found) / len(found) if found else None


def joined(actions: Sequence[LineFigures], lines: Sequence[str]) -> list[LineFigures] | None:
    """The figures of `lines` (of a document's code) from those of smaller primitive actions (`text.granularity=token`).

    Nats and tokens of a line's actions are summed; its thought is the first one before any of them. An action of white
    space alone belongs to the line behind it, or to the last one. None when an action has parts of several lines: it
    has no truth of its own then. Lines that a cut document does not reach are left out. ValueError when the actions say
    something else than the lines.
    """
    owners = [number for number, line in enumerate(lines) for char in line if not char.isspace()]
    visible = "".join("".join(lines).split())
    place = 0
    by_line: dict[int, list[LineFigures]] = {}
    for action in actions:
        text = "".join(action.text.split())
        if visible[place : place + len(text)] != text:
            raise ValueError(f"{action.text!r} does not stand at character {place} of the document's lines")
        touched = set(owners[place : place + len(text)]) or {owners[min(place, len(owners) - 1)]}
        if len(touched) > 1:
            return None
        by_line.setdefault(touched.pop(), []).append(action)
        place += len(text)
    if sorted(by_line) != list(range(len(by_line))):
        raise ValueError("the document has lines without visible text")
    return [_sum_of(parts, lines[number]) for number, parts in sorted(by_line.items())]


def _sum_of(parts: Sequence[LineFigures], text: str) -> LineFigures:
    return LineFigures(
        text=text,
        thought=next((part.thought for part in parts if part.thought is not None), None),
        offered=any(part.offered for part in parts),
        tokens=sum(part.tokens for part in parts),
        nll=sum(part.nll for part in parts),
        raw_nll=sum(part.raw_nll for part in parts),
        greedy=all(part.greedy for part in parts),
        raw_greedy=all(part.raw_greedy for part in parts),
        layout_nll=sum(part.layout_nll for part in parts),
        raw_layout_nll=sum(part.raw_layout_nll for part in parts),
        thought_nll=sum(part.thought_nll for part in parts),
    )


@dataclass(frozen=True)
class Selectivity:
    """Where thoughts before lines of items stand, against where items start. Thoughts before other lines are not in it:
    see `outside_rate`."""

    precision: float
    """Share of these thoughts that stand at boundaries (1 without any)."""
    recall: float
    """Share of boundaries with a thought."""
    f1: float
    """Harmonic mean of the two."""
    think_rate: float
    """Share of lines of items with a thought."""
    inside_rate: float
    """Share of lines inside items with a thought."""
    boundary_rate: float
    """Share of lines that are boundaries: the ideal think rate."""


def selectivity(lines: Sequence[Line]) -> Selectivity:
    """Precision, recall and F1 of thinking at true boundaries."""
    boundaries = sum(line.truth.boundary for line in lines)
    thoughts = sum(line.figures.thought is not None for line in lines)
    hits = sum(line.truth.boundary and line.figures.thought is not None for line in lines)
    precision = hits / thoughts if thoughts else 1.0
    recall = hits / boundaries if boundaries else 1.0
    inside = len(lines) - boundaries
    return Selectivity(
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        think_rate=thoughts / len(lines) if lines else 0.0,
        inside_rate=(thoughts - hits) / inside if inside else 0.0,
        boundary_rate=boundaries / len(lines) if lines else 0.0,
    )


def thought_accuracy(lines: Sequence[Line]) -> dict[int, float]:
    """Share of the thoughts at boundaries that are right, by hops; hops without any are left out."""
    return _by_hops(
        (line for line in lines if line.truth.boundary and line.right_thought is not None),
        lambda line: float(bool(line.right_thought)),
    )


def item_accuracy(lines: Sequence[Line], raw: bool) -> dict[int, float]:
    """Share of items whose lines greedy decoding would all write, by hops; raw: without thoughts."""
    items: dict[tuple[str, int | None, int], list[Line]] = defaultdict(list)
    for number, line in enumerate(lines):
        if line.truth.boundary:
            start = number
        items[line.document, line.truth.item, start].append(line)
    whole = [(group[0].truth.hops, all(_greedy(line, raw) for line in group)) for group in items.values()]
    return {
        hops: sum(right for h, right in whole if h == hops) / sum(h == hops for h, _ in whole)
        for hops in sorted({h for h, _ in whole})
    }


def first_line_accuracy(lines: Sequence[Line], raw: bool) -> dict[int, float]:
    """Share of items whose first line greedy decoding would write, by hops; raw: without thoughts."""
    return _by_hops((line for line in lines if line.truth.boundary), lambda line: float(_greedy(line, raw)))


def nats_by_place(lines: Sequence[Line], raw: bool) -> dict[int, float]:
    """Mean nats of a line by its place in the item; raw: without thoughts."""
    sums: dict[int, list[float]] = defaultdict(list)
    for line in lines:
        sums[line.truth.place].append(line.figures.raw_nll if raw else line.figures.nll)
    return {place: sum(values) / len(values) for place, values in sorted(sums.items())}


def nats_a_line(lines: Sequence[Line], raw: bool = False) -> float:
    """Mean nats of a line of an item (its visible tokens); raw: without thoughts."""
    return sum(line.figures.raw_nll if raw else line.figures.nll for line in lines) / len(lines)


def gain_by_hops(lines: Sequence[Line]) -> dict[int, float]:
    """Nats that a thought at the boundary saves its item (raw minus with thoughts), mean over items that have one, by
    hops; hops without any are left out."""
    saved: dict[int, list[float]] = defaultdict(list)
    thinking = False
    for line in lines:
        if line.truth.boundary:
            thinking = line.figures.thought is not None
            if thinking:
                saved[line.truth.hops].append(0.0)
        if thinking:
            saved[line.truth.hops][-1] += line.figures.raw_nll - line.figures.nll
    return {hops: sum(values) / len(values) for hops, values in sorted(saved.items())}


def durations(lines: Sequence[Line]) -> dict[int, float]:
    """Mean number of lines for which a thought at a boundary stays in force within its item, by the item's length."""
    spans: dict[int, list[int]] = defaultdict(list)
    run: list[Line] = []
    for line in [*lines, None]:
        if line is None or line.truth.boundary:
            if run and run[0].figures.thought is not None:
                stop = next((n for n, inner in enumerate(run) if n and inner.figures.thought is not None), len(run))
                spans[len(run)].append(stop)
            run = []
        if line is not None:
            run.append(line)
    return {length: sum(values) / len(values) for length, values in sorted(spans.items())}


def mutual_information(lines: Sequence[Line]) -> tuple[float, float]:
    """I(thought's last symbol; label) over thoughts at boundaries, and the entropy of the label there, nats.

    Plug-in estimates with the Miller-Madow correction; (0, 0) without thoughts.
    """
    pairs = [
        (line.figures.thought.rstrip()[-1:], line.truth.label)
        for line in lines
        if line.truth.boundary and line.figures.thought is not None
    ]
    if not pairs:
        return 0.0, 0.0
    said, label = _entropy(s for s, _ in pairs), _entropy(label for _, label in pairs)
    return said + label - _entropy(pairs), label


def _entropy(values: Iterable[object]) -> float:
    counts = Counter(values)
    total = sum(counts.values())
    plug_in = -sum(n / total * math.log(n / total) for n in counts.values())
    return plug_in + (len(counts) - 1) / (2 * total)


def _greedy(line: Line, raw: bool) -> bool:
    return line.figures.raw_greedy if raw else line.figures.greedy


def _by_hops(lines: Iterable[Line], value: Callable[[Line], float]) -> dict[int, float]:
    found: dict[int, list[float]] = defaultdict(list)
    for line in lines:
        found[line.truth.hops].append(value(line))
    return {hops: sum(values) / len(values) for hops, values in sorted(found.items())}
