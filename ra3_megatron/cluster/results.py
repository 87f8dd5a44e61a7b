"""What a check found on a node, and what may be asked of an allocation."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "warn", "bad"]

BAD_ALLOCATION = 3
"""Exit code of `ra3 preflight` on nodes that are not fit to train on."""


@dataclass(frozen=True)
class Result:
    """One line: what one check found on one node."""

    node: str
    check: str
    state: State
    text: str
    """The measured value, and for what is not ok what would be right."""
    figure: str = ""
    """The value as the table shows it."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `Result(**…)` reads it."""
        return asdict(self)


@dataclass(frozen=True)
class Limits:
    """What is asked of an allocation. All are limits of "something is broken", none is a target."""

    gpus_per_node: int | None = None
    """GPUs that each node must have; 0: processes run on the CPU; none: whatever there is."""
    mib: float | None = None
    """Mebibytes that are reduced over all processes; none: 64 on GPUs, 16 on CPUs."""
    min_bus_gbs: float | None = None
    """GB/s of bus bandwidth that the reduction must reach; none: on GPUs 10 between nodes and 100 inside one, on CPUs
    no limit."""
    min_free_gib: float = 10.0
    """GiB that must be free for the run folder."""
    min_tmp_gib: float = 1.0
    """GiB that must be free in the folder for temporary files of each node."""
    max_skew: float = 5.0
    """Seconds that the clock of a node may differ from that of the first process's node."""
    timeout: float = 60.0
    """Seconds for everything; processes must have met after three quarters of them."""
    arithmetic: float = 1.0
    """Seconds for which a process asks its processors for known answers, and then its GPU; 0: not at all."""
    sandbox: bool = False
    """Programs that a model writes are going to be executed behind bubblewrap."""


def could_not(node: str, check: str, error: Exception) -> Result:
    """A check that raised."""
    return Result(node, check, "bad", f"could not be checked ({type(error).__name__}: {first_line(error)})")


def first_line(error: Exception) -> str:
    """What an error says, without torch's stack traces."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
