"""From sampled ids to the text that is scored: thoughts go first, then the text ends before the first stop.

In this order, because a thought at column 0 is a line "# …", and "\\n#" is a stop sequence of HumanEval. What the text
is cut to depends on the ids alone. Offsets are in bytes, in which no stop sequence can be seen inside a character.

Where an answer may hold its program in a fenced block, each block, and what stands before, between and behind them, is
read as Python by itself: a fence is none, and behind it a "#" line of a string would pass for a thought.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ra3_megatron.text.fences import Part, parts
from ra3_megatron.text.segment import WHITESPACE, split_rows, written_comment_rows
from ra3_megatron.text.tokenizer import Tokenizer
from ra3_megatron.text.vocabulary import ACT, END_THINK, THINK

SPACE = WHITESPACE.encode()
Thoughts = Literal["comment", "tokens", "none"]


@dataclass(frozen=True)
class Cut:
    """What is left of a completion."""

    text: str
    stopped: bool
    """A stop sequence was found."""
    tokens: int
    """Sampled tokens that start before the cut, those of thoughts included."""
    thought_tokens: int
    """Those of them that belong to thoughts."""
    ended: int | None
    """Sampled tokens up to the one that completes the stop; None: there is no stop."""


@dataclass(frozen=True)
class Cutter:
    """How completions of one kind of prompt are cut."""

    tokenizer: Tokenizer
    stops: tuple[str, ...]
    thoughts: Thoughts
    """How the model writes thoughts: as full-line comments, between reserved tokens, or not at all."""
    code_prompt: bool
    """The prompt is Python that the completion goes on with."""
    fenced: bool = False
    """The completion may hold its program in a fenced block."""
    ends: frozenset[int] = frozenset()
    """Tokens that end a completion: what they are called is no text of it."""

    def cut(self, prompt: str, ids: Sequence[int]) -> Cut:
        """Cut a continuation of `prompt`."""
        special = self.tokenizer.special if self.thoughts == "tokens" else {}
        visible, marked = _without_marked(ids, special, self.ends)
        table = self.tokenizer.token_bytes
        starts, raw = [], b""
        for place in visible:
            starts.append(len(raw))
            raw += table[ids[place]]
        kept = self._kept_rows(prompt, raw)
        rest = b"".join(raw[start:end] for start, end in kept)
        found = [(place, stop) for stop in self.stops if (place := rest.find(stop.encode())) >= 0]
        length, stop = min(found) if found else (len(rest), "")
        end = _original(kept, length) if found else len(raw)
        before_cut = [place for place, start in zip(visible, starts, strict=True) if start < end]
        last = 1 + max(before_cut, default=-1) if found else len(ids)
        hidden = sum(start < end and not _in(kept, start) for start in starts)
        thoughts = hidden + sum(place < last for place in marked)
        ended = None
        if found:
            whole = _original(kept, length + len(stop.encode()) - 1)
            ended = 1 + visible[bisect_right(starts, whole) - 1]
        return Cut(rest[:length].decode("utf-8", "replace"), bool(found), last, thoughts, ended)

    def ended(self, prompt: str, ids: Sequence[int]) -> int | None:
        """`cut(prompt, ids).ended`, without reading Python where no stop can be."""
        if self.thoughts == "comment":
            raw = b"".join(self.tokenizer.token_bytes[token] for token in ids)
            # a dropped line takes its "\n" along, so every line of a stop has one before it in the raw text, too
            if not any(all(part in raw for part in parts) for parts in self._parts):
                return None
        return self.cut(prompt, ids).ended

    @cached_property
    def _parts(self) -> list[list[bytes]]:
        """What stands in a text that meets a stop, line by line of it."""
        lines = [stop.encode().split(b"\n") for stop in self.stops]
        return [[first, *(b"\n" + line for line in others)] for first, *others in lines]

    def _kept_rows(self, prompt: str, raw: bytes) -> list[tuple[int, int]]:
        """Byte ranges of the lines that are no thoughts. A comment line that begins with a whole stop sequence, such as
        "### Question", is none."""
        if self.thoughts != "comment":
            return [(0, len(raw))]
        before = prompt if self.code_prompt else ""
        above = before.count("\n")
        first_whole = above + (bool(before) and not before.endswith("\n"))
        dropped = {row for row in self._comments(before + raw.decode("utf-8", "replace")) if row >= first_whole}
        kept: list[tuple[int, int]] = []
        start = 0
        ends = tuple(stop.encode() for stop in self.stops)
        for number, row in enumerate(_rows(raw), start=above):
            if number not in dropped or row.lstrip(SPACE).startswith(ends):
                kept.append((start, start + len(row)))
            start += len(row)
        return kept

    def _comments(self, text: str) -> set[int]:
        """Indices of the lines that are comments. A "\\r" ends no line, as what is behind it is not there yet while the
        model writes."""
        rows = split_rows(text.replace("\r", " "))
        found = parts(rows) if self.fenced else [Part(0, len(rows), block=False)]
        return {
            part.first + row for part in found for row in written_comment_rows("".join(rows[part.first : part.end]))
        }


def _rows(raw: bytes) -> list[bytes]:
    """Lines with their "\\n"; nothing else ends one."""
    rows = [row + b"\n" for row in raw.split(b"\n")]
    rows[-1] = rows[-1][:-1]
    return rows if rows[-1] else rows[:-1]


def _without_marked(ids: Sequence[int], special: dict[str, int], ends: frozenset[int]) -> tuple[list[int], list[int]]:
    """Places of visible tokens, and of those of thoughts between reserved markers; `<act>`, an end without a
    beginning, and what ends a completion are neither."""
    think, end, act = (special.get(name, -1) for name in (THINK, END_THINK, ACT))
    visible, thoughts, inside = [], [], False
    for place, token in enumerate(ids):
        inside = inside or token == think
        if inside:
            thoughts.append(place)
            inside = token != end
        elif token not in (act, end) and token not in ends:
            visible.append(place)
    return visible, thoughts


def _original(kept: Sequence[tuple[int, int]], offset: int) -> int:
    """Where a byte of the kept text stood before anything was dropped."""
    for start, end in kept:
        if offset < end - start:
            return start + offset
        offset -= end - start
    return kept[-1][1] if kept else 0


def _in(ranges: Sequence[tuple[int, int]], offset: int) -> bool:
    return any(start <= offset < end for start, end in ranges)
