"""Whole programs: a process for each case, what is compared, and how."""

from __future__ import annotations

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.rlvr.sandbox import Isolation, Limits, Sandbox, Verdict
from ra3_megatron.rlvr.sandboxing.inside.codec import MAX_TEXT
from tests.rlvr.programs import script

pytestmark = pytest.mark.multiprocess

ECHO = "import sys\nprint(sys.stdin.read(), end='')"


def test_cases_are_counted(sandbox: Sandbox) -> None:
    outcome = sandbox.grade_one(script("print(int(input()) * 2)", ("1", "2"), ("2", "5"), ("3", "6"), ("x", "0")))
    assert (outcome.verdict, outcome.passed, outcome.total) == (Verdict.WRONG, 2, 4)
    assert "case 2" in outcome.detail and "4" in outcome.detail


def test_each_case_is_a_program_of_its_own(sandbox: Sandbox) -> None:
    """As `python program.py`: its name, its exit, what it registers for its end, threads that it leaves running."""
    code = """
    import atexit, sys, threading, time
    assert __name__ == "__main__" and sys.argv == ["program.py"] and sys.modules["__main__"].__dict__ is globals()
    assert not hasattr(sys, "seen")
    sys.seen = True
    atexit.register(print, "end")
    threading.Thread(target=lambda: (time.sleep(0.2), print(input()))).start()
    sys.exit()
    """
    outcome = sandbox.grade_one(script(code, ("a", "a end"), ("b", "b end")))
    assert outcome.verdict is Verdict.PASSED, outcome


@pytest.mark.parametrize("end", ["exit()", "quit()", "exit(0)", "def main():\n    exit()\nmain()"])
def test_programs_end_with_what_site_defines(sandbox: Sandbox, end: str) -> None:
    """`exit` and `quit` are there as for `python program.py`, though the interpreter starts without the module site."""
    outcome = sandbox.grade_one(script(f"print(input())\n{end}\nprint('not reached')", ("a", "a")))
    assert outcome.verdict is Verdict.PASSED, outcome


def test_an_exit_with_an_error_is_none(sandbox: Sandbox) -> None:
    outcome = sandbox.grade_one(script("print(input())\nexit(3)", ("a", "a")))
    assert outcome.verdict is Verdict.CRASHED and "exit 3" in outcome.detail


@pytest.mark.parametrize(
    ("output", "expected", "tolerance", "right"),
    [
        ("1 2\n3\n", "1 2 3", 0, True),
        ("  1\n\n2 ", "1 2\n", 0, True),
        ("12", "1 2", 0, False),
        ("1.0", "1", 0, False),
        ("1.0000001", "1", 1e-6, True),
        ("1.01", "1", 1e-6, False),
        ("1000000.5", "1000000", 1e-6, True),
        ("nan", "1", 1e-6, False),
        ("yes", "Yes", 1e-6, False),
        ("", "", 0, True),
        ("", "1", 0, False),
        ("1 2", "1", 0, False),
    ],
)
def test_tokens(sandbox: Sandbox, output: str, expected: str, tolerance: float, right: bool) -> None:
    outcome = sandbox.grade_one(script(ECHO, (output, expected), tolerance=tolerance))
    assert outcome.verdict is (Verdict.PASSED if right else Verdict.WRONG), outcome


def test_a_checker(sandbox: Sandbox) -> None:
    """Trusted code decides; anything but True, or an exception, is wrong."""
    checker = """
def check(data, expected, output):
    if output == "raise":
        raise ValueError(output)
    if output == "exit":
        exit(output)
    return 1 if output == "one" else sorted(output.split()) == sorted(expected.split())
"""
    cases = (("2 1", "1 2"), ("one", "1"), ("raise", "1"), ("1 1", "1 2"), ("exit", "1"), ("3 3", "3 3"))
    outcome = sandbox.grade_one(script(ECHO, *cases, checker=checker))
    assert (outcome.verdict, outcome.passed) == (Verdict.WRONG, 2) and "case 2" in outcome.detail


@pytest.mark.parametrize(
    ("code", "verdict", "words"),
    [
        ("print(3)\nraise ValueError('after')", Verdict.CRASHED, "ValueError: after"),
        ("print(3)\nimport sys\nsys.exit(1)", Verdict.CRASHED, "exit 1"),
        ("print(3, flush=True)\nimport os\nos.kill(os.getpid(), 11)", Verdict.CRASHED, "signal 11"),
        ("x = bytearray(1 << 30)", Verdict.MEMORY, "MemoryError"),
        ("print('3' * 300000)", Verdict.FLOOD, "262144 bytes"),
        ("import sys\nsys.stderr.write('3' * 300000)\nprint(3)", Verdict.FLOOD, "262144 bytes"),
        ("print(3", Verdict.CRASHED, "SyntaxError"),
    ],
)
def test_failures(sandbox: Sandbox, code: str, verdict: Verdict, words: str) -> None:
    """What was printed before does not help."""
    outcome = sandbox.grade_one(script(code, ("", "3")))
    assert outcome.verdict is verdict and words in outcome.detail, outcome


def test_large_inputs_and_outputs(sandbox: Sandbox) -> None:
    """Both ways at once, and input that the program does not read."""
    text = "0123456789\n" * 20_000
    assert sandbox.grade_one(script(ECHO, (text, text))).verdict is Verdict.PASSED
    assert sandbox.grade_one(script("print(3)", ("x" * 5_000_000, "3"))).verdict is Verdict.PASSED
    assert sandbox.grade_one(script("import os\nos.close(0)\nprint(3)", (text, "3"))).verdict is Verdict.PASSED


def test_the_largest_inputs_and_outputs(bubblewrap: Isolation) -> None:
    """What cannot be passed to a program is refused, and no verdict on it; what it prints beyond that is a flood."""
    with pytest.raises(
        UserError, match=r"^case 2 of a whole program: an input of 33488897 bytes, the sandbox can pass"
    ):
        script("", ("", ""), ("x" * (MAX_TEXT + 1), ""))
    with pytest.raises(UserError, match=r"^case 1 of a whole program: an output of"):
        script("", ("", "é" * (MAX_TEXT // 2 + 1)))
    with Sandbox(bubblewrap, Limits(seconds=60, memory_mib=1024, output_kib=40 * 1024), 1) as sandbox:
        length = "import sys\nprint(len(sys.stdin.read()))"
        assert sandbox.grade_one(script(length, ("x" * MAX_TEXT, str(MAX_TEXT)))).verdict is Verdict.PASSED
        outcome = sandbox.grade_one(script("for _ in range(36):\n    print('x' * 2**20)", ("", "x")))
        assert outcome.verdict is Verdict.FLOOD and f"{MAX_TEXT} bytes" in outcome.detail, outcome
        large = sandbox.grade_one(script("x = '" + "x" * MAX_TEXT * 2 + "'", ("", "")))
        assert large.verdict is Verdict.CRASHED and "the program: a value of more than 32 MiB" in large.detail, large


def test_what_it_takes_to_feed_a_program_is_not_its_cpu_time(bubblewrap: Isolation) -> None:
    """Forty cases of 10 MiB each, a bound of one second for each."""
    cases = [("x" * 10 * 2**20, str(10 * 2**20))] * 40
    with Sandbox(bubblewrap, Limits(seconds=120, cpu_seconds=1, memory_mib=1500), 1) as sandbox:
        outcome = sandbox.grade_one(script("print(len(input()))", *cases))
        assert outcome.verdict is Verdict.PASSED, outcome
        slow = sandbox.grade_one(script("while input():\n    pass", ("x\n\n", ""), ("x\n" * 10**7, "")))
    assert (slow.verdict, slow.passed) == (Verdict.TIMEOUT, 1), slow


def test_output_that_is_not_text(sandbox: Sandbox) -> None:
    code = "import sys\nsys.stdout.buffer.write(b'\\xff\\0\\n')"
    assert sandbox.grade_one(script(code, ("", "\ufffd\0"))).verdict is Verdict.PASSED
    outcome = sandbox.grade_one(script(code, ("", "x")))
    assert outcome.verdict is Verdict.WRONG and outcome.detail.isprintable()


def test_a_case_that_hangs(hasty: Sandbox) -> None:
    """The time is that of all cases."""
    outcome = hasty.grade_one(script("if input() == 'x':\n    input()\nwhile True: pass", ("x", ""), ("y", "")))
    assert outcome.verdict is not Verdict.PASSED
    outcome = hasty.grade_one(script("import time\ntime.sleep(0.8)\nprint(3)", *[("", "3")] * 4))
    assert outcome.verdict is Verdict.TIMEOUT and outcome.passed <= 2


def test_children_that_nobody_waits_for_do_not_add_up(sandbox: Sandbox) -> None:
    """Over more cases than there may be processes: one that has ended, and one that sleeps on."""
    code = """
    import os, time
    if os.fork() == 0:
        os._exit(0)
    if os.fork() == 0:
        time.sleep(60)
    print(input())
    """
    cases = [(f"{number}\n", f"{number}\n") for number in range(2 * sandbox.limits.processes)]
    outcome = sandbox.grade_one(script(code, *cases))
    assert (outcome.verdict, outcome.passed) == (Verdict.PASSED, len(cases)), outcome.detail
