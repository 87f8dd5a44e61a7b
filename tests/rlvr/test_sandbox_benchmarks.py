"""The reference solutions of HumanEval and MBPP pass through the sandbox, and broken ones do not.

All of both benchmarks with `--extended`; otherwise a sample, with every task that is known to be unusual.
"""

from __future__ import annotations

import ast
import gzip
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ra3_megatron.rlvr.sandbox import FunctionTests, Program, Sandbox, Verdict

pytestmark = [pytest.mark.multiprocess, pytest.mark.filterwarnings("ignore:invalid escape sequence")]

SHARED = Path(os.environ.get("RA3_SHARED", Path(__file__).resolve().parents[3] / "shared"))
UNUSUAL = {
    *("HumanEval/32", "HumanEval/38", "HumanEval/50"),  # the tests use helpers of the prompt
    *("126", "367", "596", "927"),  # a function called sum; trees of the program's nodes; tests that need sys
}


def rows(name: str) -> list[dict[str, Any]]:
    """The tasks of a file of the data folder, which is beside this repository or at RA3_SHARED."""
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"benchmark data are not on this machine's disk: {path}")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@cache
def tasks() -> dict[str, tuple[Program, str]]:
    """Identifier -> the reference solution with its tests, and the function that it defines."""
    found = {}
    for row in rows("humaneval/HumanEval.jsonl.gz"):
        name = row["entry_point"]
        tests = FunctionTests(row["test"], (f"check({name})",))
        found[row["task_id"]] = Program(row["prompt"] + row["canonical_solution"], tests), name
    for row in rows("mbpp/mbpp.jsonl"):
        defined = [
            node.name for node in ast.parse(row["code"]).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
        ]
        called = called_in(row["test_list"][0])
        setup = row["test_setup_code"]
        names = tuple(name for name in defined if name in called or name in setup)
        found[str(row["task_id"])] = (
            Program(row["code"], FunctionTests(setup, tuple(row["test_list"]), names)),
            names[-1],
        )
    return found


def called_in(test: str) -> set[str]:
    """Names of the functions that a test calls."""
    calls = [node.func for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Call)]
    return {function.id for function in calls if isinstance(function, ast.Name)}


def sample() -> list[str]:
    """Every 20th task, and the unusual ones."""
    return [name for number, name in enumerate(tasks()) if number % 20 == 0 or name in UNUSUAL]


def broken(name: str, body: str) -> Program:
    """The reference solution with another body of its function."""
    program, function = tasks()[name]
    return Program(f"{program.code}\ndef {function}(*arguments, **options):\n    {body}\n", program.tests)


def check(sandbox: Sandbox, names: list[str]) -> None:
    outcomes = dict(zip(names, sandbox.grade([tasks()[name][0] for name in names]), strict=True))
    failed = {name: outcome for name, outcome in outcomes.items() if outcome.verdict is not Verdict.PASSED}
    assert not failed
    for body in ("return None", "raise NotImplementedError"):
        outcomes = dict(zip(names, sandbox.grade([broken(name, body) for name in names]), strict=True))
        passed = [name for name, outcome in outcomes.items() if outcome.verdict is Verdict.PASSED]
        assert not passed, body


@pytest.mark.slow
def test_a_sample(sandbox: Sandbox) -> None:
    check(sandbox, sample())


@pytest.mark.slow
@pytest.mark.extended
def test_all(sandbox: Sandbox) -> None:
    """All 164 and 974, none left out."""
    assert len(tasks()) == 164 + 974
    check(sandbox, list(tasks()))
