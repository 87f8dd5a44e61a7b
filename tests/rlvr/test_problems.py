"""Problems from every source: what is given and tested, what is held out, what is contaminated; solutions pass."""

from __future__ import annotations

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ra3_megatron.config.data import CorpusConfig
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.rlvr import RlvrLimits
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.tasks import TasksConfig
from ra3_megatron.corpus.generated import Tasks
from ra3_megatron.corpus.sources import iter_texts
from ra3_megatron.rlvr.problems.competition import competition_problems, contest_problem
from ra3_megatron.rlvr.problems.decontamination import TOKENS, decontaminate, tokens_of
from ra3_megatron.rlvr.problems.generated import SAME, generated_problems
from ra3_megatron.rlvr.problems.jsonl import jsonl_problems
from ra3_megatron.rlvr.problems.mbpp import HELD_OUT, TRAIN, mbpp_problems, plus_ids
from ra3_megatron.rlvr.problems.problem import Problem
from ra3_megatron.rlvr.problems.sources import encode_prompts
from ra3_megatron.rlvr.rewards import sandbox_limits
from ra3_megatron.rlvr.sandbox import FunctionTests, Isolation, Sandbox, StdinTests, Verdict
from ra3_megatron.text.latents import build_format, encode_document, raw
from ra3_megatron.text.tokenizer import SentencePieceTokenizer, train_sentencepiece
from ra3_megatron.text.transcript import Role
from tests.evaluate.made import ADD, EQUAL, PAIRS, SPLIT, write_rows

SHARED = Path(os.environ.get("RA3_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
needs_mbpp = pytest.mark.skipif(
    not (SHARED / "data" / "mbpp" / "mbpp.jsonl").is_file(),
    reason="the benchmark data folder ../shared is not on this disk",
)


def verdicts(sandbox: Sandbox, problems: list[Problem], answers: list[str]) -> list[Verdict]:
    programs = [problem.program(answer) for problem, answer in zip(problems, answers, strict=True)]
    return [outcome.verdict for outcome in sandbox.grade(programs)]


@pytest.mark.parametrize("family", ["hopprog", "stateprog", "composition"])
def test_generated_tasks_are_solved_by_their_programs_alone(family: Any, sandbox: Sandbox) -> None:
    config = CorpusConfig(source="tasks", valid_fraction=0.3, tasks=TasksConfig(family=family, count=30))
    train, valid, same = generated_problems(config, 8, 4)
    assert not same
    assert len(train) == 8 and len(valid) == 4 and not {p.name for p in train} & {p.name for p in valid}
    both = [*train, *valid]
    assert verdicts(sandbox, both, [str(p.solution) for p in both]) == [Verdict.PASSED] * 12
    wrong = ["    return []\n" if family != "composition" else "    return None\n"] * 12
    assert Verdict.PASSED not in verdicts(sandbox, both, wrong)


def test_a_task_that_is_trained_on_is_not_held_out() -> None:
    few = TasksConfig(family="hopprog", symbols=2, max_items=1, count=300)
    config = CorpusConfig(source="tasks", valid_fraction=0.3, min_lines=1, tasks=few)
    train, valid, left_out = generated_problems(config, None, 10**6)
    tasks = Tasks(config)
    asked = {each.prompt for each in train}
    held = [task.prompt for task in tasks if tasks.split(int(task.name.partition("#")[2])) == "valid"]
    both = sum(prompt in asked for prompt in held)
    assert both > 5 and left_out == {SAME: both} and len(valid) == len(held) - both
    assert not asked & {each.prompt for each in valid}
    first, fewer, count = generated_problems(config, 20, 5)
    assert len(first) == 20 and len(fewer) == 5 and not {each.prompt for each in first} & {p.prompt for p in fewer}
    assert sum(count.values()) < both, "only what would have been held out counts"


def test_an_answer_comes_out_of_its_fence() -> None:
    tests = FunctionTests(setup="", tests=("assert f() == 1",))
    whole = Problem("b", "Say one.\n", tests, answer="program")
    said = "First\n```text\nx = 1\n```\nno, this:\n```py\ndef f():\n    return 1\n```\nDone."
    assert (
        whole.program(said).code == "def f():\n    return 1\n" and whole.program("def f(): ...").code == "def f(): ..."
    )


def test_prompts_that_are_code_have_the_markers_of_code(tmp_path: Path) -> None:
    """In the format with markers; a task told in words has none, and so has a prompt without any text."""
    texts = ["def f():\n    return 1\n", "Say one.\n"]
    train_sentencepiece(texts * 50, 300, tmp_path / "tokenizer")
    tokenizer = SentencePieceTokenizer.load(tmp_path / "tokenizer")
    tests = FunctionTests(setup="", tests=("assert f() == 1",))
    problems = [
        Problem("code", "def f():\n", tests),
        Problem("words", "Say one.\n", tests, answer="program"),
        Problem("nothing", "", tests),
    ]
    plain = [[tokenizer.bos, *tokenizer.encode(each.prompt)] for each in problems]
    for name in ("comment", "tokens"):
        asked = {"problems": {"source": "jsonl", "path": "own.jsonl"}, "max_response_tokens": 8}
        config = RunConfig.model_validate({"text": {"latent_format": name}, "rlvr": asked})
        found = encode_prompts(problems, tokenizer, build_format(config.text, tokenizer), config)
        assert found[1:] == plain[1:]
        marker = [tokenizer.special["<act>"]] if name == "tokens" else []
        assert found[0] == [tokenizer.bos, *marker, *tokenizer.encode("def f():\n")]


@pytest.mark.parametrize("latent_format", ["comment", "tokens"])
def test_prompts_of_generated_tasks_are_those_of_mid_training(latent_format: str, tmp_path: Path) -> None:
    asked = {"source": "tasks", "tasks": {"family": "hopprog", "count": 12}}
    config = RunConfig.model_validate(
        {
            "corpus": asked,
            "text": {"latent_format": latent_format},
            "model": {"context_length": 1024},
            "rlvr": {"problems": {"source": "tasks"}, "max_response_tokens": 8},
        }
    )
    texts = {text.path: text for text in iter_texts(config.corpus)}
    train_sentencepiece([text.prompt + text.text for text in texts.values()] * 20, 400, tmp_path / "tokenizer")
    tokenizer = SentencePieceTokenizer.load(tmp_path / "tokenizer")
    format = build_format(config.text, tokenizer)
    problems = [problem for split in generated_problems(config.corpus, None, 4)[:2] for problem in split]
    assert len(problems) > 8
    for problem, ids in zip(problems, encode_prompts(problems, tokenizer, format, config), strict=True):
        text = texts[problem.name]
        document = encode_document(text.text, text.path, tokenizer, format, config.text, "strip", text.prompt)
        transcript = raw(document, format, tokenizer)
        assert ids == transcript.ids[transcript.roles == Role.CONTEXT].tolist()


def test_jsonl_splits_and_kinds(tmp_path: Path, sandbox: Sandbox) -> None:
    rows: list[dict[str, Any]] = [
        {"name": "one", "prompt": "def f(x):\n", "tests": ["assert f(1) == 2"], "solution": "    return x + 1\n"},
        {
            "name": "two",
            "prompt": "Print the sum.",
            "answer": "program",
            "cases": [{"input": "1 2\n", "output": "3\n"}, {"input": "2 2", "output": "4"}],
            "solution": "print(sum(map(int, input().split())))",
        },
        {
            "name": "three",
            "prompt": "Print any even number above the input.",
            "answer": "program",
            "cases": [{"input": "7\n", "output": ""}],
            "checker": "def check(input, expected, output): return int(output) > int(input) and int(output) % 2 == 0",
            "solution": "print(2 * int(input()))",
            "split": "held_out",
        },
        {"name": "four", "prompt": "x = 1\n", "setup": "y = 1", "tests": ["assert x == y"], "solution": ""},
    ]
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, valid = jsonl_problems(str(file), None, 2)
    assert [p.name for p in train] == ["one", "two"] and [p.name for p in valid] == ["three", "four"]
    both = [*train, *valid]
    assert isinstance(train[1].tests, StdinTests) and isinstance(train[0].tests, FunctionTests)
    assert verdicts(sandbox, both, [str(p.solution) for p in both]) == [Verdict.PASSED] * 4
    assert verdicts(sandbox, [valid[0]], ["print(9)"]) == [Verdict.WRONG]
    assert [p.name for p in jsonl_problems(str(file), 1, 1)[0]] == ["one"]


DEEPCODER: list[dict[str, Any]] = [
    {
        "problem": "Double it.",
        "tests": json.dumps({"fn_name": "double", "inputs": [[2], [[1, 2]]], "outputs": [[4], [[1, 2, 1, 2]]]}),
    },
    {
        "problem": "Read two numbers, print the sum.",
        "tests": json.dumps([{"type": "stdin_stdout", "input": "1\n2\n", "output": "3\n"}]),
    },
    {
        "problem": "Pairs.",
        "starter_code": "class Solution:\n    def pairs(self, a: int, b: str):\n        ",
        "tests": json.dumps([{"testtype": "functional", "input": '1\n"x"', "output": '[[1, "x"]]'}]),
        "metadata": json.dumps({"func_name": "pairs"}),
    },
]
ANSWERS = [
    "```python\ndef double(x):\n    return 2 * x\n```",
    "a = int(input())\nprint(a + int(input()))",
    "```python\nclass Solution:\n    def pairs(self, a, b):\n        return [(a, b)]\n```",
]


def test_deepcoder_rows(tmp_path: Path, sandbox: Sandbox) -> None:
    file = tmp_path / "deepcoder.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in DEEPCODER))
    problems, held, left_out = competition_problems(str(file), "deepcoder", None, 0)
    assert (
        not held
        and not left_out
        and isinstance(problems[1].tests, StdinTests)
        and "class Solution" in problems[2].prompt
    )
    assert verdicts(sandbox, problems, ANSWERS) == [Verdict.PASSED] * 3
    annotated = ANSWERS[2].replace("a, b)", "a: int, b: str) -> List[Tuple[int, str]]", 1)
    assert verdicts(sandbox, problems[2:], [annotated]) == [Verdict.PASSED]
    wrong = [
        "def double(x):\n    return x",
        "print(4)",
        "class Solution:\n    def pairs(self, a, b):\n        return []",
    ]
    assert verdicts(sandbox, problems, wrong) == [Verdict.WRONG] * 3


def test_areal_rows(tmp_path: Path, sandbox: Sandbox) -> None:
    rows = [
        {"prompt": "Sum.", "query_id": "1", "input_output": json.dumps({"inputs": ["1 2"], "outputs": ["3"]})},
        {"question": "Neg.", "input_output": {"fn_name": "neg", "inputs": [[3]], "outputs": [[-3]]}},
    ]
    file = tmp_path / "areal.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (first,), (second,), _ = competition_problems(str(file), "areal", None, 1)
    answers = ["print(sum(map(int, input().split())))", "def neg(x): return -x"]
    assert verdicts(sandbox, [first, second], answers) == [Verdict.PASSED] * 2


def test_livecodebench_and_codeforces_rows(tmp_path: Path, sandbox: Sandbox) -> None:
    """The rows that evaluation is tested with, to train on: a function, a checker, names imported before."""
    contests, rounds = write_rows(tmp_path / "a.jsonl", [ADD, PAIRS]), write_rows(tmp_path / "b.jsonl", [SPLIT, EQUAL])
    (add, pairs), *_ = competition_problems(str(contests), "livecodebench", None, 0)
    (split, equal), *_ = competition_problems(str(rounds), "codeforces", None, 0)
    assert [p.name for p in (add, pairs, split, equal)] == [
        "livecodebench/made_a",
        "livecodebench/made_b",
        "codeforces/1/A",
        "codeforces/2/B",
    ]
    of_pairs = "class Solution:\n    def pairs(self, row: List[int], twice): return list(map(list, zip(row, row[1:])))"
    halves = "n = int(input())\nprint({}, n - {})"
    right = ["print(sum(map(int, input().split())))", of_pairs, halves.format(1, 1), halves.format("n // 2", "n // 2")]
    wrong = ["print(3)", of_pairs.replace("zip", "min"), halves.format(1, 2), halves.format(1, 1)]
    assert verdicts(sandbox, [add, pairs, split, equal], right) == [Verdict.PASSED] * 4
    assert Verdict.PASSED not in verdicts(sandbox, [add, pairs, split, equal], wrong)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"tests": "[]"}, "no key 'problem'"),
        ({"problem": "x", "tests": "[]"}, "there are no tests"),
        ({"problem": "x", "tests": '{"inputs": ["1"], "outputs": []}'}, "1 inputs and 0 outputs"),
        ({"problem": "x", "tests": "not json"}, "no row of deepcoder"),
        ({"problem": "\ud800", "tests": {"inputs": ["1"], "outputs": ["1"]}}, "surrogates"),
        ({"problem": "x", "tests": {"inputs": ["\ud800"], "outputs": ["1"]}}, "surrogates"),
        ({"problem": "x", "tests": {"fn_name": "f(1) or f", "inputs": [[1]], "outputs": [1]}}, "is no name"),
        (
            {"problem": "x", "tests": [{"type": "function_call", "input": [1], "output": 1}]},
            "tests of a function that nothing names",
        ),
        ({"problem": "x", "tests": "[" * 100000}, "recursion"),
        ({"problem": "x", "tests": {"inputs": ["x" * 40 * 2**20], "outputs": ["1"]}}, "an input of 41943041 bytes"),
        (
            {"problem": "x", "tests": {"fn_name": "f", "inputs": [[json.loads("[" * 99 + "]" * 99)]], "outputs": [1]}},
            "the sandbox cannot pass a value nested more than 100 deep",
        ),
    ],
)
def test_rows_that_are_none(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(DEEPCODER[0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"bad.jsonl:2: .*{said}"):
        competition_problems(str(file), "deepcoder", None, 0)


def test_rows_of_codeforces_that_cannot_be_graded_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        SPLIT,
        EQUAL,
        {**SPLIT, "id": "3/A", "interaction_format": "ask"},
        {**SPLIT, "id": "4/A", "input_mode": "file"},
        {**SPLIT, "id": "5/A", "official_tests_complete": False},
    ]
    train, held, left_out = competition_problems(str(write_rows(tmp_path / "a.jsonl", rows)), "codeforces", None, 0)
    assert len(train) == 2 and not held
    assert left_out == {"interactive": 1, "reads a file": 1, "official tests incomplete": 1}
    for wrong, said in (
        ([SPLIT, {**EQUAL, "generated_checker": "if:"}], "a.jsonl:2: .*generated_checker: must be Python"),
        ([SPLIT, SPLIT], "a.jsonl:2: .*stands in line 1 already"),
    ):
        file = write_rows(tmp_path / "a.jsonl", wrong)
        with pytest.raises(UserError, match=said):
            competition_problems(str(file), "codeforces", None, 0)


def test_rows_of_deepcoder_with_tests_of_another_kind_are_left_out_and_counted(tmp_path: Path) -> None:
    case = {"input": "", "output": ""}
    rows = [DEEPCODER[0], {"problem": "x", "tests": [{**case, "type": "interactive"}, {**case, "type": "stdin"}]}]
    train, held, left_out = competition_problems(str(write_rows(tmp_path / "a.jsonl", rows)), "deepcoder", None, 0)
    assert len(train) == 1 and not held and left_out == {"tests of the kind interactive": 1}


def test_a_checkers_score_is_the_only_number_that_it_prints(tmp_path: Path, sandbox: Sandbox) -> None:
    """A message that repeats the program's output is no score, whatever lines and words that holds."""
    source = "import sys\nfound = open(sys.argv[3]).read()\nprint({})\nexit()\nprint(2)"
    rows = [
        {**SPLIT, "id": name, "generated_checker": source.format(said)}
        for name, said in (("1/A", "'wrong answer: found', found"), ("2/A", "1.0"), ("3/A", "'inf'"), ("4/A", "0"))
    ]
    problems, *_ = competition_problems(str(write_rows(tmp_path / "a.jsonl", rows)), "codeforces", None, 0)
    wanted = [Verdict.WRONG, Verdict.PASSED, Verdict.WRONG, Verdict.WRONG]
    for written in ("print(1.0)", "print('x\\n1.0')"):
        assert verdicts(sandbox, problems, [written] * 4) == wanted


def test_numbers_are_compared_as_the_data_sets_graders_do(tmp_path: Path, sandbox: Sandbox) -> None:
    """Floats nearly, one value in a list either way, and numbers that JSON has no sign for."""
    tests = [
        {"inputs": ["1"], "outputs": ["0.33333333 inf"]},
        {"fn_name": "f", "inputs": [[2]], "outputs": [[[1.5]]]},
        {"fn_name": "f", "inputs": [[2]], "outputs": [[5]]},
        {"fn_name": "f", "inputs": [[2]], "outputs": [float("inf")]},
    ]
    rows = [{"problem": "x", "tests": test} for test in tests]
    problems, *_ = competition_problems(str(write_rows(tmp_path / "a.jsonl", rows)), "deepcoder", None, 0)
    right = [
        "print(1 / 3, 'inf')",
        "def f(x): return [x - 0.5 + 1e-12]",
        "def f(x): return [5]",
        "def f(x): return 1e999",
    ]
    assert verdicts(sandbox, problems, right) == [Verdict.PASSED] * 4
    wrong = ["print(1 / 3, 7)", "def f(x): return [1.6]", "def f(x): return [[5]]", "def f(x): return 7.0"]
    assert verdicts(sandbox, problems, wrong) == [Verdict.WRONG] * 4
    counts = [
        {"inputs": ["1"], "outputs": ["1000000007"]},
        {"fn_name": "f", "inputs": [[2]], "outputs": [1000000007]},
    ]
    rows = [{"problem": "x", "tests": test} for test in counts]
    exact, *_ = competition_problems(str(write_rows(tmp_path / "b.jsonl", rows)), "deepcoder", None, 0)
    for add, verdict in ((0, Verdict.PASSED), (0.0, Verdict.PASSED), (1, Verdict.WRONG), (0.5, Verdict.WRONG)):
        told = [f"print(1000000007 + {add})", f"def f(x): return 1000000007 + {add}"]
        assert verdicts(sandbox, exact, told) == [verdict] * 2, "a count is right or wrong"
    also = ["print(1 / 3, 'INF')", "def f(x): return 1.5", "def f(x): return 5", "def f(x): return float('inf')"]
    assert verdicts(sandbox, problems, also)[2:] == [Verdict.PASSED] * 2


def test_a_text_beside_values_may_be_the_result_itself(tmp_path: Path, sandbox: Sandbox) -> None:
    """Beside arguments in JSON it is JSON, too."""
    tests: list[Any] = [
        {"fn_name": "f", "inputs": [["12"]], "outputs": ["123"]},
        [{"type": "function_call", "fn_name": "f", "input": '"12"', "output": "123"}],
    ]
    rows = [{"problem": "x", "tests": json.dumps(test)} for test in tests]
    problems, *_ = competition_problems(str(write_rows(tmp_path / "a.jsonl", rows)), "deepcoder", None, 0)
    answers = ["def f(x): return x + '3'", "def f(x): return 123", "def f(x): return '124'"]
    found = [verdicts(sandbox, problems, [answer] * 2) for answer in answers]
    assert found == [[Verdict.PASSED, Verdict.WRONG], [Verdict.PASSED] * 2, [Verdict.WRONG] * 2]


def test_arguments_may_hold_other_ends_of_lines(tmp_path: Path, sandbox: Sandbox) -> None:
    case = {"type": "function_call", "fn_name": "f", "input": '"a\u2028b"\r\n1', "output": '"a\u2028b1"'}
    row = {"problem": "x", "tests": json.dumps([case], ensure_ascii=False)}
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    problems, *_ = competition_problems(str(file), "deepcoder", None, 0)
    assert verdicts(sandbox, problems, ["def f(a, b): return f'{a}{b}'"]) == [Verdict.PASSED]


@pytest.mark.parametrize("starter", ["", "class Solution:\n    def f(self, x):"])
def test_long_values_are_parsed_and_not_compiled(starter: str, sandbox: Sandbox) -> None:
    """Of data of 100,000 numbers; floats, texts and what JSON has beyond its standard come through as they are."""
    given = [*range(20_000), 0.1, 1e300, float("inf"), -0.0, "\ud800'\"\\\n", None, True, {"a": [2]}]
    problem = contest_problem("long", "p", "f", [([given], given), ([[1]], [1])], starter)
    assert isinstance(problem.tests, FunctionTests)
    assert [test.count("_value(") for test in problem.tests.tests] == [2, 0]
    code = f"def f({'self, ' if starter else ''}x):\n    return x"
    code = f"class Solution:\n    {code}".replace("\n    return", "\n        return") if starter else code
    assert verdicts(sandbox, [problem] * 2, [code, code + "[::-1]"]) == [Verdict.PASSED, Verdict.WRONG]


def test_long_outputs_that_are_expected_are_no_flood(bubblewrap: Isolation) -> None:
    asked = Problem("long", "p", StdinTests((("", "7 " * 300000),)), "program")
    limits = sandbox_limits(RlvrLimits(), [asked])
    assert limits.output_kib > 1100 and sandbox_limits(RlvrLimits()).output_kib == 256
    with Sandbox(bubblewrap, limits, workers=1) as opened:
        assert opened.grade_one(asked.program("print('7 ' * 300000)")).verdict is Verdict.PASSED


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stop": [""]}, "bad.jsonl:1: stop.0: String should have at least 1 character"),
        ({"tests": ["return 1"]}, "bad.jsonl:1: test 1 is no Python"),
        (
            {"tests": [], "cases": [{"input": "", "output": ""}], "checker": "x = 1"},
            "bad.jsonl:1: .*defines no function check",
        ),
    ],
)
def test_lines_that_are_wrong(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    row = {"name": "a", "prompt": "p", "tests": ["assert f"], **change}
    with pytest.raises(UserError, match=said):
        jsonl_problems(str(write_rows(tmp_path / "bad.jsonl", [row])), None, 0)


def test_a_text_may_hold_other_ends_of_lines(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    row = {"name": "a", "prompt": "one\u2028two\x85three", "tests": ["assert f"]}
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n" + '{"name": ' + "9" * 5000 + "}\n")
    with pytest.raises(UserError, match=r"^[^\n]*lines.jsonl:2: [^\n]*$"):
        jsonl_problems(str(file), None, 0)
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert jsonl_problems(str(file), None, 0)[0][0].prompt == row["prompt"]


@needs_mbpp
def test_mbpp_without_the_problems_of_mbpp_plus(sandbox: Sandbox) -> None:
    train, held = mbpp_problems(str(SHARED / "data" / "mbpp"), None, 1000)
    numbers = [int(p.name.split("/")[1]) for p in train], [int(p.name.split("/")[1]) for p in held]
    assert (len(train), len(held)) == (266, 51) and not plus_ids() & {*numbers[0], *numbers[1]}
    assert set(numbers[0]) <= set(TRAIN) and set(numbers[1]) <= set(HELD_OUT)
    with gzip.open(SHARED / "data" / "mbppplus" / "MbppPlus.jsonl.gz", "rt") as lines:
        assert plus_ids() == {int(json.loads(line)["task_id"].split("/")[1]) for line in lines}
    some = [*train[::29], *held[::17]]
    assert verdicts(sandbox, some, [str(p.solution) for p in some]) == [Verdict.PASSED] * len(some)


def problem(name: str, solution: str | None, prompt: str = "p") -> Problem:
    return Problem(name, prompt, FunctionTests("", ("assert True",)), solution=solution)


LONG = "def f(a, b):\n    total = a + b\n    for item in range(total):\n        total += item * 2\n    return total\n"


def test_mbpp_has_each_task_once_and_programs(tmp_path: Path) -> None:
    row = {
        "task_id": 700,
        "text": "t",
        "code": "def f():\n    pass\n",
        "test_list": ["assert f"],
        "test_setup_code": "",
    }
    with pytest.raises(UserError, match=r"mbpp.jsonl:2: .*task_id 700 stands in a line before"):
        mbpp_problems(str(write_rows(tmp_path / "mbpp.jsonl", [row, row])), None, 0)
    with pytest.raises(UserError, match=r"mbpp.jsonl:1: .*code is no Python"):
        mbpp_problems(str(write_rows(tmp_path / "mbpp.jsonl", [{**row, "code": "def f(:"}])), None, 0)


def test_decontamination_counts_runs_of_tokens(tmp_path: Path) -> None:
    assert len(tokens_of(LONG)) > 2 * TOKENS
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "one.jsonl").write_text(json.dumps({"task_id": 1, "canonical_solution": LONG}) + "\n")
    with gzip.open(tmp_path / "bench" / "two.jsonl.gz", "wt") as file:
        file.write(json.dumps({"solution": "x = sorted(y)"}) + "\n")
    asked = "Given two numbers and a list of words, print how many words have so many letters."
    (tmp_path / "bench" / "prompts.jsonl").write_text(json.dumps({"prompt": asked}) + "\n" + '{"x": 1}\n')
    mbpp = {"text": "t", "code": LONG.replace("total", "mine"), "test_list": []}
    (tmp_path / "bench" / "mbpp.jsonl").write_text(
        "".join(json.dumps({**mbpp, "task_id": number}) + "\n" for number in (10, 511))
        + json.dumps({**mbpp, "task_id": 11, "code": LONG.replace("total", "theirs")})
    )
    (tmp_path / "bench" / "other.parquet").touch()
    part = LONG.replace("def f(a, b):", "def other(a, b, c, d):").replace("return total", "return -1")
    problems = [
        problem("the same", LONG),
        problem("a long part", "# a comment\n" + part),
        problem("renamed", LONG.replace("total", "result").replace("item", "each")),
        problem("short and the same", "x  =  sorted( y )"),
        problem("short and another", "x = sorted(z)"),
        problem("only a prompt", None, "something else"),
        problem("the same prompt", None, "Easy. " + asked),
        problem("trained on", LONG.replace("total", "mine")),
        problem("tested on", LONG.replace("total", "theirs")),
        replace(problem("another solution", "x = 1"), more_solutions=("x = 2", LONG)),
    ]
    kept, report = decontaminate(problems, str(tmp_path / "bench"))
    assert [p.name for p in kept] == ["renamed", "short and another", "only a prompt", "trained on"]
    assert report.benchmarks == {"one.jsonl": 1, "two.jsonl.gz": 1, "prompts.jsonl": 1, "mbpp.jsonl": 1}
    assert report.unread == {"prompts.jsonl": 1} and report.not_read == ["other.parquet"]
    assert report.compared == {"solutions": 8, "prompts": 2}
    assert report.dropped == {
        "one.jsonl": ["the same", "a long part", "another solution"],
        "two.jsonl.gz": ["short and the same"],
        "prompts.jsonl": ["the same prompt"],
        "mbpp.jsonl": ["tested on"],
    }


def test_benchmarks_of_one_name_are_two(tmp_path: Path) -> None:
    """Several data sets call their file test.jsonl: what one of them drops is dropped."""
    for folder, text in (("gsm8k", LONG), ("other", "def g(): pass")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").write_text(json.dumps({"solution": text}) + "\n")
    kept, report = decontaminate([problem("the same", LONG), problem("short", "x = 1")], str(tmp_path))
    assert [p.name for p in kept] == ["short"]
    assert report.benchmarks == {"gsm8k/test.jsonl": 1, "other/test.jsonl": 1}
    assert report.dropped == {"gsm8k/test.jsonl": ["the same"], "other/test.jsonl": []}
    alone, report = decontaminate([problem("the same", LONG)], str(tmp_path / "gsm8k" / "test.jsonl"))
    assert not alone and report.benchmarks == {"test.jsonl": 1}


def test_a_folder_without_benchmarks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no benchmark"):
        decontaminate([problem("a", LONG)], str(tmp_path))
