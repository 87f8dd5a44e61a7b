"""The sandbox: runs Python that a model wrote, and grades it in a way that the program cannot fake.

    with Sandbox(Isolation.BUBBLEWRAP, Limits(), workers=2) as sandbox:
        outcomes = sandbox.grade([Program(code, FunctionTests(setup="", tests=("assert f(1) == 2",)))])

Tests and program never share a process (`sandboxing/inside/`). A verdict needs the secret of the run, which only the
trusted runner knows; exit codes and what the program prints decide nothing. docs/sandbox.md tells the whole story.
"""

from __future__ import annotations

import dataclasses
import marshal
import secrets
import signal
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import CodeType
from typing import Self

from ra3_megatron.config.errors import UserError
from ra3_megatron.rlvr.sandboxing.bwrap import Mounts, interpreter
from ra3_megatron.rlvr.sandboxing.command import Infrastructure, attempt, require_bubblewrap, retried, run_command
from ra3_megatron.rlvr.sandboxing.inside.codec import MAX_TEXT
from ra3_megatron.rlvr.sandboxing.inside.main import FUNCTIONS, SCRIPTS, STARTED
from ra3_megatron.rlvr.sandboxing.limits import Ended, Isolation, Limits, SandboxError
from ra3_megatron.rlvr.sandboxing.programs import PLACE, compile_programs, runner_command

__all__ = [
    "Ended",
    "FunctionTests",
    "Isolation",
    "Limits",
    "Outcome",
    "Program",
    "Sandbox",
    "SandboxError",
    "StdinTests",
    "Verdict",
    "require_bubblewrap",
    "run_command",
]

LINE_BYTES = 2048
"""At most, of what the runner says about one test."""
SHOWN = 500
"""Characters of Outcome.detail."""


class Verdict(StrEnum):
    """What a program deserves."""

    PASSED = "passed"
    WRONG = "wrong"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    FLOOD = "flood"
    CRASHED = "crashed"
    """A syntax error, an exception, an end before the tests were through."""


@dataclass(frozen=True)
class Outcome:
    """A verdict. PASSED: all tests. Otherwise the first failure decides; `passed` counts over all that were run.

    detail: the end of the error, printable, at most 500 characters. seconds: wall clock, with the start of the sandbox.
    """

    verdict: Verdict
    passed: int
    total: int
    detail: str
    seconds: float


@dataclass(frozen=True)
class FunctionTests:
    """Assertions that call functions of the program.

    setup: trusted source that runs before the tests, beside them. entry_points: the names that come from the program,
    even when the setup defines them too (a prompt with stubs and helpers may stand there); without any, all names that
    setup and tests use and nobody else defines. A module of the standard library never comes from the program: it is
    there, imported by the setup or not.
    Raises UserError for sources that are no Python, and without a test: whatever passes no test at all has not passed.
    """

    setup: str
    tests: tuple[str, ...]
    entry_points: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.tests:
            raise UserError("tests of functions: there is none")
        for number, source in enumerate((self.setup, *self.tests)):
            _check_source(source, f"test {number} of functions" if number else "setup of tests of functions")


@dataclass(frozen=True)
class StdinTests:
    """Cases (stdin, expected stdout) of a whole program, which runs anew for each.

    Outputs are equal when their tokens are; numbers within `tolerance`, absolutely or relative to the expected one, if
    it is not 0. checker: trusted source instead, which defines check(input, expected, output) -> bool; what it raises
    means a wrong output. Raises UserError without a case, for one that no UTF-8 can hold (JSON knows lone surrogates),
    and for a checker that is no Python or defines no check.
    """

    cases: tuple[tuple[str, str], ...]
    checker: str | None = None
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not self.cases:
            raise UserError("tests of a whole program: there is no case")
        for number, case in enumerate(self.cases, 1):
            for what, text in zip(("input", "output"), case, strict=True):
                try:
                    size = len(text.encode())
                except UnicodeEncodeError as error:
                    raise UserError(f"case {number} of a whole program: {error}") from None
                if size > MAX_TEXT:
                    raise UserError(
                        f"case {number} of a whole program: an {what} of {size} bytes, the sandbox can pass {MAX_TEXT}"
                    )
        if self.checker is not None and "check" not in _check_source(self.checker, "checker of outputs").co_names:
            raise UserError("checker of outputs: it defines no function check(input, expected, output)")


@dataclass(frozen=True)
class Program:
    """Code and what it has to pass."""

    code: str
    tests: FunctionTests | StdinTests


def _check_source(source: str, what: str) -> CodeType:
    try:
        with warnings.catch_warnings(action="ignore", category=Warning):
            return compile(source, f"<{what}>", "exec")
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{what}: no Python source ({error})") from None


VERDICTS = {
    "wrong": Verdict.WRONG,
    "raised": Verdict.CRASHED,
    "ended": Verdict.CRASHED,
    "memory": Verdict.MEMORY,
    "flood": Verdict.FLOOD,
    "cpu": Verdict.TIMEOUT,
}
"""Kinds of failure of `inside/tests.py` and `inside/cases.py`."""


class Sandbox:
    """Grades programs, `workers` at once. A context manager: it holds a folder with the programs that run inside.

    Raises UserError on entry when bubblewrap is asked for and does not work here.
    """

    def __init__(self, isolation: Isolation, limits: Limits, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"a sandbox of {workers} workers")
        self.isolation = isolation
        self.limits = limits
        self.workers = workers
        self._stack = ExitStack()
        self._folder: Path | None = None

    def __enter__(self) -> Self:
        require_bubblewrap(self.isolation)
        with ExitStack() as stack:
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix="ra3-sandbox-"))
            compile_programs(Path(name))
            self._pool = stack.enter_context(ThreadPoolExecutor(self.workers, "sandbox"))
            self._folder = Path(name)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._folder = None
        self._stack.close()

    def grade(self, programs: Sequence[Program]) -> list[Outcome]:
        """What each program deserves, in order. Raises SandboxError when the sandbox fails several times."""
        self._check_entered()
        return list(self._pool.map(self.grade_one, programs))

    def grade_one(self, program: Program) -> Outcome:
        """What one program deserves. Raises SandboxError when the sandbox fails several times."""
        self._check_entered()
        secret = secrets.token_hex(16)
        ended = retried(lambda: self._run(program, secret))
        return _judge(program, ended, secret, self.limits)

    def _check_entered(self) -> None:
        if self._folder is None:
            raise RuntimeError("the sandbox is not open: use it in a with statement")

    def _run(self, program: Program, secret: str) -> Ended:
        assert self._folder is not None
        bubblewrap = self.isolation is Isolation.BUBBLEWRAP
        kind = FUNCTIONS if isinstance(program.tests, FunctionTests) else SCRIPTS
        folder = PLACE if bubblewrap else str(self._folder)
        argv = runner_command(kind, self.limits.cpu_bound, _most_cpu_seconds(program, self.limits), folder)
        prefix = interpreter()[0]
        ended = attempt(
            argv,
            # The bound of CPU time is that of the program, not of the runner, which must live to tell.
            dataclasses.replace(self.limits, cpu_seconds=max(self.limits.seconds, self.limits.cpu_bound) + 5),
            self.isolation,
            Mounts({prefix: prefix, PLACE: str(self._folder)}, {}, programs=prefix == "/usr"),
            marshal.dumps(_task(program, secret, self.limits)),
            {},
            first=True,
            output_bytes=LINE_BYTES * (_total(program) + 2),
            started=STARTED,
        )
        if not ended.stdout.startswith(STARTED):
            last = ended.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
            raise Infrastructure(" ".join(last) or f"the runner did not start, {ended.returncode}")
        if bubblewrap and ended.returncode in (128 + signal.SIGKILL, -signal.SIGKILL) and not _stopped(ended):
            # Nothing inside can kill the runner.
            raise Infrastructure("the runner was killed from outside")
        return ended


def _stopped(ended: Ended) -> bool:
    return ended.timed_out or ended.out_of_memory or ended.flooded


def _total(program: Program) -> int:
    tests = program.tests
    return len(tests.tests) if isinstance(tests, FunctionTests) else len(tests.cases)


def _most_cpu_seconds(program: Program, limits: Limits) -> int:
    """CPU time of each process of the program: a whole program runs anew for each test."""
    functions = isinstance(program.tests, FunctionTests)
    return limits.cpu_bound_of(_total(program)) if functions else limits.cpu_bound


def _task(program: Program, secret: str, limits: Limits) -> dict[str, object]:
    """What the runner reads: see `inside/main.py`."""
    tests = program.tests
    if isinstance(tests, FunctionTests):
        what: dict[str, object] = {
            "setup": tests.setup,
            "tests": tuple(tests.tests),
            "entry_points": tuple(tests.entry_points),
        }
    else:
        cases = tuple((str(data), str(expected)) for data, expected in tests.cases)
        most = min(limits.output_kib * 1024, MAX_TEXT)
        what = {"cases": cases, "checker": tests.checker, "most": most, "tolerance": float(tests.tolerance)}
    return {"secret": secret, "code": program.code, **what}


def _judge(program: Program, ended: Ended, secret: str, limits: Limits) -> Outcome:
    """Lines with the secret against what was to be run."""
    total = _total(program)
    lines = [
        words[1:]
        for line in ended.stdout.splitlines()
        if (words := line.decode("ascii", "replace").split(" "))[0] == secret
    ]
    passed = sum(line == ["pass"] for line in lines)
    failures = [line for line in lines if line[0] == "fail"]
    end = next((line for line in lines if line[0] == "end"), None)
    detail = bytes.fromhex(failures[0][2]).decode("utf-8", "replace") if failures else ""
    if ended.timed_out:
        verdict, detail = Verdict.TIMEOUT, f"more than {limits.seconds:g} seconds"
    elif ended.out_of_memory:
        verdict, detail = Verdict.MEMORY, f"more than {limits.memory_mib} MiB of memory"
    elif ended.flooded:
        verdict, detail = Verdict.FLOOD, f"more than {limits.output_kib} KiB of output"
    elif failures:
        verdict = VERDICTS[failures[0][1]]
        if failures[0][1] == "ended" and end is not None and end[1] == str(int(signal.SIGXCPU)):
            verdict, detail = Verdict.TIMEOUT, f"more than {_most_cpu_seconds(program, limits)} seconds of CPU time"
    elif end is not None and passed == total:
        verdict = Verdict.PASSED
    else:
        verdict, detail = Verdict.CRASHED, f"the runner ended with {ended.returncode}: {ended.stderr[-400:]!r}"
    return Outcome(verdict, passed, total, _clean(detail), ended.seconds)


def _clean(text: str) -> str:
    """The end of a text, in one line of printable characters."""
    return "".join(letter if letter.isprintable() else " " for letter in text).strip()[-SHOWN:]
