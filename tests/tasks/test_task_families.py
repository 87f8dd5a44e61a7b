"""Every family: valid programs, tests that tell programs apart, and a truth that the prompt's text confirms."""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from math import sqrt
from typing import Any, get_args

import numpy as np
import pytest
from solving import SOLVERS, tables

from ra3_megatron.config.tasks import Family, TasksConfig
from ra3_megatron.tasks.families import build_family
from ra3_megatron.tasks.problems import Problem, problem
from ra3_megatron.tasks.task import Item, Task
from ra3_megatron.text.segment import segment, strip_comment_lines

FAMILIES: tuple[Family, ...] = get_args(Family)
PROGRAMS = tuple(family for family in FAMILIES if family != "equations")
SETTINGS: list[tuple[Family, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    *((family, {"routine_lines": 3, "withheld": 4, "min_items": 2, "max_items": 5}) for family in PROGRAMS),
    *((family, {"symbols": 2, "min_hops": 0, "max_hops": 0}) for family in FAMILIES),
    ("hopprog", {"symbols": 10, "min_hops": 4, "max_hops": 12}),
    ("stateprog", {"symbols": 3, "min_hops": 2, "max_hops": 9}),
    ("composition", {"symbols": 26, "min_hops": 1, "max_hops": 4, "max_items": 6}),
    ("equations", {"symbols": 10, "withheld": 5, "min_hops": 1, "max_hops": 8, "max_items": 5}),
]
over_settings = pytest.mark.parametrize(("family", "settings"), SETTINGS)
over_families = pytest.mark.parametrize("family", FAMILIES)

THOUGHTS = {
    "hopprog": r"\d+[A-P]",
    "stateprog": r"\d+[A-P]",
    "composition": r"0[a-z]([12][a-z])*[12][A-P]",
    "equations": r"\d(\d\d)*\d",
}
"""What a thought looks like, right or not."""


def tasks(family: Family, count: int, training: bool = True, **settings: Any) -> Iterator[Task]:
    built = build_family(TasksConfig(family=family, **settings))
    return (built.task(number, training) for number in range(count))


def items(family: Family, count: int, training: bool = True, **settings: Any) -> list[Item]:
    return [item for task in tasks(family, count, training, **settings) for item in task.items]


def passes(given: Problem, completion: str) -> bool:
    space: dict[str, object] = {}
    exec(given.prompt + completion, space)
    try:
        for test in given.tests:
            exec(test, space)
    except Exception:
        return False
    return True


def within_binomial(found: int, trials: int, share: float) -> bool:
    """Within five standard deviations."""
    return abs(found - trials * share) <= 5 * sqrt(trials * share * (1 - share))


# -- programs ---------------------------------------------------------------------------------------------------------


@over_settings
def test_programs_pass_their_own_tests(family: Family, settings: dict[str, Any]) -> None:
    built = build_family(TasksConfig(family=family, **settings))
    for number in range(30):
        task = built.task(number, training=True)
        compile(task.warm_text, task.name, "exec")
        given = problem(task, built)
        assert given.prompt + given.solution == task.code
        assert given.tests and given == problem(task, built)
        assert passes(given, given.solution)


@over_families
def test_programs_fail_the_tests_of_others(family: Family) -> None:
    """Two programs may do the same by chance; seldom."""
    built = build_family(TasksConfig(family=family))
    problems = [problem(built.task(number, training=True), built) for number in range(51)]
    fooled = sum(passes(mine, other.solution) for mine, other in pairwise(problems))
    assert fooled <= 5


@over_families
def test_tests_are_different_ones(family: Family) -> None:
    built = build_family(TasksConfig(family=family))
    for number in range(20):
        tests = problem(built.task(number, training=True), built).tests
        assert len(set(tests)) == len(tests)
        assert len(tests) == 1 if family == "equations" else len(tests) > 2


def test_equations_return_what_their_lines_state() -> None:
    for task in tasks("equations", 50, computable=False, symbols=10):
        space: dict[str, Any] = {}
        exec(task.code, space)
        stated = dict(zip(tables(task.prompt)["do"], (int(item.label) for item in task.items), strict=True))
        expected = tuple(stated.values())
        assert space["f"]() == (expected if len(expected) > 1 else expected[0])


# -- truth ------------------------------------------------------------------------------------------------------------


@over_settings
def test_comments_are_all_that_the_warm_text_adds(family: Family, settings: dict[str, Any]) -> None:
    commented = 0
    for task in tasks(family, 50, thought_share=0.6, junk_share=0.3, **settings):
        assert strip_comment_lines(task.warm_text) == task.code
        commented += task.warm_text != task.code
        lines = task.warm_text.count("\n") - task.code.count("\n")
        assert lines == len(task.comments)
    assert commented > 25


@over_settings
def test_truth_has_one_entry_for_each_primitive_action(family: Family, settings: dict[str, Any]) -> None:
    for task in tasks(family, 50, **settings):
        assert task.code.startswith(task.prompt)
        actions = segment(task.code.removeprefix(task.prompt), "line")
        assert len(actions) == len(task.truth)
        starts = {}
        for index, (action, truth) in enumerate(zip(actions, task.truth, strict=True)):
            if truth.item is None:
                requests = [f"{item.request}\n" for item in task.items]
                assert not truth.boundary
                assert action in requests or (action == task.ending and index == len(actions) - 1)
                continue
            item = task.items[truth.item]
            assert action == item.lines[truth.place] + "\n"
            assert (truth.thought, truth.hops, truth.label) == (item.thought, item.hops, item.label)
            if truth.boundary:
                starts[truth.item] = index
        assert list(starts) == list(range(len(task.items)))
        expected = 0
        for number, item in enumerate(task.items):
            assert starts[number] == expected + (item.request is not None)
            expected += len(item.lines) + (item.request is not None)


@over_settings
def test_the_prompt_alone_gives_the_truth(family: Family, settings: dict[str, Any]) -> None:
    for training in (True, False):
        for task in tasks(family, 100, training, **settings):
            solved = SOLVERS[family](task.prompt)
            assert [(s.thought, s.hops, s.label) for s in solved] == [(i.thought, i.hops, i.label) for i in task.items]


@over_settings
def test_items_and_hops_are_within_their_bounds(family: Family, settings: dict[str, Any]) -> None:
    config = TasksConfig(family=family, **settings)
    found = list(tasks(family, 300, **settings))
    assert {len(task.items) for task in found} == set(range(config.min_items, config.max_items + 1))
    hops = {item.hops for task in found for item in task.items}
    assert hops == set(range(config.min_hops, config.max_hops + 1))
    for task in found:
        for item in task.items:
            assert family == "equations" or config.routine_lines in (None, len(item.lines))
            assert re.fullmatch(THOUGHTS[family], item.thought)


def test_states_of_stateprog_are_one_cycle_and_share_routines() -> None:
    for task in tasks("stateprog", 50):
        transitions, routine_of = tables(task.prompt)["s"], tables(task.prompt)["r"]
        following = dict(zip(transitions[::2], transitions[1::2], strict=True))
        state, seen = "0", []
        for _ in following:
            seen.append(state)
            state = following[state]
        assert state == "0" and sorted(seen) == sorted(following)
        assert Counter(Counter(routine_of[1::2]).values()) == {2: 4}


def test_composition_asks_for_two_part_names() -> None:
    asked = [tables(task.prompt)["do"] for task in tasks("composition", 200, min_items=3)]
    assert 30 < sum(len(names) // 2 < 3 for names in asked) < 170


# -- numbers, seeds, splits -------------------------------------------------------------------------------------------


@over_families
def test_a_task_depends_on_nothing_but_its_number(family: Family) -> None:
    forward = list(tasks(family, 20))
    built = build_family(TasksConfig(family=family, count=3, first=7))
    assert [built.task(number, training=True) for number in reversed(range(20))] == forward[::-1]
    assert [task.name for task in forward] == [f"{family}#{number}" for number in range(20)]
    assert len({task.prompt for task in forward}) == 20
    other = list(tasks(family, 20, seed=1))
    assert not {task.prompt for task in other} & {task.prompt for task in forward}


@over_families
def test_tasks_are_the_same_in_every_process(family: Family) -> None:
    program = (
        "from ra3_megatron.config.tasks import TasksConfig\n"
        "from ra3_megatron.tasks.families import build_family\n"
        f"family = build_family(TasksConfig(family={family!r}, withheld=3))\n"
        "import sys\n"
        "sys.stdout.write(''.join(family.task(k, k % 2 == 0).warm_text for k in range(20)))"
    )
    built = build_family(TasksConfig(family=family, withheld=3))
    expected = "".join(built.task(number, number % 2 == 0).warm_text for number in range(20))
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == expected


@over_families
def test_what_the_warm_start_reads_does_not_change_the_programs(family: Family) -> None:
    plain = [task.code for task in tasks(family, 30)]
    other = [task.code for task in tasks(family, 30, thought_share=1.0, thought_hops=1, junk_share=0.5)]
    assert plain == other


@pytest.mark.parametrize(
    ("family", "labels"), [*((f, "ABCDEFGHIJKLMNOP") for f in PROGRAMS), ("equations", "0123456789")]
)
@pytest.mark.parametrize("computable", [True, False])
def test_withheld_routines_occur_in_the_held_out_split_only(family: Family, labels: str, computable: bool) -> None:
    settings = {"withheld": 3, "computable": computable}
    training = Counter(item.label for item in items(family, 600, training=True, **settings))
    held_out = Counter(item.label for item in items(family, 600, training=False, **settings))
    assert "".join(sorted(training)) == labels[:-3]
    assert "".join(sorted(held_out)) == labels
    for task in tasks(family, 200, training=True, **settings):
        assert not {item.thought[-1] for item in task.items} & set(labels[-3:])
        if family != "equations":
            assert not re.search("[NOP]", task.prompt)


# -- comments of the warm start ---------------------------------------------------------------------------------------


@over_families
@pytest.mark.parametrize("thought_hops", [None, 1])
def test_shares_of_thoughts(family: Family, thought_hops: int | None) -> None:
    share, junk = 0.4, 0.1
    offered = thought = inside = junked = 0
    for task in tasks(family, 800, thought_share=share, junk_share=junk, thought_hops=thought_hops):
        for number, item in enumerate(task.items):
            above = task.comments.get((number, 0))
            if thought_hops is None or item.hops <= thought_hops:
                offered += 1
                thought += above is not None
                assert above in (None, item.thought)
            else:
                assert above is None
            others = [
                task.comments[number, place] for place in range(1, len(item.lines)) if (number, place) in task.comments
            ]
            inside += len(item.lines) - 1
            junked += len(others)
            for comment in others:
                assert re.fullmatch(THOUGHTS[family], comment)
    assert within_binomial(thought, offered, share) and offered > 500
    assert within_binomial(junked, inside, junk)
    assert (inside == 0) == (family == "equations")


@pytest.mark.parametrize("most", [0, 2])
def test_plain_drills_have_few_hops_and_no_thoughts(most: int) -> None:
    shares = {"drill_share": 0.5, "plain_drill_share": 0.5, "plain_drill_hops": most, "junk_share": 0.0}
    drills = [task for task in tasks("hopprog", 400, min_hops=1, **shares) if len(task.items) == 8]
    plain = [task for task in drills if not task.comments]
    assert within_binomial(len(plain), len(drills), 0.5)
    assert {item.hops for task in plain for item in task.items} == set(range(most + 1))
    for task in drills:
        if task.comments:
            assert all(task.comments[number, 0] == item.thought for number, item in enumerate(task.items))
            assert {item.hops for item in task.items} <= {1, 2, 3}


@pytest.mark.parametrize("settings", [{}, {"min_hops": 2}, {"min_hops": 2, "plain_drill_hops": 1}])
def test_every_request_is_a_word_of_the_tokenizer(settings: dict[str, Any]) -> None:
    """Those of plain drills too, whose hops `min_hops` does not bound: one attention layer looks a request up."""
    drills = {"drill_share": 0.5, "plain_drill_share": 0.5}
    words = set(build_family(TasksConfig(family="hopprog", **drills, **settings)).words)
    asked = {(item.request or "").strip() for item in items("hopprog", 200, **drills, **settings)}
    assert asked <= words and {text.strip('"') for text in asked if "+" in text} <= words


def test_all_thoughts_of_a_drill_are_written() -> None:
    """`thought_hops` is about the other tasks."""
    made = list(tasks("hopprog", 200, drill_share=0.5, thought_share=1.0, thought_hops=1, junk_share=0.0))
    for task in made:
        hops = {item.hops for number, item in enumerate(task.items) if (number, 0) not in task.comments}
        assert not hops if len(task.items) == 8 else hops <= {2, 3}
    assert sum(len(task.items) == 8 for task in made) > 50


@over_families
def test_no_share_no_comments(family: Family) -> None:
    assert all(task.warm_text == task.code for task in tasks(family, 20, thought_share=0.0, junk_share=0.0))


def test_junk_says_nothing_about_its_item() -> None:
    for family in PROGRAMS:
        pairs = Counter(
            comment[-1] == task.items[number].label
            for task in tasks(family, 300, thought_share=0.0, junk_share=0.5)
            for (number, _), comment in task.comments.items()
        )
        assert within_binomial(pairs[True], pairs.total(), 1 / 16) and pairs.total() > 300


# -- the control ------------------------------------------------------------------------------------------------------


def dependence(found: list[Item]) -> tuple[float, int]:
    """Pearson's chi-square of (label that the thought ends with, label), and its degrees of freedom."""
    names = sorted({item.label for item in found})
    counts = np.zeros((len(names), len(names)))
    for item in found:
        counts[names.index(item.thought[-1]), names.index(item.label)] += 1
    expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / counts.sum()
    return float(((counts - expected) ** 2 / expected).sum()), (len(names) - 1) ** 2


@over_families
def test_without_computation_thoughts_and_what_follows_are_independent(family: Family) -> None:
    found = items(family, 2000, computable=False)
    statistic, freedom = dependence(found)
    assert abs(statistic - freedom) < 5 * sqrt(2 * freedom)
    said = sum(item.thought[-1] == item.label for item in found)
    assert within_binomial(said, len(found), 1 / (10 if family == "equations" else 16))
    statistic, freedom = dependence(items(family, 300))
    assert statistic > 10 * freedom


@over_families
def test_without_computation_thoughts_still_say_what_the_tables_say(family: Family) -> None:
    for task in tasks(family, 100, computable=False):
        solved = SOLVERS[family](task.prompt)
        assert [(s.thought, s.hops) for s in solved] == [(item.thought, item.hops) for item in task.items]


@over_families
def test_labels_are_about_uniform(family: Family) -> None:
    """Blind, an item costs log 16 (a value: log 10) nats. Items of a task depend on each other: one of each."""
    found = Counter(task.items[0].label for task in tasks(family, 3000, min_items=1, max_items=1))
    kinds = 10 if family == "equations" else 16
    assert len(found) == kinds
    shares = np.array(list(found.values())) / found.total()
    assert np.log(kinds) - 0.02 < -(shares * np.log(shares)).sum() <= np.log(kinds)


def test_a_label_names_its_lines() -> None:
    for family in PROGRAMS:
        lines = {(item.label, item.lines) for item in items(family, 300)}
        assert len(lines) == 16
