"""What a command in the sandbox may use, how it ended, and what failed when the sandbox itself did."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import StrEnum

from ra3_megatron.config.errors import UserError


class Isolation(StrEnum):
    """What stands between a command and this machine."""

    BUBBLEWRAP = "bubblewrap"
    UNSAFE = "subprocess-unsafe"


@dataclass(frozen=True)
class Limits:
    """Bounds of one command. Raises UserError for a bound that leaves nothing to run in."""

    seconds: float = 10.0
    """Wall clock."""
    cpu_seconds: float | None = None
    """CPU time of each process of a command, and of each test of a program; None: seconds + 1."""
    memory_mib: int = 512
    """All processes together with their temporary files, and the address space of each process."""
    processes: int = 16
    """Processes and threads at once. Not bounded without isolation."""
    disk_mib: int = 16
    """Temporary files in all, and the largest file."""
    open_files: int = 64
    """File descriptors of each process."""
    output_kib: int = 256
    """stdout and stderr, each; more is a failure, and is read no further."""

    def __post_init__(self) -> None:
        least = {"seconds": 0.1, "cpu_seconds": 0.1, "memory_mib": 64, "processes": 4, "open_files": 16}
        for field in fields(self):
            value = getattr(self, field.name)
            bound = least.get(field.name, 1)
            if value is not None and not value >= bound:
                raise UserError(f"sandbox: {field.name}={value} is too little, the least is {bound}")

    @property
    def cpu_bound(self) -> int:
        """Whole seconds of CPU time, at least one."""
        return max(1, math.ceil(self.seconds + 1 if self.cpu_seconds is None else self.cpu_seconds))

    def cpu_bound_of(self, tests: int) -> int:
        """Of a process that loads a program and lives for so many tests: not more than the wall clock allows it."""
        return max(self.cpu_bound, min(self.cpu_bound * (tests + 1), math.ceil(self.seconds + 1)))


class SandboxError(RuntimeError):
    """The sandbox itself failed, several times. It says nothing about the program."""


@dataclass(frozen=True)
class Ended:
    """How a command ended. returncode: -N for signal N; 137 may be one of the bounds or a kill in the sandbox."""

    returncode: int
    stdout: bytes
    stderr: bytes
    timed_out: bool
    out_of_memory: bool
    flooded: bool
    seconds: float
