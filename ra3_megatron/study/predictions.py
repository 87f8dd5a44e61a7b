"""The predictions of HopProg, written down before any run, and their verdicts, whatever comes.

A verdict is a function of figures with 95% intervals over seeds (Student's t; three seeds at least): confirmed when the
whole interval is on the predicted side, refuted when it is on the other, undecided otherwise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ra3_megatron.study.comparison import mean_of
from ra3_megatron.study.intervals import t_interval

Word = Literal["confirmed", "refuted", "undecided", "not run"]


@dataclass(frozen=True)
class Estimate:
    """A figure over seeds."""

    mean: float
    low: float | None
    """Ends of the 95% interval; None with fewer than three seeds."""
    high: float | None
    seeds: int

    def text(self, form: str = "{:.3f}") -> str:
        """In words."""
        value = form.format(self.mean)
        if self.low is None or self.high is None:
            return f"{value} ({self.seeds} seed{'s' if self.seeds > 1 else ''})"
        return f"{value} [{form.format(self.low)}, {form.format(self.high)}]"


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and interval over seeds; None without any."""
    mean = mean_of(list(values))
    if mean is None:
        return None
    low, high = t_interval(list(values)) or (None, None)
    return Estimate(mean, low, high, len(values))


@dataclass(frozen=True)
class Verdict:
    """One prediction and what became of it."""

    name: str
    """P1, N1, …"""
    claim: str
    """What was predicted."""
    word: Word
    seen: str
    """The figures behind the word."""


def above(found: Estimate | None, limit: float) -> Word:
    """Whether a figure is above a limit."""
    if found is None:
        return "not run"
    if found.low is None or found.high is None:
        return "undecided"
    return "confirmed" if found.low > limit else "refuted" if found.high < limit else "undecided"


def decided(values: Sequence[float | None], judge: Callable[[Estimate | None], Word]) -> tuple[Estimate | None, Word]:
    """The figure over seeds and the word of `judge` on it; undecided where a seed has no case to count (None)."""
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return None, "undecided"
    found = estimate(there)
    return found, judge(found)


def below(found: Estimate | None, limit: float) -> Word:
    """Whether a figure is below a limit."""
    word = above(found, limit)
    opposite: dict[Word, Word] = {"confirmed": "refuted", "refuted": "confirmed"}
    return opposite.get(word, word)


def both(*words: Word) -> Word:
    """Confirmed when all are; refuted when one is; not run when one was not."""
    for word in ("not run", "refuted", "undecided"):
        if word in words:
            return word
    return "confirmed"
