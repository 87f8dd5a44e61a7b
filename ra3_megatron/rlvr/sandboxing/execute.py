"""One command, started, fed, watched and ended: nothing of it is left when this returns."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ra3_megatron.rlvr.sandboxing.limits import Ended, Limits, SandboxError
from ra3_megatron.rlvr.sandboxing.memory import descendants, files_of, memory_of

WATCH_SECONDS = 0.05
"""Between two looks at the memory."""
START_SECONDS = 60.0
"""For a command to come to life, on a machine that is very busy."""
PIECE = 65536


@dataclass
class Watched:
    """A running command."""

    process: subprocess.Popen[bytes]
    status: int | None
    """Where bwrap's reports arrive; None without it."""
    reported: dict[str, Any] = field(default_factory=dict)
    begun: bytearray = field(default_factory=bytearray)
    """Of the report that is being written."""
    gone: bool = False

    def read_status(self) -> None:
        """Take in what bwrap has reported: the number of the first process inside, its exit code."""
        while self.status is not None and _take(self.status, self.begun):
            pass
        *lines, self.begun[:] = self.begun.split(b"\n")
        for line in lines:
            self.reported |= json.loads(line)

    def first(self) -> int | None:
        """The first process inside, by its number here."""
        self.read_status()
        return self.reported.get("child-pid")

    def kill(self) -> None:
        """End every process of the command, and see them gone."""
        if self.gone:
            return
        pid = self.process.pid
        if self.status is None:
            _kill(os.killpg, pid)
        first = self.first()
        if first is not None and first in descendants(pid):
            # With the first process of the name space the kernel kills all others; it is gone when they are, and bwrap
            # ends when it is.
            _kill(os.kill, first)
            self._wait()
        _kill(os.kill, pid)
        if not self._wait():
            raise SandboxError(f"process {pid} does not end")
        self.gone = True

    def _wait(self) -> bool:
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            return False
        return True


def execute(
    argv: Sequence[str] | Callable[[int], Sequence[str]],
    limits: Limits,
    stdin: bytes,
    output_bytes: int,
    env: Mapping[str, str],
    cwd: str,
    pass_fds: Sequence[int] = (),
    started: bytes = b"",
) -> tuple[Ended, dict[str, Any]]:
    """Run a command line: how it ended, and what bwrap reported.

    argv: the words, or a function of the file descriptor for bwrap's reports that gives them. output_bytes: the most
    that is read of stdout. started: what stdout begins with when the command has come to life; the clock runs from then
    (Ended.seconds from the very beginning).

    Raises OSError when the process cannot be started, SandboxError when it cannot be ended.
    """
    begin = time.monotonic()
    status, told = os.pipe() if callable(argv) else (None, None)
    try:
        process = subprocess.Popen(
            argv(told) if callable(argv) else argv,  # type: ignore[arg-type]
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(env),
            cwd=cwd,
            start_new_session=True,
            pass_fds=(*pass_fds, *(() if told is None else (told,))),
        )
    except BaseException:
        if status is not None:
            os.close(status)
        raise
    finally:
        if told is not None:
            os.close(told)
    if status is not None:
        os.set_blocking(status, False)
    watched = Watched(process, status)
    try:
        ended = _follow(watched, limits, stdin, output_bytes, begin, started)
        watched.read_status()
        return ended, watched.reported
    finally:
        watched.kill()
        if status is not None:
            os.close(status)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def _follow(watched: Watched, limits: Limits, stdin: bytes, output_bytes: int, begin: float, started: bytes) -> Ended:
    process = watched.process
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    out, err = process.stdout.fileno(), process.stderr.fileno()
    outputs = {out: bytearray(), err: bytearray()}
    most = {out: output_bytes, err: limits.output_kib * 1024}
    into = process.stdin.fileno()
    rest = memoryview(stdin)
    exited = os.pidfd_open(process.pid)
    timed_out = out_of_memory = flooded = False
    with selectors.DefaultSelector() as selector:
        selector.register(exited, selectors.EVENT_READ)
        for descriptor in outputs:
            os.set_blocking(descriptor, False)
            selector.register(descriptor, selectors.EVENT_READ)
        os.set_blocking(into, False)
        selector.register(into, selectors.EVENT_WRITE)
        running, next_look = True, begin + WATCH_SECONDS
        alive = not started
        deadline = begin + (limits.seconds if alive else START_SECONDS)
        try:
            while running and not (timed_out or out_of_memory or flooded):
                now = time.monotonic()
                if not alive and outputs[out].startswith(started):
                    alive, deadline = True, now + limits.seconds
                if now >= deadline:
                    timed_out = True
                    break
                if now >= next_look:
                    out_of_memory = _uses(watched, limits.disk_mib * 2**20) > limits.memory_mib * 2**20
                    next_look = time.monotonic() + WATCH_SECONDS
                for key, _ in selector.select(max(0.0, min(next_look, deadline) - now)):
                    if key.fd == exited:
                        running = False
                    elif key.fd == into:
                        try:
                            rest = rest[os.write(into, rest[:PIECE]) :]
                        except BlockingIOError:
                            continue
                        except OSError:
                            rest = rest[:0]
                        if not rest:
                            selector.unregister(into)
                            process.stdin.close()
                    elif not _take(key.fd, outputs[key.fd]):
                        selector.unregister(key.fd)
                    flooded = any(len(output) > most[descriptor] for descriptor, output in outputs.items())
        finally:
            os.close(exited)
            watched.kill()
    for descriptor, output in outputs.items():
        while len(output) <= most[descriptor] and _take(descriptor, output):
            pass
        flooded = flooded or len(output) > most[descriptor]
        del output[most[descriptor] :]
    stdout, stderr = (bytes(output) for output in outputs.values())
    seconds = time.monotonic() - begin
    return Ended(process.returncode, stdout, stderr, timed_out, out_of_memory, flooded, seconds)


def _uses(watched: Watched, disk: int) -> int:
    """Bytes of memory of all processes and of the temporary files."""
    first = watched.first()
    return memory_of(descendants(watched.process.pid)) + (0 if first is None else files_of(first, disk))


def _take(descriptor: int, output: bytearray) -> bool:
    """Whether there was something to read."""
    try:
        piece = os.read(descriptor, PIECE)
    except BlockingIOError:
        return False
    output += piece
    return bool(piece)


def _kill(how: Callable[[int, int], None], pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        how(pid, signal.SIGKILL)
