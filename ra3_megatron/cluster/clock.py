"""Clocks of the nodes against that of the first: locks and time stamps go wrong when they differ."""

import time

from ra3_megatron.cluster.meeting import Meeting, Silent
from ra3_megatron.cluster.results import Limits, Result

CHECK = "clock"
ROUNDS = 3


def now() -> float:
    """Seconds of this node's clock."""
    return time.time()


def answer(meeting: Meeting, rank: int) -> None:
    """On a node's leading process: tell the time whenever the first process asks."""
    for turn in range(ROUNDS):
        meeting.get(f"clock/ask/{rank}/{turn}")
        meeting.put(f"clock/told/{turn}/{rank}", now())


def compare(meeting: Meeting, leaders: dict[int, str], limits: Limits) -> list[Result]:
    """On the first process: the offset of each leader's clock (rank -> node), with its error. Silent."""
    found = []
    for rank, node in leaders.items():
        if rank == 0:
            found.append(Result(node, CHECK, "ok", "the clock that others are compared with", "0"))
            continue
        samples = []
        for turn in range(ROUNDS):
            before = now()
            meeting.put(f"clock/ask/{rank}/{turn}", True)
            told = meeting.collect(f"clock/told/{turn}", [rank])
            if not told:
                raise Silent([rank])
            samples.append((before, told[rank], now()))
        found.append(judge(node, *offset(samples), limits.max_skew))
    return found


def offset(samples: list[tuple[float, float, float]]) -> tuple[float, float]:
    """(seconds that a clock is ahead, error) from (asked, told, heard): the quickest answer bounds the error best."""
    asked, told, heard = min(samples, key=lambda sample: sample[2] - sample[0])
    return told - (asked + heard) / 2, (heard - asked) / 2


def judge(node: str, seconds: float, error: float, limit: float) -> Result:
    """Bad when the clock is off by more than the limit, whatever the error of the measurement."""
    text = f"{seconds:+.3f} s (± {error:.3f}) against the first node"
    bad = abs(seconds) - error > limit
    return Result(
        node,
        CHECK,
        "bad" if bad else "ok",
        f"{text}, should be within {limit:g} s (--max-skew): is NTP running?" if bad else text,
        f"{seconds:+.3f}",
    )
