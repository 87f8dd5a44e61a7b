"""A signal that asks a run to save and stop: SIGUSR1 (Slurm's `--signal`), or SIGTERM (a preemption, `scancel`).

The processes of a run get it at different moments, or only some of them do; they stop together, behind the same step.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from ra3_megatron.mcore.startup import Runtime

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopAsked(Exception):
    """Work that takes long was left, because of the signal that it names."""

    def __init__(self, signal: str) -> None:
        super().__init__(signal)
        self.signal = signal


class StopRequest:
    """Remembers that a signal came."""

    def __init__(self) -> None:
        self._number = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, signals are remembered instead of ending the process. Does nothing outside of the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self, runtime: Runtime) -> str | None:
        """Name of a signal that came to any process; None when none did. Collective."""
        number = self._number
        if runtime.world_size > 1:
            seen = torch.tensor([number], device=runtime.device)
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
            number = int(seen)
        return signal.Signals(number).name if number else None

    def check(self, runtime: Runtime) -> None:
        """Raise StopAsked on every process once a signal came to any. Collective."""
        if (signal := self.agreed(runtime)) is not None:
            raise StopAsked(signal)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._number = number
