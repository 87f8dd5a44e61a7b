"""Programs per second: graded in the sandbox, graded by the same protocol without isolation, and run plainly.

The plain side is what harnesses often do: one interpreter that executes program and tests together and is believed when
it exits with 0. Its programs could fake that; the difference in speed is the price of verdicts that can be believed.
"""

import resource
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from benchmarks.measure import Timing, alternate
from ra3_megatron.rlvr.sandbox import FunctionTests, Isolation, Limits, Program, Sandbox, Verdict
from ra3_megatron.rlvr.sandboxing.bwrap import interpreter

PROGRAMS, WORKERS = 60, 2
CODE = """
from typing import List

def running_max(numbers: List[int]) -> List[int]:
    best, result = None, []
    for number in numbers:
        best = number if best is None else max(best, number)
        result.append(best)
    return result
"""
TESTS = (
    "assert running_max([]) == []",
    "assert running_max([1, 2, 3, 4]) == [1, 2, 3, 4]",
    "assert running_max([3, 2, 3, 100, 3]) == [3, 3, 3, 100, 100]",
)


@dataclass(frozen=True)
class SandboxResult:
    """Seconds for all programs, and CPU seconds of one repeat with all processes that it started."""

    programs: int
    tests: int
    workers: int
    timings: dict[str, Timing]
    cpu_seconds: dict[str, float]


def measure(repeats: int) -> SandboxResult:
    """Time PROGRAMS programs, WORKERS at once, on each side."""
    programs = [Program(CODE, FunctionTests("", TESTS, ("running_max",)))] * PROGRAMS
    with (
        Sandbox(Isolation.BUBBLEWRAP, Limits(), WORKERS) as walled,
        Sandbox(Isolation.UNSAFE, Limits(), WORKERS) as open_,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        sides: dict[str, Callable[[], object]] = {
            "plain subprocess": lambda: list(pool.map(run_plainly, programs)),
            "protocol, subprocess-unsafe": lambda: grade(open_, programs),
            "protocol, bubblewrap": lambda: grade(walled, programs),
        }
        timings = alternate(sides, repeats)
        cpu_seconds = {label: cpu_of(side) for label, side in sides.items()}
    return SandboxResult(PROGRAMS, len(TESTS), WORKERS, timings, cpu_seconds)


def grade(sandbox: Sandbox, programs: list[Program]) -> None:
    """All of them pass."""
    assert all(outcome.verdict is Verdict.PASSED for outcome in sandbox.grade(programs))


def run_plainly(program: Program) -> None:
    """Program and tests in one interpreter, started as the sandbox starts its own."""
    assert isinstance(program.tests, FunctionTests)
    source = "\n".join([program.code, *program.tests.tests])
    subprocess.run([interpreter()[1], "-I", "-S", "-"], input=source.encode(), check=True, timeout=60)


def cpu_of(action: Callable[[], object]) -> float:
    """CPU seconds of this process and all that it started and awaited."""
    before = _cpu()
    action()
    return _cpu() - before


def _cpu() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
