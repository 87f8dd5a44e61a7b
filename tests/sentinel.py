"""Watches the machine's arithmetic while tests run, and runs a test again that failed while it was wrong.

Results of many tests are compared bit for bit, some with those of other processes. A core that divides wrongly now and
then fails such a test for no fault of ours. (Seen on a machine of the cloud: for up to 3 seconds every few minutes, one
element of eight, in the last digit.) Such a test is run again, with fixtures of its own, up to two times, and the
summary says so; on a machine that computes right every failure stands. What a test is given may be as old as the
session: a wrong division at any time of it counts.

`python tests/sentinel.py FILE PARENT` is the watching process. Every wrong division that it finds is a line in FILE.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "RA3_TEST_SENTINEL"
"""Names FILE to the processes of the tests."""
PAUSE = 0.1
ROUNDS = 10
TRIES = 3
AGAIN = "run again"
"""A property of a report, whose value says why."""


def watch(file: Path, parent: int) -> None:
    """Ask each processor in turn, until this process has another parent."""
    import torch

    from ra3_megatron.cluster.arithmetic import divisions

    asked = divisions(torch.device("cpu"))
    numbers = sorted(os.sched_getaffinity(0))
    while os.getppid() == parent:
        for number in numbers:
            os.sched_setaffinity(0, {number})
            if any(asked.wrong() for _ in range(ROUNDS)):
                with file.open("a") as lines:
                    lines.write(f"{time.time():.6f} {number}\n")
        time.sleep(PAUSE)


def wrong_divisions() -> Counter[str]:
    """How often a processor was found to divide wrongly in this session."""
    try:
        words = [line.split() for line in Path(os.environ[VARIABLE]).read_text().splitlines()]
    except (KeyError, OSError):
        return Counter()
    return Counter(each[1] for each in words if len(each) == 2)


def told(found: Counter[str]) -> str:
    """The line that says so."""
    return ", ".join(f"CPU {number} {count} times" for number, count in sorted(found.items()))


def first_line(report: pytest.TestReport) -> str:
    """Of the message with which a test failed."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message.split("\n")[0] if report.failed and crash is not None else ""


class Sentinel:
    """The plugin."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        if VARIABLE in os.environ:  # a session inside another one, or one of its workers
            return
        number, name = tempfile.mkstemp(prefix="ra3-sentinel-")
        os.close(number)
        os.environ[VARIABLE] = name
        root = str(Path(__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
        self._process = subprocess.Popen([sys.executable, __file__, name, str(os.getpid())], env=environment)

    def pytest_unconfigure(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            Path(os.environ.pop(VARIABLE)).unlink(missing_ok=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        from _pytest.runner import runtestprotocol

        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        for _ in range(TRIES - 1):
            wrong = wrong_divisions()
            if not wrong or not any(report.failed for report in reports):
                break
            before = next(filter(None, map(first_line, reports)), "")
            item.session._setupstate.teardown_exact(None)  # what its fixtures hold may be wrong
            item._initrequest()  # type: ignore[attr-defined]
            reports = runtestprotocol(item, nextitem=nextitem, log=False)
            for report in reports:
                report.user_properties.append((AGAIN, f"{told(wrong)} until then; before: {before}"))
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        found = wrong_divisions()
        if not found:
            return
        terminalreporter.write_line(
            f"WARNING: a processor of this machine is defective: it divided wrongly ({told(found)}).", yellow=True
        )
        for reports in terminalreporter.stats.values():
            for report in reports:
                why = dict(getattr(report, "user_properties", ())).get(AGAIN)
                if why is not None and getattr(report, "when", "") == "call":
                    line = f"  run again, and {report.outcome} then: {report.nodeid} ({why})"
                    terminalreporter.write_line(line, yellow=True)


if __name__ == "__main__":
    watch(Path(sys.argv[1]), int(sys.argv[2]))
