"""What a study hands back: numbers, and one verdict a claim."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Outcome = Literal["confirmed", "refuted", "undecided"]

Done = Callable[[], None]
"""Called by a study after each of its units of work."""


@dataclass(frozen=True)
class Cell:
    """The place of a verdict in a table of many alike, and its figure there."""

    row: str
    column: str
    figure: str


@dataclass(frozen=True)
class Verdict:
    """A claim, how it came out, and the figures that say so. `cell`: only for one of many alike."""

    claim: str
    outcome: Outcome
    evidence: str
    cell: Cell | None = None


@dataclass(frozen=True)
class Study:
    """The result of one study; `numbers` is JSON-ready and holds all that its figure needs."""

    title: str
    numbers: dict[str, Any]
    verdicts: list[Verdict] = field(default_factory=list)


def verdict(claim: str, holds: bool, evidence: str) -> Verdict:
    """A claim that is true or false of exact numbers."""
    return Verdict(claim, "confirmed" if holds else "refuted", evidence)


def nothing() -> None:
    """A `Done` that shows nothing."""
