"""Child processes that never outlive the study, and the lock that says which process works on a cell.

A child is told to end (SIGTERM) when its parent is gone, even by SIGKILL, and holds the lock of its cell until it has
ended. So whoever gets the lock is alone in the folder. Linux.
"""

import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO

import psutil

from ra3_megatron.config.errors import UserError
from ra3_megatron.text.files import lock_file
from ra3_megatron.text.lifetime import end_with

LOCK = ".study.lock"
"""Locked file in the folder of a cell, or of a study."""
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID")
"""Variables by which torchrun or srun say that they started this process; a cell starts its own processes."""


def lock(folder: Path, wait: float = 0.0) -> IO[bytes] | None:
    """Lock `folder`; the open file holds the lock, and so does a child that inherits it. None: another process has it.

    wait: seconds to wait for a process that is about to end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return lock_file(folder / LOCK, wait)


class Child:
    """One running command; its output goes to a log, behind what is there."""

    def __init__(self, command: Sequence[str], log: Path, held: IO[bytes], threads: int) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER}
        self._started = time.monotonic()
        try:
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**environment, "OMP_NUM_THREADS": str(threads)},
                    pass_fds=(held.fileno(),),
                    start_new_session=True,
                    preexec_fn=partial(end_with, os.getpid(), signal.SIGTERM),
                )
        except OSError as error:
            raise UserError(f"{command[0]}: cannot be started ({error.strerror})") from error
        finally:
            held.close()  # the child has it now
        self._handle = os.pidfd_open(self._process.pid)

    def fileno(self) -> int:
        """Readable when the process has ended."""
        return self._handle

    @property
    def seconds(self) -> float:
        """Time since it began."""
        return time.monotonic() - self._started

    def result(self) -> int:
        """Exit code of the ended process, minus the signal that killed it."""
        code = self._process.wait()
        os.close(self._handle)
        return code

    def descendants(self) -> list[psutil.Process]:
        """All processes that it, and those that it started, have started and that still have it above them."""
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def signal(self, number: int) -> None:
        """Send a signal to the process and those of its session's group."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)


def wait_any(children: Sequence[Child], timeout: float | None = None) -> list[Child]:
    """Wait until one of the processes has ended; those that have. timeout: seconds at most."""
    poll = select.poll()
    by_handle = {child.fileno(): child for child in children}
    for handle in by_handle:
        poll.register(handle, select.POLLIN)
    ended = poll.poll(None if timeout is None else 1000 * max(timeout, 0.0))
    return [by_handle[handle] for handle, _ in ended]


def stop_all(children: Sequence[Child], patience: float) -> None:
    """End the processes: SIGTERM, and SIGKILL for those that are still there after `patience` seconds.

    So too for all that they started, such as the workers of torch's launcher, which have sessions of their own and
    would go on writing when it is killed. It passes SIGTERM on to them itself.
    """
    left = list(children)
    below = {process for child in left for process in child.descendants()}
    for child in left:
        child.signal(signal.SIGTERM)
    until = time.monotonic() + patience
    while left and time.monotonic() < until:
        for child in wait_any(left, until - time.monotonic()):
            child.result()
            left.remove(child)
    while any(map(_runs, below)) and time.monotonic() < until:
        time.sleep(0.05)
    below |= {process for child in left for process in child.descendants()}
    for child in left:  # first: it could start others
        child.signal(signal.SIGKILL)
    for process in below:
        with suppress(psutil.Error):
            process.kill()  # whose number has another process by now is left alone
    for child in left:
        child.result()
    until = time.monotonic() + patience
    while any(map(_runs, below)) and time.monotonic() < until:
        time.sleep(0.05)


def _runs(process: psutil.Process) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
