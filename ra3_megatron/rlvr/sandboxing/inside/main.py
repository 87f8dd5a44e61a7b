"""The trusted runner: the first process in the sandbox. It holds the tests and the secret of this run, and says which
tests passed.

Order matters. The candidate's process is forked before anything is read, so it inherits nothing. Nothing of this
process can be inspected before the candidate's code is handed over.

On stdout: `started`, then lines that begin with the secret: `pass`, or `fail KIND DETAIL` (hexadecimal UTF-8) for each
test in order, and `end`. Without the secret a line means nothing; the exit status never does.
"""

from __future__ import annotations

import marshal
import os
import time

from .candidate import add_exits, serve_functions, silence
from .channel import Broken, Channel
from .clock import CpuClock
from .codec import Decoder, no_handle
from .protection import bound_cpu_time, protect
from .tests import Failure

TYPE_CHECKING = False  # importing typing takes longer than most tests
if TYPE_CHECKING:
    from typing import Any

STARTED = b"started\n"
FUNCTIONS, SCRIPTS = "functions", "scripts"


def main(kind: str, cpu_seconds: int, most_cpu_seconds: int) -> None:
    """kind: functions or scripts. cpu_seconds: CPU time of a test. most_cpu_seconds: of each process of the candidate,
    over all tests that it lives for."""
    isolated = os.getpid() == 1
    requests, answers = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        worker(Channel(requests[0], answers[1]), kind, most_cpu_seconds, isolated)
        os._exit(0)
    os.close(requests[0])
    os.close(answers[1])
    out = os.dup(1)
    os.dup2(2, 1)
    protect()
    os.write(out, STARTED)
    with open(0, "rb") as stdin:
        task = marshal.loads(stdin.read())
    report = Report(out, task["secret"])
    try:
        if kind == FUNCTIONS:
            clock = CpuClock(child, cpu_seconds, isolated)
            run_functions(Channel(answers[0], requests[1], clock.wait), clock, task, report)
        else:
            run_scripts(Channel(answers[0], requests[1]), task, report)
    except Failure as failure:
        report.failed(failure)
    report.end(child)
    os._exit(0)


def worker(channel: Channel, kind: str, most_cpu_seconds: int, isolated: bool) -> None:
    """The other process: what the runner says first is the code."""
    if kind == FUNCTIONS:
        bound_cpu_time(most_cpu_seconds)
    silence((channel.read, channel.write))
    add_exits()
    try:
        code = Decoder(channel.receive(), no_handle, [], keep=False).decode()
    except Broken:
        return
    if kind == FUNCTIONS:
        serve_functions(channel, code)
    else:
        from .scripts import serve_scripts

        serve_scripts(channel, code, most_cpu_seconds, isolated)


class Report:
    """What the host reads."""

    def __init__(self, out: int, secret: str) -> None:
        self.out = out
        self.secret = secret
        self.told = False
        self.ended = False

    def passed(self) -> None:
        """The next test passed."""
        self._line("pass")

    def failed(self, failure: Failure) -> None:
        """The next test failed. Only the first failure is told in words."""
        detail = "" if self.told else failure.detail.encode("utf-8", "replace").hex()
        self.told = True
        self.ended = self.ended or failure.kind == "ended"
        self._line(f"fail {failure.kind} {detail}")

    def end(self, child: int) -> None:
        """All tests were run. Tells the signal that ended the candidate's process, or 0."""
        number = 0
        for _ in range(50 if self.ended else 1):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
                break
            if self.ended:
                time.sleep(0.01)
        self._line(f"end {number}")

    def _line(self, text: str) -> None:
        data = memoryview(f"{self.secret} {text}\n".encode())
        while data:
            data = data[os.write(self.out, data) :]


def run_functions(channel: Channel, clock: CpuClock, task: dict[str, Any], report: Report) -> None:
    """Each assertion against the functions of the program."""
    from .remote import Remote
    from .tests import FunctionRunner

    runner = FunctionRunner(Remote(channel), clock, task["setup"], task["tests"], task["entry_points"])
    runner.prepare(task["code"])
    for number in range(len(task["tests"])):
        try:
            runner.run(number)
        except Failure as failure:
            report.failed(failure)
        else:
            report.passed()


def run_scripts(channel: Channel, task: dict[str, Any], report: Report) -> None:
    """Each case of the whole program."""
    from .cases import CaseRunner

    add_exits()  # for the checker
    runner = CaseRunner(channel, task["code"], task["cases"], task["checker"], task["most"], task["tolerance"])
    for number in range(len(task["cases"])):
        try:
            runner.run(number)
        except Failure as failure:
            report.failed(failure)
        else:
            report.passed()
