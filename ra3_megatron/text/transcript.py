"""The one transcript type: token ids of a document and its latents, with the role of every token.

A document a_0 … a_T is a sequence of primitive actions ("lines"); between them stand latents z_t. Everything that
samples, scores, trains on, stores or prints a latent goes through `Transcript`. A document without thoughts is a
transcript too (`think` is False everywhere).

Positions: `ids[j]` is predicted from `ids[:j]`. The decision of line t is read at `decision_positions[t]`: the first
token of the line that a latent put there (DECISION or THOUGHT), else the line's first EXPERT token, whose being no
thought is the decision <act> (method.md, Objective).
"""

from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property

import numpy as np
import numpy.typing as npt


class Role(IntEnum):
    """What a token is to the algorithm."""

    CONTEXT = 0
    """Before the first line (beginning-of-sequence, a prompt); never scored, never sampled."""
    EXPERT = 1
    """The expert's line from its first to its last visible token: the scored a_t."""
    LAYOUT = 2
    """The expert's indentation, line break and end-of-sequence: trained on, never part of the scored a_t."""
    DECISION = 3
    """A marker that holds a decision and nothing else (`tokens` format)."""
    THOUGHT = 4
    """A sampled (or observed) token of a thought; in the `comment` format its first one holds the decision."""
    FORCED = 5
    """Written by the format without a choice: a forced end of a thought, the repeated indentation."""


EXPERT_ROLES = (Role.EXPERT, Role.LAYOUT)
"""Roles whose tokens make up the expert's document, each exactly once, thoughts or not."""


@dataclass(frozen=True, eq=False)
class Transcript:
    """Token ids, the role and line of each token, and what the sampler knew. Arrays are not to be written to."""

    ids: npt.NDArray[np.int32]
    """Token ids, [tokens]."""
    roles: npt.NDArray[np.uint8]
    """`Role` of each token, [tokens]."""
    lines: npt.NDArray[np.int32]
    """Index of the primitive action that each token belongs to (a thought: the action it governs first); -1 for
    CONTEXT, [tokens]."""
    offered: npt.NDArray[np.bool_]
    """Whether a thought could have been taken at each line, [lines]; False: no choice, so no gradient."""
    log_probs: npt.NDArray[np.float32] | None = None
    """Behaviour log-probability of each sampled choice at the token that shows it (a decision position or a THOUGHT
    token), 0 elsewhere, [tokens]; None for a document nobody sampled."""
    weight_version: int = -1
    """Version of the weights that sampled it; -1: nobody."""
    document: str = ""
    """Identifier of the document it was made from."""

    @property
    def num_tokens(self) -> int:
        """Tokens in all."""
        return len(self.ids)

    @property
    def num_lines(self) -> int:
        """Primitive actions."""
        return len(self.offered)

    @cached_property
    def decision_positions(self) -> npt.NDArray[np.int64]:
        """Index into `ids` of the token at which the decision of each line is read, [lines]."""
        latent = np.isin(self.roles, (Role.DECISION, Role.THOUGHT))
        return np.where(self._first(latent) >= 0, self._first(latent), self.first_expert)

    @cached_property
    def first_expert(self) -> npt.NDArray[np.int64]:
        """Index into `ids` of the first visible token of each line, [lines]."""
        return self._first(self.roles == Role.EXPERT)

    @cached_property
    def think(self) -> npt.NDArray[np.bool_]:
        """Whether each line starts a new thought, [lines]."""
        return np.bincount(self.lines[self.roles == Role.THOUGHT], minlength=self.num_lines).astype(bool)

    @cached_property
    def is_code(self) -> npt.NDArray[np.bool_]:
        """Tokens of the expert's document (EXPERT or LAYOUT), [tokens]."""
        return np.isin(self.roles, EXPERT_ROLES)

    @cached_property
    def is_given(self) -> npt.NDArray[np.bool_]:
        """Tokens before the first line (CONTEXT), [tokens]."""
        return self.roles == Role.CONTEXT

    def thought_slice(self, line: int) -> slice:
        """Where the sampled tokens of the thought of `line` stand in `ids` (empty when it has none)."""
        where = np.flatnonzero((self.lines == line) & (self.roles == Role.THOUGHT))
        return slice(int(where[0]), int(where[-1]) + 1) if len(where) else slice(0, 0)

    def without_log_probs(self) -> "Transcript":
        """The same transcript as a plain document to train on."""
        return replace(self, log_probs=None)

    def _first(self, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        first = np.full(self.num_lines, -1, dtype=np.int64)
        where = np.flatnonzero(mask & (self.lines >= 0))[::-1]
        first[self.lines[where]] = where
        return first

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Transcript):
            return NotImplemented
        return (
            np.array_equal(self.ids, other.ids)
            and np.array_equal(self.roles, other.roles)
            and np.array_equal(self.lines, other.lines)
            and np.array_equal(self.offered, other.offered)
        )

    __hash__ = None  # type: ignore[assignment]
