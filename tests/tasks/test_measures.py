"""Ground-truth measures on held-out lines that are made by hand."""

import math
import re
from dataclasses import replace

import pytest

from ra3_megatron.config.tasks import TasksConfig
from ra3_megatron.report.held_out import DocumentFigures, LineFigures
from ra3_megatron.tasks import measures
from ra3_megatron.tasks.families import build_family
from ra3_megatron.tasks.task import Task

FAMILY = build_family(TasksConfig(min_items=2, max_items=3))
TASKS = [FAMILY.task(number, training=True) for number in range(40)]
BY_NAME = {task.name: task for task in TASKS}


def held_out(task: Task, thoughts: dict[int, str], nll: float = 0.1, raw: float = 0.5) -> DocumentFigures:
    """Lines of a task; thoughts: index of a line -> text."""
    texts = task.code.removeprefix(task.prompt).splitlines(keepends=True)
    lines = [
        LineFigures(
            text=text,
            thought=f"# {thoughts[n]}" if n in thoughts else None,
            offered=True,
            tokens=3,
            nll=nll,
            raw_nll=raw,
            greedy=True,
            raw_greedy=task.truth[n].hops == 0,
            layout_nll=0.0,
            raw_layout_nll=0.0,
        )
        for n, text in enumerate(texts)
    ]
    return DocumentFigures(document=task.name, sample=0, lines=lines)


def lines(thoughts_of: dict[str, dict[int, str]]) -> list[measures.Line]:
    documents = [held_out(BY_NAME[name], thoughts) for name, thoughts in thoughts_of.items()]
    return measures.lines_of(documents, BY_NAME.__getitem__)


def boundaries(task: Task) -> list[int]:
    return [n for n, truth in enumerate(task.truth) if truth.boundary]


def perfect() -> dict[str, dict[int, str]]:
    return {task.name: {n: task.truth[n].thought for n in boundaries(task)} for task in TASKS}


def test_thoughts_before_lines_outside_of_items_are_counted_by_themselves() -> None:
    """F1 is 1 of a model that thinks before every request and ending, too: this figure tells them apart."""

    def documents(also: bool) -> list[DocumentFigures]:
        found = []
        for task in TASKS:
            thoughts = {n: true.thought for n, true in enumerate(task.truth) if true.boundary}
            found.append(
                held_out(task, thoughts | {n: "x" for n, t in enumerate(task.truth) if also and t.item is None})
            )
        return found

    for also, share in ((False, 0.0), (True, 1.0)):
        held = documents(also)
        assert measures.selectivity(measures.lines_of(held, BY_NAME.__getitem__)).f1 == 1
        assert measures.outside_rate(held, BY_NAME.__getitem__) == share
    assert measures.outside_rate([], BY_NAME.__getitem__) is None


def test_only_lines_of_items_count() -> None:
    found = lines(perfect())
    assert len(found) == sum(len(item.lines) for task in TASKS for item in task.items)
    assert all(line.truth.item is not None for line in found)
    with pytest.raises(ValueError, match="its task"):
        by_length = sorted(TASKS, key=lambda task: len(task.truth))
        measures.lines_of([held_out(by_length[-1], {})], lambda name: by_length[0])


def test_a_policy_that_thinks_at_boundaries_alone_is_perfect() -> None:
    found = lines(perfect())
    chosen = measures.selectivity(found)
    assert (chosen.precision, chosen.recall, chosen.f1, chosen.inside_rate) == (1.0, 1.0, 1.0, 0.0)
    assert chosen.think_rate == chosen.boundary_rate == sum(len(t.items) for t in TASKS) / len(found)
    assert set(measures.thought_accuracy(found).values()) == {1.0}
    assert measures.durations(found) == {length: length for length in measures.durations(found)}
    information, entropy = measures.mutual_information(found)
    assert information == pytest.approx(entropy, abs=0.2) and entropy > 2.0


def test_selectivity_by_hand() -> None:
    task = next(t for t in TASKS if len(t.items[0].lines) >= 4)
    first, second = boundaries(task)[:2]
    chosen = measures.selectivity(lines({task.name: {first: "wrong", first + 1: "x"}}))
    total = sum(len(item.lines) for item in task.items)
    assert chosen.precision == 0.5 and chosen.recall == 1 / len(task.items)
    assert chosen.f1 == pytest.approx(2 * 0.5 * chosen.recall / (0.5 + chosen.recall))
    assert chosen.inside_rate == 1 / (total - len(task.items)) and second > first
    assert measures.thought_accuracy(lines({task.name: {first: "wrong"}})) == {task.items[0].hops: 0.0}
    assert measures.durations(lines({task.name: {first: "a", first + 2: "b"}})) == {len(task.items[0].lines): 2.0}


def test_without_thoughts() -> None:
    found = lines({task.name: {} for task in TASKS})
    chosen = measures.selectivity(found)
    assert (chosen.precision, chosen.recall, chosen.f1, chosen.think_rate) == (1.0, 0.0, 0.0, 0.0)
    assert measures.thought_accuracy(found) == {} and measures.durations(found) == {}
    assert measures.mutual_information(found) == (0.0, 0.0)


def test_accuracies_and_nats() -> None:
    found = lines(perfect())
    assert measures.first_line_accuracy(found, raw=True) == {h: float(h == 0) for h in range(4)}
    assert measures.item_accuracy(found, raw=True) == {h: float(h == 0) for h in range(4)}
    assert set(measures.item_accuracy(found, raw=False).values()) == {1.0}
    assert measures.nats_a_line(found) == pytest.approx(0.1)
    assert set(measures.nats_by_place(found, raw=True).values()) == {0.5}
    gains = measures.gain_by_hops(found)
    lengths = {h: [len(i.lines) for t in TASKS for i in t.items if i.hops == h] for h in gains}
    assert gains == pytest.approx({h: 0.4 * sum(v) / len(v) for h, v in lengths.items()})


def test_information_of_thoughts_that_say_nothing_is_small() -> None:
    found = lines({task.name: dict.fromkeys(boundaries(task), "same") for task in TASKS})
    information, entropy = measures.mutual_information(found)
    assert abs(information) < 0.05 and entropy < math.log(16) + 0.2


# -- primitive actions smaller than lines -----------------------------------------------------------------------------


def cut(line: LineFigures) -> list[LineFigures]:
    """Its words, and the white space between them, which costs nothing; the thought stands before the first."""
    words = re.findall(r"\s+|\S+", line.text)
    share = 1 / sum(not word.isspace() for word in words)
    return [
        replace(
            line,
            text=word,
            thought=None if n else line.thought,
            tokens=1,
            nll=0.0 if word.isspace() else line.nll * share,
            raw_nll=0.0 if word.isspace() else line.raw_nll * share,
        )
        for n, word in enumerate(words)
    ]


def test_actions_smaller_than_lines_have_the_truth_of_their_line() -> None:
    for task in TASKS:
        whole = held_out(task, {n: task.truth[n].thought for n in boundaries(task)})
        texts = [line.text for line in whole.lines]
        found = measures.joined([action for line in whole.lines for action in cut(line)], texts)
        assert found is not None and [line.text for line in found] == texts
        assert [line.thought for line in found] == [line.thought for line in whole.lines]
        assert [line.nll for line in found] == pytest.approx([line.nll for line in whole.lines])
        assert sum(line.tokens for line in found) == sum(len(cut(line)) for line in whole.lines)


def test_actions_of_several_lines_have_no_truth() -> None:
    whole = held_out(TASKS[0], {})
    texts = [line.text for line in whole.lines]
    pairs = [replace(a, text=a.text + b.text) for a, b in zip(whole.lines[::2], whole.lines[1::2], strict=False)]
    assert measures.joined(pairs, texts) is None
    assert len(measures.joined(whole.lines[:3], texts) or []) == 3, "a document that was cut"
    with pytest.raises(ValueError, match="does not stand at character 0"):
        measures.joined(whole.lines[1:], texts)
