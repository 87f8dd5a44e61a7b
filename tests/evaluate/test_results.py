"""Results and comparisons of them; files of samples: what is used again, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from made import results, tasks
from scipy import stats

from ra3_megatron.config.errors import UserError
from ra3_megatron.evaluate import compare, sample_files
from ra3_megatron.evaluate.results import HEADINGS, earlier_suites, markdown_page, read_results, table_rows
from ra3_megatron.evaluate.samples import Sample
from ra3_megatron.verbs import evaluate as verb


def test_figures_of_a_mode() -> None:
    mode = results([[1, 1], [1, 0], [0, 0], [0, 0]])["suites"]["humaneval"]["modes"]["think"]
    assert mode["estimates"]["passed"]["pass@1"]["value"] == pytest.approx((1 + 0.5) / 4)
    assert mode["counts"]["passed"] == {
        "HumanEval/0": [2, 2],
        "HumanEval/1": [2, 1],
        "HumanEval/2": [2, 0],
        "HumanEval/3": [2, 0],
    }
    assert mode["solved_tasks"] == {"passed": 2}
    assert mode["tokens"] == {"sampled": 80, "thought": 32, "per_sample": 10.0, "per_right_sample": 80 / 3}
    assert mode["most_said"][0] == ["failed", 5]


def test_the_tables() -> None:
    made = results([[1], [0], [0], [0]])
    (row,) = table_rows(made)
    assert row[:5] == ["humaneval (4 of 164)", "think", "passed", "pass@1", "25.0%"]
    assert len(row) == len(HEADINGS)
    page = markdown_page(made)
    assert "think: 1 samples a task, temperature 0.5, top-p 0.95, seed 7, at most 64 tokens." in page
    assert page.count("\n| ") >= 2 and "humaneval" in page and "Stops" in page
    assert all(line.count("|") == len(HEADINGS) + 1 for line in page.splitlines() if line.startswith("|"))


def test_a_comparison_against_scipy() -> None:
    a = results([[int(place < 10)] for place in range(40)])
    b = results([[int(place < 8 or 10 <= place < 20)] for place in range(40)])
    (row,) = compare.compare(a, b)
    assert (row["a"], row["b"], row["value"]) == pytest.approx((0.25, 0.45, 0.2))
    assert (row["only_a"], row["only_b"]) == (2, 10)
    assert row["p_value"] == pytest.approx(stats.binomtest(2, 12, 0.5).pvalue)
    draws = stats.bootstrap(
        ([*[0] * 8, -1, -1, *[1] * 10, *[0] * 20],),
        lambda x, axis: x.mean(axis=axis),
        method="percentile",
        random_state=1,
    ).confidence_interval
    assert (row["low"], row["high"]) == pytest.approx((draws.low, draws.high), abs=0.03)
    assert len(compare.table_rows([row])[0]) == len(compare.HEADINGS)


@pytest.mark.parametrize("key", ["harness", "data_sha256", "prompts_sha256", "stops"])
def test_what_was_not_run_alike_is_not_compared(key: str) -> None:
    a, b = results([[1], [0]]), results([[1], [0]], **{key: "another"})
    with pytest.raises(UserError, match=rf"^suite humaneval: A and B have another {key} "):
        compare.compare(a, b)


def test_other_suites_modes_and_settings_are_not_compared() -> None:
    a, b = results([[1], [0]]), results([[1], [0]])
    b["suites"]["mbpp"] = b["suites"].pop("humaneval")
    with pytest.raises(UserError, match=r"^no suite in common: A has humaneval, B has mbpp$"):
        compare.compare(a, b)
    b = results([[1], [0]])
    b["suites"]["humaneval"]["modes"]["think"]["temperature"] = 0.9
    with pytest.raises(UserError, match=r"A and B have another temperature"):
        compare.compare(a, b)
    modes = b["suites"]["humaneval"]["modes"]
    modes["no-think"] = modes.pop("think")
    with pytest.raises(UserError, match=r"^no mode with the same number k"):
        compare.compare(a, b)


def test_tokens_per_right_sample_do_not_grow_with_the_number_of_samples() -> None:
    """Ten times as many samples, of which the same share is right, each of 10 tokens."""
    found = []
    for row in ([1, 0], [1, 0] * 10):
        tokens = results([row, row])["suites"]["humaneval"]["modes"]["think"]["tokens"]
        found.append(tokens["per_right_sample"])
    assert found == [20.0, 20.0]
    none = results([[0], [0]])["suites"]["humaneval"]["modes"]["think"]["tokens"]
    assert none["per_right_sample"] is None and "tokens/right sample" in HEADINGS


def two_modes(think: list[list[int]], without: list[list[int]]) -> dict[str, Any]:
    """Results of HumanEval with both modes."""
    made, other = results(think), results(without)
    made["suites"]["humaneval"]["modes"]["no-think"] = other["suites"]["humaneval"]["modes"]["think"]
    return made


def test_two_modes_of_one_model_are_compared_task_by_task(tmp_path: Path) -> None:
    think = [[int(place < 10)] for place in range(40)]
    without = [[int(place < 8 or 10 <= place < 20)] for place in range(40)]
    made = two_modes(think, without)
    (row,) = compare.compare_modes(made, "think", "no-think")
    (paired,) = compare.compare(results(think), results(without))
    assert row == {**paired, "mode": "think, no-think"}, "as two files with one mode each"
    (back,) = compare.compare_modes(made, "no-think", "think")
    assert back["value"] == -row["value"] and (back["only_a"], back["only_b"]) == (10, 2)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(made))
    assert verb.compare(file, None, ("think", "no-think")) == [row]


def test_modes_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results([[1], [0]])))
    refused = [
        (
            (file, file, ("think", "no-think")),
            f"--modes=think,no-think: compares two modes of one results file: leave out {file}",
        ),
        ((file, None, ("think",)), "--modes=think: must be two modes such as think,no-think"),
        ((file, None, ("think", "think")), "--modes=think,think: must be two modes such as think,no-think"),
        ((file, None, ("think", "no-think")), "--modes=think,no-think: no suite has both modes: humaneval has think"),
        ((file, None, ()), "ra3 eval compare needs two results files, or one and --modes think,no-think"),
    ]
    for given, why in refused:
        with pytest.raises(UserError) as error:
            verb.compare(*given)
        assert str(error.value) == why
    made = two_modes([[1], [0]], [[1], [0]])
    made["suites"]["humaneval"]["modes"]["no-think"]["max_new_tokens"] = 65
    with pytest.raises(UserError, match=r"A and B have another max_new_tokens \(64, 65\)"):
        compare.compare_modes(made, "think", "no-think")


def test_earlier_results_are_those_of_the_same_model(tmp_path: Path) -> None:
    assert earlier_suites(tmp_path, "0" * 64) == {}
    made = results([[1], [0]])
    (tmp_path / "results.json").write_text(json.dumps(made))
    assert earlier_suites(tmp_path, "0" * 64) == made["suites"]
    with pytest.raises(UserError, match=r"holds results of another model \(000000000000, now 111111111111\)"):
        earlier_suites(tmp_path, "1" * 64)


def test_a_file_that_holds_no_results_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text("{}")
    with pytest.raises(UserError, match=r"not the results of ra3 eval"):
        read_results(tmp_path)
    with pytest.raises(UserError, match=r"cannot be read"):
        read_results(tmp_path / "nothing.json")


HEADER = {"suite": "humaneval", "model": "m" * 64, "data_sha256": "d"}


def test_samples_of_an_interrupted_call_are_used_again(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    assert sample_files.read_ours(file, HEADER) == []
    first, second = (
        Sample("a", completion="x\n", number=0, tokens=3, thought_tokens=1),
        Sample("b", solution="y", number=0),
    )
    sample_files.begin(file, HEADER, [first])
    sample_files.append(file, [second])
    with file.open("a") as torn:
        torn.write('{"task_id": "c", "comple')
    assert sample_files.read_ours(file, HEADER) == [first, second]


@pytest.mark.parametrize("key", list(HEADER))
def test_samples_of_something_else_are_not(key: str, tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    sample_files.begin(file, HEADER, [])
    before = file.read_bytes()
    with pytest.raises(UserError, match=rf"^{file}: holds samples of another {key} "):
        sample_files.read_ours(file, {**HEADER, key: "other"})
    assert file.read_bytes() == before
    file.write_text('{"task_id": "a", "completion": "x"}\n')
    with pytest.raises(UserError, match=r"has no header"):
        sample_files.read_ours(file, HEADER)


def test_given_samples_come_in_the_order_of_the_tasks(tmp_path: Path) -> None:
    file = tmp_path / "given.jsonl"
    names = ["HumanEval/1", "HumanEval/0", "HumanEval/1", "HumanEval/0"]
    file.write_text("".join(json.dumps({"task_id": n, "completion": str(i)}) + "\n" for i, n in enumerate(names)))
    samples, ours = sample_files.read_theirs(file, tasks(2))
    assert not ours and [(s.task_id, s.completion) for s in samples] == [
        ("HumanEval/0", "1"),
        ("HumanEval/0", "3"),
        ("HumanEval/1", "0"),
        ("HumanEval/1", "2"),
    ]


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([{"task_id": "Mbpp/2", "completion": ""}], "holds samples of Mbpp/2, which is no task of humaneval"),
        ([{"task_id": "HumanEval/0", "completion": ""}], "holds no sample of HumanEval/1 (1 of 2 tasks lack one)"),
        (
            [{"task_id": f"HumanEval/{n}", "completion": ""} for n in (0, 0, 1)],
            "holds 1 to 2 samples a task: must be equal",
        ),
        ([{"task_id": "HumanEval/0"}], "given.jsonl:1: must have task_id and one text"),
        (
            [{"task_id": "HumanEval/0", "completion": "", "solution": ""}],
            "given.jsonl:1: must have task_id and one text",
        ),
        (
            [{"task_id": f"HumanEval/{n}", "completion": "", "tokens": "many"} for n in (0, 1)],
            "given.jsonl:1: tokens=many: must be a whole number from 0",
        ),
        (
            [{"task_id": "HumanEval/0", "completion": ""}, {"task_id": "HumanEval/1", "completion": "", "number": -1}],
            "given.jsonl:2: number=-1: must be a whole number from 0",
        ),
        (
            [{"task_id": "HumanEval/0", "completion": "", "thought_tokens": True}],
            "given.jsonl:1: thought_tokens=True: must be a whole number from 0",
        ),
        (
            [{"task_id": f"HumanEval/{n}", "solution": ""} for n in (0, 1)],
            "given.jsonl:1: solution: humaneval takes completions of its prompt alone",
        ),
        ([{"ra3_eval": {"suite": "mbpp+"}}], "samples of another suite (mbpp+, here humaneval)"),
        ([{"ra3_eval": {"suite": "humaneval", "data_sha256": "x"}}], "samples of another data_sha256"),
    ],
)
def test_given_samples_that_are_not_of_the_suite(rows: list[dict[str, object]], why: str, tmp_path: Path) -> None:
    file = tmp_path / "given.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=re.escape(why)) as refused:
        sample_files.read_theirs(file, tasks(2))
    assert "\n" not in str(refused.value)
