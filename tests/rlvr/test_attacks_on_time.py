"""Programs that take more CPU time than they have, wherever it is counted; and what is not their time."""

from __future__ import annotations

import pytest

from ra3_megatron.rlvr.sandbox import Isolation, Limits, Sandbox, Verdict
from tests.rlvr.programs import RIGHT, functions

pytestmark = pytest.mark.multiprocess


def test_cpu_time(bubblewrap: Isolation) -> None:
    """CPU time of a process below the wall clock, even when it ignores the signal."""
    code = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True:\n    pass"
    with Sandbox(bubblewrap, Limits(seconds=30, cpu_seconds=1), 1) as sandbox:
        polite = sandbox.grade_one(functions("while True:\n    pass", RIGHT))
        rude = sandbox.grade_one(functions(code, RIGHT))
    assert polite.verdict is Verdict.TIMEOUT and "CPU" in polite.detail
    assert rude.verdict is not Verdict.PASSED and max(polite.seconds, rude.seconds) < 28


BUSY = """
import time
def busy(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return True
"""


def test_cpu_time_is_that_of_a_test(bubblewrap: Isolation) -> None:
    """Tests that are right, each within the bound, are right together; one that is beyond it ends the program."""
    tests = ["assert busy(0.4)"] * 5
    with Sandbox(bubblewrap, Limits(seconds=40, cpu_seconds=1), 1) as sandbox:
        patient = sandbox.grade_one(functions(BUSY, *tests))
        hasty = sandbox.grade_one(functions(BUSY, *tests[:2], "assert busy(30)", *tests))
        loading = sandbox.grade_one(functions(BUSY + "busy(30)", *tests))
        forgiving = "try:\n    busy(1.5)\nexcept BaseException:\n    pass"
        setup = sandbox.grade_one(functions(BUSY, *tests, setup=forgiving, entry_points=("busy",)))
    assert patient.verdict is Verdict.PASSED, patient
    assert (hasty.verdict, hasty.passed) == (Verdict.TIMEOUT, 2), hasty
    assert hasty.detail.startswith("more than 1 seconds of CPU time in test 3: assert busy(30)")
    assert (loading.verdict, loading.passed) == (Verdict.TIMEOUT, 0) and "loading the program" in loading.detail
    assert (setup.verdict, setup.passed) == (Verdict.TIMEOUT, 0) and "the setup of the tests" in setup.detail
    assert max(hasty.seconds, loading.seconds) < 28


@pytest.mark.parametrize(
    ("attack", "test"),
    [
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)", "assert busy(30)"),
        (
            "import threading\nthreading.Thread(target=busy, args=(30,)).start()\nused = time.process_time",
            "import time\nbegin = used()\nwhile used() < begin + 1.5:\n    time.sleep(0.1)",
        ),
        ("def slow():\n    if os.fork() == 0:\n        busy(30)\n    time.sleep(30)", "slow()"),
        (
            "def slow():\n    for _ in range(99):\n        if os.fork() == 0:\n            busy(0.3)\n"
            "            os._exit(0)\n        os.wait()\n    return True",
            "assert slow()",
        ),
        ("def slow():\n    os.closerange(3, 64)\n    busy(30)", "slow()"),
        ("def slow():\n    try:\n        busy(30)\n    finally:\n        return True", "assert slow()"),
        (
            "class Slow:\n    def __str__(self):\n        return str(busy(30))\nslow = Slow",
            "raise ValueError(slow())",
        ),
        ("", "try:\n    busy(30)\nexcept BaseException:\n    pass"),
    ],
    ids=["signals", "thread", "child", "children", "pipes", "finally", "text", "forgiven"],
)
def test_cpu_time_of_a_test_cannot_be_evaded(bubblewrap: Isolation, attack: str, test: str) -> None:
    """By what is counted elsewhere, or what a test forgives: it never passes, and ends long before the wall clock."""
    tests = ["assert busy(0.1)", test, "assert True"]
    with Sandbox(bubblewrap, Limits(seconds=60, cpu_seconds=1), 1) as sandbox:
        outcome = sandbox.grade_one(functions(f"import os\n{BUSY}\n{attack}", *tests))
    assert outcome.verdict in (Verdict.TIMEOUT, Verdict.CRASHED), outcome
    assert outcome.verdict is Verdict.TIMEOUT or "closerange" in attack, outcome
    assert outcome.seconds < 28


def test_cpu_time_is_counted_without_isolation() -> None:
    with Sandbox(Isolation.UNSAFE, Limits(seconds=60, cpu_seconds=1), 1) as sandbox:
        outcome = sandbox.grade_one(functions(BUSY, "assert busy(0.6)", "assert busy(0.6)", "busy(30)"))
    assert (outcome.verdict, outcome.passed) == (Verdict.TIMEOUT, 2), outcome
    assert "of CPU time in test 3" in outcome.detail and outcome.seconds < 28


def test_cpu_time_of_a_process_is_within_the_wall_clock() -> None:
    """Tests and the loading, each with its own; a bound of the user's above the wall clock stays."""
    assert Limits(seconds=70, cpu_seconds=6).cpu_bound_of(10) == 66
    assert Limits(seconds=40, cpu_seconds=6).cpu_bound_of(10) == 41
    assert Limits(seconds=10).cpu_bound_of(10) == Limits(seconds=10).cpu_bound == 11
    assert Limits(seconds=3, cpu_seconds=30).cpu_bound_of(10) == 30
