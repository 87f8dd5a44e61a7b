"""LiveCodeBench and Codeforces: made tasks of the published schemas, right and wrong programs, refusals."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made import ADD, EQUAL, PAIRS, SPLIT, packed, write_rows

from ra3_megatron.config.errors import UserError
from ra3_megatron.evaluate.data import Tasks, load_tasks
from ra3_megatron.evaluate.generation import Writer
from ra3_megatron.evaluate.modes import Mode
from ra3_megatron.evaluate.samples import Sample, Score
from ra3_megatron.evaluate.scorers import GradedScorer, scorer_for
from ra3_megatron.evaluate.suites import SUITES
from ra3_megatron.rlvr.cutting import Cuts
from ra3_megatron.rlvr.problems import codeforces, livecodebench
from ra3_megatron.rlvr.problems.competition import competition_problems
from ra3_megatron.rlvr.sandbox import Isolation, Outcome, Program, Sandbox, Verdict

PAIRS_RIGHT = (
    "class Solution:\n    def pairs(self, row: List[int], twice: bool) -> List[List[int]]:\n"
    "        return [[a, b] for a, b in zip(row, row[1:])]\n"
)


def score(tasks: Tasks, *samples: tuple[str, str]) -> list[Score]:
    with scorer_for(tasks, Isolation.BUBBLEWRAP, 1) as scorer:
        assert scorer.references() == []
        return scorer.score([Sample(name, completion=text) for name, text in samples], True, lambda _: None)


def test_livecodebench_programs(tmp_path: Path) -> None:
    write_rows(tmp_path / "livecodebench" / "test.jsonl", [ADD, PAIRS])
    tasks = load_tasks(SUITES["livecodebench"], tmp_path)
    found = score(
        tasks,
        ("made_a", "a, b = map(int, input().split())\nprint(a + b)"),
        ("made_b", PAIRS_RIGHT),
        ("made_a", "print(3)"),
        ("made_b", PAIRS_RIGHT.replace("row[1:]", "row")),
        ("made_b", "class Solution:\n    pass"),
        ("made_b", f"So:\n```python\n{PAIRS_RIGHT}```\nIt gives\n```\n[]\n```\n"),
    )
    assert [s.scores["passed"] for s in found] == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0], [s.detail for s in found]
    assert found[2].detail.startswith("wrong") and "case 2" in found[2].detail, "the private test"
    assert found[4].detail.startswith("crashed")


def test_livecodebench_calls_one_object_or_a_function(tmp_path: Path) -> None:
    """As its own harness does: what a test leaves in the object is there in the next one."""
    write_rows(tmp_path / "livecodebench" / "test.jsonl", [PAIRS])
    keeps = (
        "class Solution:\n    def __init__(self):\n        self.kept = []\n\n    def pairs(self, row, twice):\n"
        "        self.kept += [[a, b] for a, b in zip(row, row[1:])]\n        return self.kept\n"
    )
    function = "def pairs(row, twice):\n    return [[a, b] for a, b in zip(row, row[1:])]\n"
    tasks = load_tasks(SUITES["livecodebench"], tmp_path)
    found = score(tasks, *(("made_b", text) for text in (PAIRS_RIGHT, keeps, function, function + "class Solution: 0")))
    assert [s.scores["passed"] for s in found] == [1.0, 0.0, 1.0, 0.0], [s.detail for s in found]
    assert "test 2" in found[1].detail, "the first is right"


def test_tests_are_read_once_for_all_samples_of_a_task(tmp_path: Path) -> None:
    write_rows(tmp_path / "livecodebench" / "test.jsonl", [ADD, PAIRS])
    tasks = load_tasks(SUITES["livecodebench"], tmp_path)
    read: list[str] = []

    def program(row: dict[str, Any], code: str) -> Program:
        read.append(row["question_id"])
        return livecodebench.program(row, code)

    scorer = GradedScorer(tasks, Isolation.BUBBLEWRAP, 1, livecodebench.prompt, program, livecodebench.limits)
    texts = [("made_b", PAIRS_RIGHT), ("made_a", "print(3)"), ("made_b", "1 /"), ("made_b", PAIRS_RIGHT + "#")]
    found = scorer.score([Sample(name, completion=text) for name, text in texts], True, lambda _: None)
    assert [s.scores["passed"] for s in found] == [1.0, 0.0, 0.0, 1.0] and sorted(read) == ["made_a", "made_b"]


def test_livecodebench_compares_as_its_own_code_does(tmp_path: Path) -> None:
    """Lines as text or as exact decimals; results as they are, but for a tuple around them."""
    case = {"input": "1\n", "output": "0.50 7\n\nyes no\n", "testtype": "stdin"}
    write_rows(
        tmp_path / "livecodebench" / "test.jsonl",
        [{**ADD, "public_test_cases": json.dumps([case]), "private_test_cases": "[]"}, PAIRS],
    )
    tasks = load_tasks(SUITES["livecodebench"], tmp_path)
    tuples = "class Solution:\n    def pairs(self, row, twice): return "
    right = [
        ("made_a", "print('0.50 7\\n\\nyes no')"),
        ("made_a", "print('5e-1  7.0\\n')\nprint(' yes no ')\nprint()"),
        ("made_b", tuples + "tuple(map(list, zip(row, row[1:])))"),
    ]
    wrong = [
        ("made_a", "print('0.50 7\\nyes no')"),
        ("made_a", "print('0.5000001 7\\n\\nyes no')"),
        ("made_a", "print('0.50 7\\n\\nyes  no')"),
        ("made_b", tuples + "list(zip(row, row[1:]))"),
    ]
    found = [s.scores["passed"] for s in score(tasks, *right, *wrong)]
    assert found == [1.0] * 3 + [0.0] * 4


def test_livecodebench_prompts_and_windows(tmp_path: Path) -> None:
    write_rows(tmp_path / "livecodebench" / "test2.jsonl", [ADD, PAIRS])
    suite = SUITES["livecodebench"]
    late = load_tasks(suite, tmp_path, window=("2024-08-01", None))
    assert late.ids == ["made_b"] and late.left_out == {"outside of the window of contest dates": 1}
    assert load_tasks(suite, tmp_path, window=("2024-05-04", "2024-09-01")).left_out == {}
    with pytest.raises(UserError, match=r"^livecodebench: no contest from 2025-01-01 to None$"):
        load_tasks(suite, tmp_path, window=("2025-01-01", None))
    with pytest.raises(UserError, match=r"^--since or --until=May: must be a day such as 2024-08-01$"):
        load_tasks(suite, tmp_path, window=("May", None))
    assert livecodebench.prompt(ADD) == "### Question\nPrint the sum of two numbers.\n\n### Answer\n\n"
    assert f"### Starter Code\n{PAIRS['starter_code']}\n\n### Answer\n\n" in livecodebench.prompt(PAIRS)


ANSWERS = (
    "print(1)\n",
    "Here's one:\n```python\n# think\nprint('''\n#.\n''')\n```\nDone.\n### Question\n```python\nprint(2)\n```\n",
    "It reads\n```text\n1 2\n```\nso\n```python\nprint(1)\n```\nand prints\n```\n1\n```\n",
    "print(1)\n### Question\nmore\n",
)


@pytest.mark.parametrize("suite", ["livecodebench", "codeforces"])
def test_an_answer_is_the_same_program_here_and_in_rlvr(suite: str, tmp_path: Path) -> None:
    rows = [ADD, PAIRS] if suite == "livecodebench" else [SPLIT, EQUAL]
    file = write_rows(tmp_path / suite / "test.jsonl", rows)
    tasks = load_tasks(SUITES[suite], tmp_path)
    problems, *_ = competition_problems(str(file), suite, None, 0)
    tokenizer: Any = SimpleNamespace(token_bytes=[bytes([byte]) for byte in range(256)] + [b""], special={}, eos=256)
    latents: Any = SimpleNamespace(name="comment", ALL=0)
    cuts = Cuts(problems, tokenizer, latents)
    settings: Any = SimpleNamespace(stop_ids=frozenset({256}))
    cutter = Writer(None, tokenizer, latents, None, tasks.suite, Mode.THINK, settings).cutter  # type: ignore[arg-type]
    graded: list[Program] = []

    class Opened(Sandbox):
        def grade(self, programs: Sequence[Program]) -> list[Outcome]:
            graded.extend(programs)
            return [Outcome(Verdict.WRONG, 0, 1, "", 0.0) for _ in programs]

    with pytest.MonkeyPatch.context() as patch, scorer_for(tasks, Isolation.BUBBLEWRAP, 1) as scorer:
        patch.setattr("ra3_megatron.evaluate.scorers.Sandbox", Opened)
        assert scorer.prompts() == [problem.prompt for problem in problems]
        for place, (name, problem) in enumerate(zip(tasks.ids, problems, strict=True)):
            ids = [list(answer.encode()) for answer in ANSWERS]
            assert [cutter.ended(problem.prompt, each) for each in ids] == [cuts.ended(place, each) for each in ids]
            samples = [Sample(name, completion=cutter.cut(problem.prompt, each).text) for each in ids]
            scorer.score(samples, True, lambda _: None)
            wanted = [problem.program(cuts.cut(place, each).text) for each in ids]
            assert graded == wanted and all("print" in each.code.removeprefix(problem.prelude) for each in wanted)
            graded.clear()


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode(), "it names builtins.print"),
        (base64.b64encode(zlib.compress(pickle.dumps([1]))).decode(), "the pickle holds a list, not a text"),
        ("%%%", "not base64 of zlib of a pickled text"),
        (base64.b64encode(b"plain").decode(), "not base64 of zlib of a pickled text"),
        (packed([{"input": "1"}]), "tests must be objects with input, output and testtype"),  # type: ignore[list-item]
        ("[1]", "tests must be objects"),
    ],
)
def test_tests_are_unpacked_without_executing_anything(text: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=why) as refused:
        livecodebench.program({**ADD, "private_test_cases": text}, "")
    assert str(refused.value).startswith("livecodebench, made_a: tests cannot be read: ")
    assert capsys.readouterr().out == ""


def test_a_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(livecodebench, "LARGEST", 1000)
    bomb = packed([{"input": "x" * 100_000, "output": "", "testtype": "stdin"}])
    with pytest.raises(ValueError, match=r"more than 1000 bytes"):
        livecodebench.decode_tests(bomb)


def test_a_function_name_is_a_name() -> None:
    row = {**PAIRS, "metadata": '{"func_name": "pairs(1); import os"}'}
    with pytest.raises(UserError, match=r"needs func_name and JSON tests"):
        livecodebench.program(row, "")


def test_codeforces_programs(tmp_path: Path) -> None:
    write_rows(tmp_path / "codeforces" / "test.jsonl", [SPLIT, EQUAL])
    tasks = load_tasks(SUITES["codeforces"], tmp_path)
    other = "n = int(input())\nprint(1, n - 1)"
    expected = "n = int(input())\nprint(n // 2, n - n // 2)"
    found = score(
        tasks,
        ("1/A", other),
        ("1/A", expected),
        ("1/A", "print(2, 3)"),
        ("2/B", other),
        ("2/B", expected),
        ("2/B", "1 /"),
    )
    assert [s.scores["passed"] for s in found] == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0], [s.detail for s in found]
    assert found[2].detail.startswith("wrong") and found[5].detail.startswith("crashed")


def test_what_cannot_be_graded_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        SPLIT,
        {**SPLIT, "id": "a", "official_tests_complete": False},
        {**SPLIT, "id": "b", "official_tests": []},
        {**SPLIT, "id": "c", "interaction_format": "ask"},
        {**SPLIT, "id": "d", "input_mode": "file"},
    ]
    write_rows(tmp_path / "codeforces" / "test.jsonl", rows)
    tasks = load_tasks(SUITES["codeforces"], tmp_path)
    assert tasks.ids == ["1/A"] and sorted(tasks.left_out) == [
        "interactive",
        "no official tests",
        "official tests incomplete",
        "reads a file",
    ]
    with pytest.raises(UserError, match=r"no task can be graded"):
        codeforces.choose(rows[1:])


def test_limits_are_the_tasks_own() -> None:
    limits = codeforces.limits(SPLIT)
    assert limits.cpu_seconds == 4.0 and limits.seconds > 2 * 4.0
    assert codeforces.limits({**SPLIT, "memory_limit": 1024.0}).memory_mib == 1280
    more = livecodebench.limits({**ADD, "private_test_cases": ADD["public_test_cases"]})
    assert more == livecodebench.limits(ADD)
    assert more.cpu_seconds == 6.0 and more.seconds > 2 * 6.0 and more.cpu_bound_of(2) >= 2 * 6, "a test has 6 seconds"
    assert codeforces.prompt(SPLIT).endswith("Example 1, output\n2 3\n\n### Answer\n\n")


def test_texts_that_no_utf8_can_hold_are_arguments_as_others(tmp_path: Path) -> None:
    test = {"input": '["\ud800"]\nfalse', "output": "[]", "testtype": "functional"}
    write_rows(tmp_path / "livecodebench" / "test.jsonl", [{**PAIRS, "public_test_cases": json.dumps([test])}])
    tasks = load_tasks(SUITES["livecodebench"], tmp_path)
    assert [s.scores["passed"] for s in score(tasks, ("made_b", PAIRS_RIGHT))] == [1.0]


def test_large_tests_have_room() -> None:
    """For what is expected, and beside the program: the runner holds the tests."""
    case = {"input": "x" * 3 * 2**20, "output": "7" * 9 * 2**20, "testtype": "stdin"}
    for module, row in (
        (livecodebench, {**ADD, "public_test_cases": json.dumps([case, case])}),
        (codeforces, {**SPLIT, "official_tests": [case, case]}),
    ):
        limits = module.limits(row)
        few = module.limits(ADD if module is livecodebench else SPLIT)
        assert limits.output_kib > 18 * 1024 and limits.memory_mib == few.memory_mib + 2 * 24


NESTED = "[" * 120 + "]" * 120


@pytest.mark.parametrize(
    ("suite", "row", "why"),
    [
        ("livecodebench", {"private_test_cases": "%%%"}, "livecodebench, made_a: tests cannot be read: not base64"),
        (
            "livecodebench",
            {key: '[{"input": "", "output": "", "testtype": "oral"}]' for key in ADD if key.endswith("_test_cases")},
            "livecodebench, made_a: tests of kind oral are not graded",
        ),
        (
            "livecodebench",
            {"public_test_cases": json.dumps([{"input": "x" * 40 * 2**20, "output": "", "testtype": "stdin"}])},
            "livecodebench, made_a: case 1 of a whole program: an input of 41943040 bytes, the sandbox can pass 334",
        ),
        (
            "livecodebench",
            {**PAIRS, "public_test_cases": json.dumps([{"input": NESTED, "output": "0", "testtype": "functional"}])},
            "livecodebench, made_b: the sandbox cannot pass a value nested more than 100 deep",
        ),
        (
            "codeforces",
            {"official_tests": [{"input": "", "output": "x" * 40 * 2**20}]},
            "codeforces, 2/B: case 1 of a whole program: an output of 41943040 bytes, the sandbox can pass 33488896",
        ),
        ("livecodebench", {"question_content": None}, "question_content: must be there and be a text"),
        ("codeforces", {"official_tests": [{"input": "1"}]}, "codeforces, 2/B: official_tests need input and output"),
        ("codeforces", {"generated_checker": "def :"}, "codeforces, 2/B: generated_checker: must be Python ("),
        ("codeforces", {"time_limit": "soon"}, "codeforces: cannot be graded (ValueError: could not convert"),
        ("codeforces", {"examples": [1]}, "codeforces: cannot be graded (TypeError: "),
        ("codeforces", {"title": 7}, "title: must be there and be a text"),
    ],
)
def test_a_task_that_cannot_be_graded_is_refused_when_it_is_read(
    suite: str, row: dict[str, Any], why: str, tmp_path: Path
) -> None:
    first, second = ({**ADD, "question_id": "first"}, ADD) if suite == "livecodebench" else (SPLIT, EQUAL)
    file = write_rows(tmp_path / suite / "test.jsonl", [first, {**second, **row}])
    with pytest.raises(UserError) as refused:
        load_tasks(SUITES[suite], tmp_path)
    assert str(refused.value).startswith(f"{file}:2: {why}"), refused.value
    assert "\n" not in str(refused.value)
    assert len(load_tasks(SUITES[suite], tmp_path, limit=1).rows) == 1, "a row that is not used is not looked at"


def test_a_row_without_tests_is_refused() -> None:
    with pytest.raises(UserError, match=r"^codeforces, 1/A: official_tests need input and output"):
        codeforces.program({**SPLIT, "official_tests": [{"input": "1"}]}, "")
    assert replace(Sample("x", completion="y"), number=1).row() == {"task_id": "x", "completion": "y", "number": 1}
