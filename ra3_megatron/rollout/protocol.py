"""What every rollout engine offers: token ids in; token ids, behaviour log-probabilities, finish reason, version out.

Two calls. `generate` continues prompts freely. `advance` is the unit of the jump-ahead sampler: given the ids so far
and the expert's next lines, it finds the first line at which the policy decides to think, and samples that thought.

Sampling is by inverse cumulative distribution from uniforms that the *request* carries, so a result depends on the
request and the weights alone: not on the batch, the engine's state or the number of processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

Uniforms = npt.NDArray[np.float64]


class Finish(StrEnum):
    """Why sampling ended."""

    END = "end"
    """A token that ends the thought (or the continuation) was sampled, or its text met a stop."""
    LENGTH = "length"
    """The largest number of tokens was reached."""
    ACT = "act"
    """No thought was taken up to the last line."""


@dataclass(frozen=True)
class GenerateRequest:
    """Continue `prompt` with at most `len(uniforms)` tokens of the set `allowed`, until one of the set `stop`."""

    prompt: Sequence[int]
    uniforms: Uniforms
    allowed: int = 0
    """Row of the table of token sets."""
    stop: frozenset[int] = frozenset()
    greedy: bool = False
    """Take the most probable allowed token instead of sampling."""
    top_p: float = 1.0
    """Sample among the most probable allowed tokens alone that together have at least this probability. It does not
    change log-probabilities, which are those of the whole set."""
    goes_on: bool = False
    """A request for what follows may come next: keep what was computed, unless that is kept anyway."""


@dataclass(frozen=True)
class Completion:
    """A sampled continuation."""

    ids: list[int]
    log_probs: list[float]
    """log q(token | allowed tokens) of each id."""
    finish: Finish
    weight_version: int


@dataclass(frozen=True)
class PlannedLine:
    """One of the expert's next lines as the engine sees it."""

    before: tuple[int, ...]
    """Ids before the position at which the decision is read."""
    act: tuple[int, ...]
    """Ids from there on when no thought is taken: the marker, if the format has one, and the line."""
    think_set: int
    """Row of the token set that starts a thought here."""
    offered: bool
    """Whether there is a choice."""
    think: bool | None = None
    """The decision, where there is a choice and it is taken already, however improbable; None: the policy decides."""


@dataclass(frozen=True)
class LatentRequest:
    """Decide the next lines of one transcript in order, up to and including the first thought."""

    key: int
    """Identifies the transcript, so that an engine may keep its key/value cache between calls."""
    context: Sequence[int]
    """Ids so far."""
    lines: Sequence[PlannedLine]
    """The expert's next lines."""
    uniforms: Uniforms
    """[lines, 1 + largest thought]: column 0 takes the decision, the others the thought's tokens."""
    last: bool = False
    """These are the transcript's last lines: without a thought in them, no request for it follows."""


@dataclass(frozen=True)
class LatentCompletion:
    """The decisions taken."""

    decision_log_probs: list[float]
    """log q(<act>) of each line before the thought (0 where there was no choice)."""
    thought_line: int | None
    """Index into the request's lines of the line that got a thought; None: no line did."""
    thought: list[int]
    """Sampled ids of the thought; the first one takes the decision."""
    thought_log_probs: list[float]
    finish: Finish
    weight_version: int


def first_thought(request: LatentRequest, log_act: Sequence[float]) -> int | None:
    """The first line of `request` at which the decision is to think; None: none. log_act: log q(<act>) of each line.

    Uniforms decide where lines do not say: q(<think>) = 1 - q(<act>) is exactly 0 where log q(<act>) rounds to 0.
    """
    lines = request.lines[: len(log_act)]
    thinks = request.uniforms[: len(log_act), 0] < -np.expm1(np.array(log_act, dtype=np.float64))
    taken = [
        line.offered and (bool(drawn) if line.think is None else line.think)
        for line, drawn in zip(lines, thinks, strict=True)
    ]
    return taken.index(True) if True in taken else None


class RolloutEngine(Protocol):
    """An engine that samples with one version of the weights at a time."""

    weight_version: int

    @property
    def piece(self) -> int:
        """Tokens of a continuation after which its text is looked at (rollout/pieces.py)."""
        ...

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Sample a continuation of each prompt."""
        ...

    def advance(self, requests: Sequence[LatentRequest]) -> list[LatentCompletion]:
        """Decide each transcript's next lines up to its first thought."""
        ...

    def forget(self) -> None:
        """Drop every cache (after the weights changed, or when a batch of transcripts is done)."""
        ...

    def finish(self) -> None:
        """This replica of the model has sampled its share: go on only when those have that need its help."""
        ...
