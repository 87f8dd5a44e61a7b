"""Programming contests as problems: rows of DeepCoder's, AReaL's, LiveCodeBench's and Codeforces' data sets.

    DeepCoder (agentica-org/DeepCoder-Preview-Dataset, all configurations): problem; tests, JSON, either
        {"inputs": […], "outputs": […], "fn_name"?: …}                                              (taco)
        [{"input": …, "output": …, "type" or "testtype": "stdin_stdout" | "stdin" | "function_call" | "functional",
          "fn_name"? or "metadata"?: {"func_name": …}}, …]                       (primeintellect, lcbv5, codeforces)
        with starter_code?, metadata?: {"func_name": …} and solutions?: [text, …] beside it
    AReaL (inclusionAI's code data): prompt (or question); input_output, JSON {"inputs", "outputs", "fn_name"?}
    LiveCodeBench, Codeforces: as `ra3 eval` reads them (`livecodebench.py`, `codeforces.py`). What is trained on
        measures nothing any more: take contests before those that you evaluate on.

Two forms. Programs that read and write: cases of standard input and output, equal when their tokens are, numbers with a
fraction within 1e-5. Functions: arguments are JSON values (a list, or one value a line of a text), results are equal
when they are the same JSON, floats within 1e-5. Limits of time and memory in a row are not read: `rlvr.limits` are
those of all.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.rlvr.problems import codeforces, livecodebench, values
from ra3_megatron.rlvr.problems.checks import require_parsed
from ra3_megatron.rlvr.problems.problem import Problem
from ra3_megatron.rlvr.sandbox import FunctionTests, StdinTests

SAME = (
    values.SETUP
    + """
def _plain(value):
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value

def _equal(found, expected):
    if type(expected) is float:
        number = isinstance(found, (int, float))
        return number and (found == expected or abs(found - expected) <= 1e-8 + 1e-5 * abs(expected) < inf)
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(_equal, found, expected))
    if isinstance(expected, dict):
        return isinstance(found, dict) and found.keys() == expected.keys() and all(
            [_equal(found[key], expected[key]) for key in expected]
        )
    return found == expected

def _same(found, expected):
    return any([_equal(_plain(found), _plain(value)) for value in expected])
"""
)
"""JSON knows neither tuples nor keys that are no strings; where a float is expected, as near as numpy.allclose has it,
which DeepCoder's graders take. (They take it for integers too, so that a count of a billion may be wrong by thousands.)
expected: all values that are right."""
NEAR = """
def check(input, expected, output):
    wanted, found = expected.split(), output.split()
    return len(wanted) == len(found) and all(map(_near, wanted, found))

def _near(wanted, found):
    if wanted == found:
        return True
    whole = wanted.lstrip("+-").isdigit()
    try:
        if whole and found.lstrip("+-").isdigit():
            return int(wanted) == int(found)
        number, exact = float(found), int(wanted) if whole else float(wanted)
        return number == exact or not whole and abs(number - exact) <= 1e-8 + 1e-5 * abs(exact) < float("inf")
    except (ValueError, OverflowError):
        return False
"""
"""The same of what a program prints."""
PRELUDE = "from typing import *\n"
"""What starter codes take for granted, and the data sets' graders import before a program: `nums: List[int]`."""
INSTRUCTIONS = {
    "stdin": "Write a Python program that reads from standard input and writes the answer to standard output.",
    "function": "Write the answer in Python, starting from this code:\n```python\n{starter}\n```",
}
_FUNCTION_KINDS = frozenset({"function_call", "functional"})
_STDIN_KINDS = frozenset({"stdin_stdout", "stdin"})


def competition_problems(
    path: str, schema: str, limit: int | None, held_out: int
) -> tuple[list[Problem], list[Problem], dict[str, int]]:
    """Training and held-out problems of a jsonl file in one of the schemas, the last ones being held out; and how many
    rows were left out for which reason, since they cannot be graded exactly.

    Raises UserError with the line of the first row that is wrong.
    """
    file = Path(path)
    found: list[Problem] = []
    left_out: Counter[str] = Counter()
    lines_of: dict[str, int] = {}
    number = 0
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                reason = _reason_left_out(row, schema)
                if reason is not None:
                    left_out[reason] += 1
                    continue
                problem = _problem(row, f"{schema}/{number}", schema)
                if lines_of.setdefault(problem.name, number) != number:
                    raise ValueError(f"{problem.name} stands in line {lines_of[problem.name]} already")
                found.append(problem)
    except OSError as error:
        raise UserError(f"rlvr.problems.path={path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError) as error:
        said = f"no key {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}:{number}: no row of {schema} ({said})") from error
    kept = min(held_out, max(len(found) - 1, 0))
    return found[: len(found) - kept][:limit], found[len(found) - kept :], dict(left_out)


def _reason_left_out(row: dict[str, Any], schema: str) -> str | None:
    """Why a row cannot be graded exactly."""
    if schema == "codeforces":
        return codeforces.reason_left_out(row)
    if schema == "deepcoder" and not isinstance(tests := _loaded(row["tests"]), Mapping):
        unknown = {_kind(case) for case in tests} - _FUNCTION_KINDS - _STDIN_KINDS
        return f"tests of the kind {', '.join(sorted(unknown))}" if unknown else None
    return None


def _kind(case: Mapping[str, Any]) -> str:
    return str(case.get("type") or case.get("testtype") or "stdin")


def _problem(row: dict[str, Any], name: str, schema: str) -> Problem:
    if schema == "livecodebench":
        asked = livecodebench.program(row, "")
        return Problem(
            f"{schema}/{row['question_id']}",
            livecodebench.prompt(row),
            asked.tests,
            "program",
            livecodebench.STOPS,
            prelude=livecodebench.PRELUDE,
        )
    if schema == "codeforces":
        tests = codeforces.program(row, "").tests
        return Problem(f"{schema}/{row['id']}", codeforces.prompt(row), tests, "program", codeforces.STOPS)
    if schema == "areal":
        text = row["prompt"] if "prompt" in row else row["question"]
        tests = _loaded(row["input_output"])
    else:
        text, tests = row["problem"], _loaded(row["tests"])
    function, cases = cases_of(tests)
    metadata = _loaded(row.get("metadata") or {})
    function = function or (metadata.get("func_name") if isinstance(metadata, Mapping) else None)
    if function is None and not isinstance(tests, Mapping) and {_kind(case) for case in tests} & _FUNCTION_KINDS:
        raise ValueError("tests of a function that nothing names")
    starter = row.get("starter_code") or ""
    problem = contest_problem(name, str(text), function, cases, starter)
    solutions = tuple(each for each in _list(row.get("solutions")) if isinstance(each, str))
    return replace(problem, solution=solutions[0], more_solutions=solutions[1:]) if solutions else problem


def cases_of(tests: Any) -> tuple[str | None, list[tuple[Any, Any]]]:
    """The name of the function (None: whole programs), and (input, output) of each case."""
    if isinstance(tests, Mapping):
        inputs, outputs = tests["inputs"], tests["outputs"]
        if len(inputs) != len(outputs):
            raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs")
        return tests.get("fn_name"), list(zip(inputs, outputs, strict=True))
    kinds = {_kind(case) for case in tests}
    if len(kinds & _FUNCTION_KINDS) and len(kinds) > 1:
        raise ValueError(f"tests of several kinds: {', '.join(sorted(kinds))}")
    named = (case.get("fn_name") or (case.get("metadata") or {}).get("func_name") for case in tests)
    names = {str(name) for name in named if name is not None}
    if len(names) > 1:
        raise ValueError(f"tests of several functions: {', '.join(sorted(names))}")
    function = names.pop() if names and kinds & _FUNCTION_KINDS else None
    return function, [(case["input"], case["output"]) for case in tests]


def contest_problem(
    name: str, text: str, function: str | None, cases: Sequence[tuple[Any, Any]], starter: str
) -> Problem:
    """The problem with its instructions; the answer is a program, in a fenced block or as it is.

    function: what is called (a method of `Solution`, if the starter code has that class); None: whole programs.
    Raises ValueError for tests that cannot be written, UserError for those that the sandbox cannot pass to a program.
    """
    if not cases:
        raise ValueError("there are no tests")
    if function is None:
        pairs = tuple((_lines(given), _lines(expected)) for given, expected in cases)
        return Problem(name, f"{text.strip()}\n\n{INSTRUCTIONS['stdin']}\n", StdinTests(pairs, checker=NEAR), "program")
    if not function.isidentifier():
        raise ValueError(f"the function {function!r} is no name")
    called = f"Solution().{function}" if "class Solution" in starter else function
    tests = []
    for given, expected in cases:
        arguments = values.source_of(_arguments(given))
        wanted = ", ".join(map(values.source_of, _values(expected, isinstance(given, str))))
        tests.append(f"assert _same({called}(*{arguments}), [{wanted}])")
    require_parsed(SAME, tests)
    instructions = INSTRUCTIONS["function"].format(starter=starter.strip() or f"def {function}(…):")
    entry = "Solution" if "class Solution" in starter else function
    return Problem(
        name,
        f"{text.strip()}\n\n{instructions}\n",
        FunctionTests(setup=SAME, tests=tuple(tests), entry_points=(entry,)),
        "program",
        prelude=PRELUDE,
    )


def _loaded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _list(value: Any) -> list[Any]:
    """Solutions: a list, or one in a text of JSON."""
    try:
        found = _loaded(value)
    except ValueError:
        return []
    return found if isinstance(found, list) else []


def _lines(value: Any) -> str:
    """Standard input or output: a text, or a list of lines."""
    if isinstance(value, str):
        return value if value.endswith("\n") or not value else value + "\n"
    return "".join(f"{line}\n" for line in value)


def _arguments(given: Any) -> list[Any]:
    """Arguments of a call: a list of values, or a text with one JSON value a line."""
    if isinstance(given, str):
        return [json.loads(line) for line in given.split("\n") if line.strip()]
    if not isinstance(given, list):
        raise ValueError(f"arguments must be a list or lines of JSON, not {type(given).__name__}")
    return given


def _values(expected: Any, encoded: bool) -> list[Any]:
    """The expected results that are right: JSON in a text, or a value. Alone in a list, as taco writes most, it may be
    the list; a text beside arguments that are values may be one itself ("123"). encoded: arguments are a text of JSON,
    and so is then the result."""
    if isinstance(expected, str):
        try:
            value = json.loads(expected)
        except ValueError:
            return [expected]
        return [value] if encoded else [value, expected]
    return [expected, expected[0]] if isinstance(expected, list) and len(expected) == 1 else [expected]
