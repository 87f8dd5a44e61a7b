"""Latent formats: how <act>, <think> and a thought are written between primitive actions.

A line is `indent` (whitespace tokens before its first visible token), `body` (first to last visible token) and `tail`
(whitespace tokens after it). What a format writes around a line:

    comment   act:   indent  body  tail
              think: indent  thought…  [forced end]  indent again  body  tail
    tokens    act:   <act>   indent  body  tail
              think: <think> thought… </think>  indent  body  tail

In the `comment` format the decision is read at the line's first visible token. That token may carry whitespace w
inside (" return"), so a thought at the same indentation starts with a token whose bytes are w + "#…": the set T(w).
Where the vocabulary has no such token, and before a human comment, no thought is offered.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ra3_megatron.config.data import TextConfig
from ra3_megatron.config.errors import UserError
from ra3_megatron.text.segment import WHITESPACE
from ra3_megatron.text.tokenizer import Tokenizer
from ra3_megatron.text.transcript import Role
from ra3_megatron.text.vocabulary import ACT, END_THINK, MARKERS, THINK

SPACE_BYTES = WHITESPACE.encode()

Written = tuple[tuple[int, ...], tuple[Role, ...]]
"""Token ids and the role of each."""

_NOTHING: Written = ((), ())


@dataclass(frozen=True)
class Line:
    """One primitive action, tokenized."""

    indent: tuple[int, ...]
    """Whitespace tokens before the first visible one."""
    body: tuple[int, ...]
    """First to last visible token; the first may carry whitespace before its text, the last a line break after it."""
    tail: tuple[int, ...]
    """Whitespace tokens after the body: line break and blank lines."""
    think_set: int
    """Row of `LatentFormat.sets`: the tokens that would start a thought here; 0 when none can."""
    may_think: bool
    """The format allows a thought here."""

    @property
    def ids(self) -> tuple[int, ...]:
        """All its token ids."""
        return self.indent + self.body + self.tail


class LatentFormat(ABC):
    """Token sets and fixed tokens of one way to write latents, for one tokenizer."""

    ALL: ClassVar[int] = 0
    """Row of `sets` that holds every token."""

    name: ClassVar[str]
    """`text.latent_format` that stands for it."""
    implicit_decision: ClassVar[bool]
    """<act> is not a token of its own: the line's first visible token carries the decision."""
    first_role: ClassVar[Role]
    """Role of the first sampled token of a thought."""

    sets: npt.NDArray[np.bool_]
    """Token sets, [rows, vocab_size]; the same rows for the whole run."""
    universe: int
    """Row over which the decision is normalised."""
    thought_set: int
    """Row from which the second and further tokens of a thought are sampled."""
    no_thought_set: int
    """Row of the tokens that can start no thought anywhere, for free continuations without thoughts. It does not depend
    on the place, so in the `comment` format a "#" that a token starts with inside a line is not in it either."""
    think_set_of_token: npt.NDArray[np.int16]
    """Row of the tokens that start a thought where each token would be the line's first EXPERT one, [vocab_size]; 0
    when there are none."""
    ends: npt.NDArray[np.bool_]
    """Tokens that end a thought, [vocab_size]."""
    forced_end: tuple[int, ...]
    """Tokens that end a thought which was cut at its greatest length."""
    max_thought_ids: int
    """Greatest number of sampled ids of a thought, the first one (which decides to think) included."""

    def ends_thought(self, index: int) -> bool:
        """Whether the token ends a thought."""
        return bool(self.ends[index])

    @abstractmethod
    def think_set_of(self, body: Sequence[int]) -> int:
        """Row of the tokens that would start a thought before a line with this body; 0 when none can."""

    @abstractmethod
    def act_set(self, think_set: int) -> int:
        """Row that stands for <act> where `think_set` stands for <think>; `ALL` where there is no choice."""

    @abstractmethod
    def before_decision(self, line: Line) -> Written:
        """What stands before the decision of `line`."""

    @abstractmethod
    def act(self, line: Line) -> Written:
        """What <act> writes."""

    @abstractmethod
    def after_thought(self, line: Line) -> Written:
        """What stands between a thought (its end included) and the action."""

    @abstractmethod
    def action(self, line: Line) -> Written:
        """The primitive action itself, without what `before_decision` wrote of it."""

    @abstractmethod
    def thought(self, text: str, line: Line, indentation: str, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids that a sampler would have sampled to say `text` before `line`; () when it cannot be said there.

        `indentation` is the whitespace that the line starts with. The ids start with the deciding token, and are cut
        at `max_thought_ids`.
        """

    def check_thought(self, ids: Sequence[int], line: Line) -> None:
        """Raise ValueError unless `ids` could have been sampled before `line`."""
        if not line.may_think:
            raise ValueError("a thought was given for a line that may not think")
        if not 0 < len(ids) <= self.max_thought_ids:
            raise ValueError(f"a thought has {len(ids)} sampled tokens, not 1 to {self.max_thought_ids}")
        rest = np.asarray(ids[1:], dtype=np.int64)
        if not self.sets[line.think_set, ids[0]]:
            raise ValueError(f"token {ids[0]} does not start a thought on this line")
        if not self.sets[self.thought_set, rest].all():
            raise ValueError("a thought holds a token that may not be sampled in it")
        if self.ends[np.asarray(ids[:-1], dtype=np.int64)].any():
            raise ValueError("a thought goes on after its end")


class CommentFormat(LatentFormat):
    """A thought is a comment line above the line it governs; <act> is that no such line follows."""

    name = "comment"
    implicit_decision = True
    first_role = Role.THOUGHT

    def __init__(self, tokenizer: Tokenizer, max_latent_tokens: int) -> None:
        table = tokenizer.token_bytes
        sayable = np.array([_sayable(token) for token in table])
        self.ends = sayable & np.array([token.endswith(b"\n") for token in table])
        prefixes: dict[bytes, list[int]] = {}
        for index in np.flatnonzero(sayable):
            text = table[index].lstrip(SPACE_BYTES)
            if text.startswith(b"#"):
                prefixes.setdefault(table[index][: len(table[index]) - len(text)], []).append(int(index))
        prefixes = {w: members for w, members in prefixes.items() if b"\n" not in w}
        if not prefixes:
            raise UserError(
                "text.latent_format=comment: the tokenizer has no token that starts with '#'; "
                "use another tokenizer, or text.latent_format=tokens"
            )
        rows = [np.ones(len(table), dtype=bool), sayable]
        self._row_of: dict[bytes, int] = {}  # w -> row T(w)
        self._act_row = {self.ALL: self.ALL}
        for prefix in sorted(prefixes):
            start = np.zeros(len(table), dtype=bool)
            start[prefixes[prefix]] = True
            self._row_of[prefix] = len(rows)
            self._act_row[len(rows)] = len(rows) + 1
            rows += [start, ~start]
        self.no_thought_set = len(rows)
        rows.append(np.array([not _starts_comment(token) for token in table]))
        self.sets = np.stack(rows)
        self.universe, self.thought_set = self.ALL, 1
        self.forced_end = tuple(tokenizer.encode("\n"))
        self.max_thought_ids = max_latent_tokens
        self.think_set_of_token = np.array([self._row(token) for token in table], dtype=np.int16)
        self._is_comment = np.array([token.lstrip(SPACE_BYTES).startswith(b"#") for token in table])

    def _row(self, token: bytes) -> int:
        text = token.lstrip(SPACE_BYTES)
        return self._row_of.get(token[: len(token) - len(text)], self.ALL) if text else self.ALL

    def think_set_of(self, body: Sequence[int]) -> int:
        if not body or self._is_comment[body[0]]:  # a human comment cannot be told from a thought: no decision there
            return self.ALL
        return int(self.think_set_of_token[body[0]])

    def act_set(self, think_set: int) -> int:
        return self._act_row[think_set]

    def before_decision(self, line: Line) -> Written:
        return line.indent, (Role.LAYOUT,) * len(line.indent)

    def act(self, line: Line) -> Written:
        return _NOTHING

    def after_thought(self, line: Line) -> Written:
        return line.indent, (Role.FORCED,) * len(line.indent)

    def action(self, line: Line) -> Written:
        return line.body + line.tail, (Role.EXPERT,) * len(line.body) + (Role.LAYOUT,) * len(line.tail)

    def thought(self, text: str, line: Line, indentation: str, tokenizer: Tokenizer) -> tuple[int, ...]:
        if not line.may_think or not text:
            return ()
        ids = tokenizer.encode(f"{indentation}# {text}\n")
        first = len(line.indent)
        if tuple(ids[:first]) == line.indent and self.sets[line.think_set, ids[first]]:
            ids = ids[first:]  # as the tokenizer itself writes a comment line here
        else:
            start = np.flatnonzero(self.sets[line.think_set] & ~self.ends)
            if not len(start):
                return ()
            shortest = min(start, key=lambda index: (len(tokenizer.token_bytes[index]), index))
            ids = [int(shortest), *tokenizer.encode(f" {text}\n")]
        ids = ids[: self.max_thought_ids]
        return tuple(ids) if self.sets[self.thought_set, ids].all() else ()


class TokensFormat(LatentFormat):
    """Reserved markers: `<act>`, or `<think>` thought `</think>`, before the indentation of the line."""

    name = "tokens"
    implicit_decision = False
    first_role = Role.DECISION

    def __init__(self, tokenizer: Tokenizer, max_latent_tokens: int) -> None:
        missing = [marker for marker in MARKERS if marker not in tokenizer.special]
        if missing:
            raise UserError(
                f"text.latent_format=tokens: the tokenizer has no {', '.join(missing)}; "
                "add them to its special tokens, or use text.latent_format=comment"
            )
        self._act, self._think, end = (tokenizer.special[marker] for marker in (ACT, THINK, END_THINK))
        size = tokenizer.vocab_size
        in_thought = np.array([len(token) > 0 for token in tokenizer.token_bytes])
        in_thought[[self._act, self._think, end]] = False, False, True
        decisions = (self._think,), (self._act,), (self._think, self._act)
        rows = [np.ones(size, dtype=bool), in_thought, *(_only(size, *ids) for ids in decisions)]
        self.no_thought_set = len(rows)
        self.sets = np.stack([*rows, ~_only(size, self._think)])
        self.thought_set, self._think_row, self._act_row, self.universe = 1, 2, 3, 4
        self.ends = _only(size, end)
        self.forced_end = (end,)
        self.max_thought_ids = max_latent_tokens + 1
        self.think_set_of_token = np.full(size, self._think_row, dtype=np.int16)  # also spaces: a span may start so

    def think_set_of(self, body: Sequence[int]) -> int:
        return self._think_row if body else self.ALL

    def act_set(self, think_set: int) -> int:
        return self._act_row if think_set else self.ALL

    def before_decision(self, line: Line) -> Written:
        return _NOTHING

    def act(self, line: Line) -> Written:
        return (self._act,), (Role.DECISION,)

    def after_thought(self, line: Line) -> Written:
        return _NOTHING

    def action(self, line: Line) -> Written:
        before, body, after = len(line.indent), len(line.body), len(line.tail)
        return line.ids, (Role.LAYOUT,) * before + (Role.EXPERT,) * body + (Role.LAYOUT,) * after

    def thought(self, text: str, line: Line, indentation: str, tokenizer: Tokenizer) -> tuple[int, ...]:
        if not line.may_think or not text:
            return ()
        return (self._think, *tokenizer.encode(text), *self.forced_end)[: self.max_thought_ids]


def build_format(config: TextConfig, tokenizer: Tokenizer) -> LatentFormat:
    """The latent format that `config` names, for `tokenizer`.

    Raises UserError when the tokenizer lacks a marker (`tokens`) or a token that starts with "#" (`comment`).
    """
    kind = CommentFormat if config.latent_format == "comment" else TokensFormat
    return kind(tokenizer, config.max_latent_tokens)


def _sayable(token: bytes) -> bool:
    """Whether a thought in a comment may hold the token: no control token, no line break but a last "\\n"."""
    inner = token[:-1] if token.endswith(b"\n") else token
    return bool(token) and not any(byte in inner for byte in b"\n\r\0")


def _starts_comment(token: bytes) -> bool:
    """Whether a line in the token, which may begin in the middle of one, starts with "#"."""
    return any(line.lstrip(SPACE_BYTES).startswith(b"#") for line in token.split(b"\n"))


def _only(size: int, *ids: int) -> npt.NDArray[np.bool_]:
    row = np.zeros(size, dtype=bool)
    row[list(ids)] = True
    return row
