"""The CPU time that the program takes for one test, as the runner sees it.

RLIMIT_CPU bounds each process of the program over all tests. This bounds them together in each test: with their
threads, and with their children, those that live and those that somebody waited for.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal itself imports enum
import os
import select

from .channel import Broken

LOOK_MILLISECONDS = 100
"""Between two looks while the program computes."""


class CpuClock:
    """Bounds the CPU time of a test, and ends the program behind the bound.

    child: the program's process. isolated: this is the first process of a name space, and all others are the program's.
    """

    def __init__(self, child: int, seconds: int, isolated: bool) -> None:
        self.child = child
        self.seconds = seconds
        self.isolated = isolated
        self.ticks = os.sysconf("SC_CLK_TCK")
        self.most = 0
        """Of all tests, in ticks. It never falls: a child moves from its own count to its parent's, in between it is in
        neither."""
        self.begun = 0

    def begin(self) -> None:
        """A test begins. The end of the one before was looked at."""
        self.begun = self.most

    def over(self) -> bool:
        """Whether the test has taken more; the program has ended then."""
        if self._look() - self.begun <= self.seconds * self.ticks:
            return False
        try:  # noqa: SIM105 (contextlib takes time to import)
            os.kill(-1 if self.isolated else self.child, _signal.SIGKILL)
        except ProcessLookupError:
            pass
        return True

    def wait(self, descriptor: int) -> None:
        """Until there is something to read. Raises Broken when the test has taken more."""
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while not poll.poll(LOOK_MILLISECONDS):
            if self.over():
                raise Broken(self.told)

    @property
    def told(self) -> str:
        """What to show a reader."""
        return f"more than {self.seconds} seconds of CPU time"

    def _look(self) -> int:
        processes = [str(self.child)]
        if self.isolated:
            processes = [name for name in os.listdir("/proc") if name.isdigit() and name != "1"]
        used = 0
        for process in processes:
            try:
                file = os.open(f"/proc/{process}/stat", os.O_RDONLY)
            except OSError:  # it has ended
                continue
            try:
                fields = os.read(file, 4096).rpartition(b")")[2].split()  # a name may be any bytes
            except OSError:
                continue
            finally:
                os.close(file)
            used += sum(map(int, fields[11:15]))  # utime, stime, and those of the children that were waited for
        self.most = max(self.most, used)
        return self.most
