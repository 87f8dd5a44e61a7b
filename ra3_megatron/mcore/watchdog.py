"""Notices a process that has stopped moving, says where it stands, and ends it, so that a job script can start anew.

One process of a layout that stalls makes all others wait in a collective. None of them gets a heartbeat any more, so
the watchdog of each writes the stacks of all its Python threads to `stacks/START-rank-R.txt` in the run folder: most
show the same collective, and the one that stands elsewhere is the one to look at. Then the process ends with `HUNG`.

Heartbeats: `beat` behind every training step and every chunk of an infusion, and `touch` at every pass through the
model and every round of sampling. Time does not count before the first `beat` of a phase (it loads, and the first step
compiles), nor within `paused` (checkpoints are written); what hangs there is left to the process groups' timeout,
which is `SLACK_MINUTES` longer, so that the watchdog speaks first.

SIGUSR2 writes the stacks to stderr at any moment, and the process goes on. There is one watchdog a process; without it
all functions here do nothing. It is a thread of Python: a call that never gives the interpreter back silences it.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ra3_megatron.config.errors import HUNG
from ra3_megatron.mcore.startup import Runtime

SLACK_MINUTES = 10.0
"""Process groups wait this much longer than the watchdog."""
OTHERS_SECONDS = 60.0
"""A process that has written its stacks waits for those of the others, at most so long: the first one that ends makes
a launcher end the rest."""
FOLDER = "stacks"


def group_minutes(timeout_minutes: float | None) -> float:
    """Timeout of process groups beside a watchdog with this one (None: there is none)."""
    return (30.0 if timeout_minutes is None else timeout_minutes) + SLACK_MINUTES


class Watchdog:
    """Counts the time since the last heartbeat."""

    def __init__(self, folder: Path, start: str, runtime: Runtime, timeout: float) -> None:
        """folder, start: of the files; timeout: seconds."""
        self._folder, self._start, self._timeout = folder, start, timeout
        self._rank, self._world_size = runtime.rank, runtime.world_size
        self._last, self._at = "", time.monotonic()
        self._counting = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, where: str) -> None:
        """The process is alive, and has got so far."""
        self._last, self._at, self._counting = where, time.monotonic(), True

    def touch(self) -> None:
        """The process is alive."""
        self._at = time.monotonic()

    def rest(self) -> bool:
        """Do not count until the next `beat`; whether it counted."""
        counted, self._counting = self._counting, False
        return counted

    def count(self) -> None:
        """Count again, from now."""
        self._at, self._counting = time.monotonic(), True

    def close(self) -> None:
        """Watch no longer."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._timeout / 10)):
            counting = self._counting  # read first: who counts again sets the time before
            silent = time.monotonic() - self._at
            if counting and silent > self._timeout:
                self._end(silent)

    def _end(self, silent: float) -> None:
        """Write stacks, say so, and end the process: nothing that waits for another one may run."""
        path, where = self._file(self._rank), _main_thread()
        said = f"no heartbeat for {silent:.0f} s; the last one: {self._last}; it stands in {where}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            with partial.open("w") as file:
                file.write(f"rank {self._rank}: {said}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            partial.rename(path)
            stacks = f"stacks of its threads are in {path}"
        except OSError as problem:
            stacks = f"its stacks cannot be written ({problem})"
        sys.stderr.write(f"ra3: rank {self._rank} hangs: {said}; {stacks}; the same command with --resume goes on\n")
        sys.stderr.flush()
        end = time.monotonic() + min(OTHERS_SECONDS, self._timeout)
        while time.monotonic() < end and not all(self._file(rank).is_file() for rank in range(self._world_size)):
            time.sleep(0.2)
        os._exit(HUNG)

    def _file(self, rank: int) -> Path:
        return self._folder / f"{self._start}-rank-{rank}.txt"


def _main_thread() -> str:
    """The function that the main thread is in."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "?" if frame is None else f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


_watchdog: Watchdog | None = None


@contextmanager
def watching(run: Path, runtime: Runtime, timeout_minutes: float | None) -> Iterator[None]:
    """Within it this process is watched, and SIGUSR2 shows its stacks. Collective.

    run: folder that gets the stacks. timeout_minutes: without a heartbeat; None: only SIGUSR2.
    """
    global _watchdog
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
    start = runtime.broadcast(time.strftime("%Y%m%d-%H%M%S"))
    if timeout_minutes is not None:
        _watchdog = Watchdog(run / FOLDER, start, runtime, 60 * timeout_minutes)
    try:
        yield
    finally:
        if _watchdog is not None:
            _watchdog.close()
            _watchdog = None
        faulthandler.unregister(signal.SIGUSR2)


def beat(where: str) -> None:
    """This process is alive, and has got so far; it is watched from now on."""
    if _watchdog is not None:
        _watchdog.beat(where)


def touch() -> None:
    """This process is alive."""
    if _watchdog is not None:
        _watchdog.touch()


def rest() -> None:
    """What comes now may take long: do not count until the next `beat`."""
    if _watchdog is not None:
        _watchdog.rest()


@contextmanager
def paused() -> Iterator[None]:
    """Time within it does not count."""
    counted = _watchdog is not None and _watchdog.rest()
    try:
        yield
    finally:
        if _watchdog is not None and counted:
            _watchdog.count()
