"""MBPP's problems that no MBPP+ task is made of, so that MBPP+ (and MBPP's test split) still measure something.

MBPP (Austin et al. 2021, CC-BY-4.0) has tasks 1 to 974: 11 to 510 are its test split, 511 to 600 its validation split,
601 to 974 its training split. The 378 tasks of MBPP+ v0.2.0 come from all of them: 108 from the training split and 39
from the validation split. Without those, 266 problems are left to train on and 51 to hold out.
"""

import ast
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.rlvr.problems.checks import require_parsed, syntax_error
from ra3_megatron.rlvr.problems.problem import Problem
from ra3_megatron.rlvr.sandbox import FunctionTests

FILE = "mbpp.jsonl"
TEST, HELD_OUT, TRAIN = range(11, 511), range(511, 601), range(601, 975)
"""Numbers of MBPP's test, validation and training splits."""
STOP = ("\nclass ", "\nassert ", '\n"""', "\nprint(", "\nif __name__", "\n```", "\n<|")
"""What ends an answer: those of the MBPP harnesses, but "\\ndef", because programs may have several functions."""


def plus_ids() -> frozenset[int]:
    """Numbers of the MBPP problems that MBPP+ v0.2.0 is made of."""
    text = files("ra3_megatron.rlvr.problems").joinpath("data/mbpp_plus_ids.txt").read_text(encoding="ascii")
    return frozenset(map(int, text.split()))


def mbpp_problems(folder: str, limit: int | None, held_out: int) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems, at most so many of each. Raises UserError when `folder` has no MBPP."""
    path = Path(folder)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"rlvr.problems.path={folder}: no {FILE} there: it is google-research's mbpp/mbpp.jsonl (974 lines)"
        )
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(_lines(file), 1):
        try:
            row = json.loads(line)
            if rows.setdefault(int(row["task_id"]), row) is not row:
                raise ValueError(f"task_id {row['task_id']} stands in a line before")
            problem_of(row)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{file}:{number}: no row of MBPP ({type(error).__name__}: {error})") from error
    plus = plus_ids()
    kept = [[problem_of(rows[n]) for n in split if n in rows and n not in plus] for split in (TRAIN, HELD_OUT)]
    return kept[0][:limit], kept[1][:held_out]


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: no UTF-8 ({error.reason} at byte {error.start})") from error


def _entry_points(code: str, tests: tuple[str, ...]) -> tuple[str, ...]:
    """What the reference program defines and the tests use: one of them is called `sum`."""
    defined = {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    used = {node.id for test in tests for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
    return tuple(sorted(defined & used))


def problem_of(row: dict[str, Any]) -> Problem:
    """The problem of a row: the text and the tests as a docstring, behind which the program is written."""
    tests = tuple(row["test_list"])
    setup = row["test_setup_code"]
    require_parsed(setup, tests)
    code = row["code"].replace("\r\n", "\n")
    if said := syntax_error(code, "code"):
        raise ValueError(f"code is no Python ({said})")
    lines = "\n".join(tests)
    return Problem(
        name=f"mbpp/{row['task_id']}",
        prompt=f'"""\n{row["text"].strip()}\n{lines}\n"""\n',
        tests=FunctionTests(setup=setup, tests=tests, entry_points=_entry_points(code, tests)),
        stop=STOP,
        solution=code if code.endswith("\n") else code + "\n",
    )
