"""Are rows of a suite what its harness reads? Asked before a model is opened, not while it is scored."""

from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.evaluate.suites import Suite
from ra3_megatron.rlvr.problems import codeforces, livecodebench
from ra3_megatron.rlvr.problems.checks import syntax_error
from ra3_megatron.rlvr.problems.rows import Row

_TEXT, _LIST = (str,), (list,)
_KINDS = {str: "a text", list: "a list", dict: "an object", int: "a number", float: "a number"}
_EVALPLUS: dict[str, tuple[type, ...]] = {
    "prompt": _TEXT,
    "entry_point": _TEXT,
    "canonical_solution": _TEXT,
    "base_input": _LIST,
    "plus_input": (list, dict),
    "atol": (int, float),
}
_MBPP: dict[str, tuple[type, ...]] = {"text": _TEXT, "code": _TEXT, "test_list": _LIST}
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "humaneval": {"prompt": _TEXT, "entry_point": _TEXT, "canonical_solution": _TEXT, "test": _TEXT},
    "humaneval+": _EVALPLUS,
    "mbpp": _MBPP,
    "mbpp-500-3shot": _MBPP,
    "mbpp+": _EVALPLUS,
    "gsm8k": {"question": _TEXT, "answer": _TEXT},
    "livecodebench": {"question_content": _TEXT, "public_test_cases": _TEXT, "private_test_cases": _TEXT},
    "codeforces": {"title": _TEXT, "description": _TEXT, "official_tests": _LIST},
}
"""What the harness of a suite needs of a row beside its id, and of which types."""


def check_row(suite: Suite, row: Row, place: str) -> None:
    """Raises UserError, with the place of the row, when the suite's harness could not use it."""
    for name, types in FIELDS[suite.name].items():
        if not isinstance(row.get(name), types) or isinstance(row[name], bool):
            wanted = " or ".join(dict.fromkeys(_KINDS[each] for each in types))
            raise UserError(f"{place}: {name}: must be there and be {wanted}")
    if suite.kind in ("human-eval", "evalplus"):
        if not row["entry_point"].isidentifier():
            raise UserError(f"{place}: entry_point={row['entry_point'][:40]}: must be the name of a function")
        _check_python(row["prompt"] + row["canonical_solution"], place, "prompt and canonical_solution")
    if suite.kind == "human-eval":
        _check_python(row["test"], place, "test")
    elif "test_list" in FIELDS[suite.name]:
        _check_list(row["test_list"], place)
        _check_python(row["code"], place, "code")
    elif suite.kind in ("livecodebench", "codeforces"):
        _check_program(suite, row, place)


def _check_list(tests: list[Any], place: str) -> None:
    if not tests or not all(isinstance(test, str) for test in tests):
        raise UserError(f"{place}: test_list: must hold at least one text")
    for number, test in enumerate(tests):
        _check_python(test, place, f"test_list[{number}]")


def _check_python(source: str, place: str, name: str) -> None:
    if said := syntax_error(source, name):
        raise UserError(f"{place}: {name}: must be Python ({said})")


def _check_program(suite: Suite, row: Row, place: str) -> None:
    """Tests can be read and are of a kind that is graded; prompt and limits can be made."""
    kind = livecodebench if suite.kind == "livecodebench" else codeforces
    try:
        kind.program(row, "")
        kind.limits(row)
        kind.prompt(row)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{place}: {suite.name}: cannot be graded ({type(error).__name__}: {said})") from error
