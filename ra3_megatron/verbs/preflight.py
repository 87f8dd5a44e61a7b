"""`ra3 preflight`: are these nodes fit to train on? In the processes that the training will have, before it starts.

The checks run in a thread of their own; this one keeps the time, as a file system or a network that hangs may never
give a thread back. Invariant: a process ends within the time limit, whatever hangs.
"""

import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console

from ra3_megatron.config.errors import STOPPED, UserError
from ra3_megatron.report.run_folder import write_json

if TYPE_CHECKING:
    from ra3_megatron.cluster.results import Limits
    from ra3_megatron.cluster.run import Preflight


class _Signalled(Exception):
    pass


def preflight(run_dir: Path, limits: "Limits", out: Path | None = None) -> int:
    """Check the nodes of this job, show what was found, write it to `out` as JSON; the exit code, 0 or 3.

    A process whose checks or transfers hang does not return from here, but ends with that code.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch tells of each second that it waits, with a stack
    from ra3_megatron.cluster.place import here
    from ra3_megatron.cluster.results import BAD_ALLOCATION
    from ra3_megatron.cluster.run import Preflight

    checks = Preflight(run_dir, limits, here())
    outcome: list[bool] = []
    worker = threading.Thread(target=lambda: outcome.append(checks.run()), name="checks", daemon=True)
    number = _wait(worker, checks)
    good = bool(outcome) and outcome[0]
    hung = worker.is_alive()
    if number is not None:
        if checks.place.is_main:
            sys.stderr.write(f"ra3: preflight stopped by {signal.Signals(number).name}\n")
        _leave(STOPPED)
    if hung:
        checks.hung()
    _show(checks)
    if out is not None and checks.place.is_main:
        _write(checks, good, out)
    code = 0 if good else BAD_ALLOCATION
    if hung or checks.in_group:
        _leave(code)
    return code


def _wait(worker: threading.Thread, checks: "Preflight") -> int | None:
    """Run the thread until its deadline at most; the signal that ended the wait, if one did."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Signalled(number)

    numbers = (signal.SIGUSR1, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        worker.start()
        while worker.is_alive() and (left := checks.deadline - time.monotonic()) > 0:
            worker.join(min(left, 1.0))  # the deadline moves when the processes have met
    except _Signalled as stopped:
        return int(stopped.args[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return None


def _show(checks: "Preflight") -> None:
    """The first process shows all; another one only what keeps it from the first."""
    from ra3_megatron.cluster import table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 180
    if checks.place.is_main:
        table.show(checks.results, dict(Counter(filter(None, checks.nodes))), console)
    else:
        for line in table.lines(checks.results):
            console.print(line, soft_wrap=True, markup=False)


def _write(checks: "Preflight", good: bool, out: Path) -> None:
    content = {
        "good": good,
        "processes": dict(Counter(filter(None, checks.nodes))),
        "results": [each.as_dict() for each in checks.results],
    }
    try:
        write_json(out, content)
    except OSError as error:
        raise UserError(f"--json {out}: cannot be written ({error.strerror})") from error


def _leave(code: int) -> None:
    """End without waiting for a thread that hangs."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
