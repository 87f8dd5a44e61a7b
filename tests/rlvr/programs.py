"""Programs for the sandbox, and what is asked of them."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from ra3_megatron.rlvr.sandbox import FunctionTests, Outcome, Program, Sandbox, StdinTests, Verdict

RIGHT = "assert add(1, 2) == 3"
ERROR_OF = """
def error_of(action):
    try:
        return repr(action())
    except BaseException as error:
        return type(error).__name__
"""
"""Source of a helper: the name of what an action raises, or its result."""


def functions(code: str, *tests: str, setup: str = "", entry_points: tuple[str, ...] = ()) -> Program:
    """Code and assertions about its functions."""
    return Program(textwrap.dedent(code), FunctionTests(textwrap.dedent(setup), tests, entry_points))


def script(code: str, *cases: tuple[str, str], checker: str | None = None, tolerance: float = 0.0) -> Program:
    """Code that reads stdin and writes stdout."""
    return Program(textwrap.dedent(code), StdinTests(cases, checker, tolerance))


def holds(sandbox: Sandbox, code: str, condition: str) -> Outcome:
    """Grade `code` by a condition on what its `attack()` tells, and see it pass."""
    test = f"told = attack()\nassert {condition}, told"
    outcome = sandbox.grade_one(functions(code, test, entry_points=("attack",)))
    assert outcome.verdict is Verdict.PASSED, outcome
    return outcome


def processes_with(marker: str) -> list[int]:
    """Processes of this machine whose command line holds `marker`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and marker.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def soon(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether the condition comes true within some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
