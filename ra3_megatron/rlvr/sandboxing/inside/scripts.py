"""Whole programs: one process for each case, with the case's input as its stdin, forked from a clean one.

The process that forks them executes no code of the candidate and knows no expected output. It cannot be inspected by
its children (`protection.py`), and kills whatever a case leaves behind.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal itself imports enum
import os
import select
import sys

from .candidate import FILE, become_module
from .channel import Broken, Channel
from .codec import Decoder, Encoder, no_handle
from .protection import adopt, bound_cpu_time, protect, unprotect

TAIL = 2000
"""Bytes of a case's stderr that are reported."""


def serve_scripts(channel: Channel, code: str, cpu_seconds: int, isolated: bool) -> None:
    """Run a case for each message (its input and the most bytes of output) until the runner closes the channel.

    An answer is (ended, output, stderr's tail): ended is "exit N", "signal N" or "flood". cpu_seconds: of each process
    of a case; what this process takes to feed them is not the program's. isolated: this is a process namespace of its
    own, in which everything but the runner may be killed.
    """
    protect()
    if isolated:
        adopt()
    while True:
        try:
            data, most = Decoder(channel.receive(), no_handle, [], keep=False).decode()
        except Broken:
            return
        answer = run_case(channel, code, data, most, cpu_seconds, isolated)
        channel.send(Encoder(no_handle, [], keep=False).encode(answer))


def run_case(
    channel: Channel, code: str, data: bytes, most: int, cpu_seconds: int, isolated: bool
) -> tuple[str, bytes, bytes]:
    """One case in a process of its own."""
    pipes = [os.pipe() for _ in range(3)]
    child = os.fork()
    if child == 0:
        become_script(code, cpu_seconds, pipes)
    for (read, write), mine in zip(pipes, ("write", "read", "read"), strict=True):
        os.close(read if mine == "write" else write)
    stdin, stdout, stderr = pipes[0][1], pipes[1][0], pipes[2][0]
    outputs: dict[int, bytearray] = {stdout: bytearray(), stderr: bytearray()}
    flooded = relay(child, data, stdin, outputs, most)
    if flooded:
        os.kill(child, _signal.SIGKILL)
    if isolated:
        os.kill(-1, _signal.SIGKILL)
    else:
        _kill_group(child)
    for descriptor in outputs:
        os.close(descriptor)
    _, status = os.waitpid(child, 0)
    if isolated:
        _wait_for_all()
    if flooded:  # what was read of it may be more than can be passed on
        return "flood", b"", b""
    ended = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
    return ended, bytes(outputs[stdout]), bytes(outputs[stderr][-TAIL:])


def relay(child: int, data: bytes, stdin: int, outputs: dict[int, bytearray], most: int) -> bool:
    """Feed a child and collect what it writes, until it has ended: whether an output passed `most` bytes."""
    poll = select.poll()
    ended = os.pidfd_open(child)
    poll.register(ended, select.POLLIN)
    os.set_blocking(stdin, False)
    poll.register(stdin, select.POLLOUT)
    for descriptor in outputs:
        os.set_blocking(descriptor, False)
        poll.register(descriptor, select.POLLIN)
    rest: memoryview | None = memoryview(data)
    running, flooded = True, False
    while running and not flooded:
        for descriptor, _ in poll.poll():
            if descriptor == ended:
                running = False
            elif descriptor == stdin and rest is not None:
                try:
                    rest = rest[os.write(stdin, rest[:65536]) :] if rest else None
                except BlockingIOError:
                    continue
                except OSError:
                    rest = None
                if not rest:
                    poll.unregister(stdin)
                    os.close(stdin)
                    rest = None
            elif descriptor in outputs and not _read(descriptor, outputs[descriptor]):
                poll.unregister(descriptor)
            flooded = flooded or any(len(output) > most for output in outputs.values())
    if rest is not None:
        os.close(stdin)
    for descriptor, output in outputs.items():
        while len(output) <= most and _read(descriptor, output):
            pass
    os.close(ended)
    return flooded or any(len(output) > most for output in outputs.values())


def _read(descriptor: int, output: bytearray) -> bool:
    """Whether there was something to read."""
    try:
        piece = os.read(descriptor, 65536)
    except BlockingIOError:
        return False
    output += piece
    return bool(piece)


def _wait_for_all() -> None:
    """For what a case has left behind, which is killed: dead processes that nobody has waited for count."""
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        return


def _kill_group(leader: int) -> None:
    try:  # noqa: SIM105 (contextlib takes time to import)
        os.killpg(leader, _signal.SIGKILL)
    except OSError:
        pass


def become_script(code: str, cpu_seconds: int, pipes: list[tuple[int, int]]) -> None:
    """Execute the code as `__main__` and end the process as the interpreter would."""
    unprotect()
    bound_cpu_time(cpu_seconds)
    os.setsid()
    for number, (read, write) in enumerate(pipes):
        os.dup2(read if number == 0 else write, number)
    os.closerange(3, 65536)
    sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115
    sys.stderr = open(2, "w", errors="backslashreplace")  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    sys.argv = ["program.py"]
    namespace = become_module("__main__")
    namespace["__file__"] = "program.py"
    exec(compile(code, FILE, "exec", dont_inherit=True), namespace)
    sys.exit()
