"""From sampled ids to the text that is scored: thoughts go first, then the text ends before the first stop.

In this order, because a thought at column 0 is a line "# …", and "\\n#" is a stop sequence of HumanEval. What the text
is cut to depends on the ids alone. Offsets are in bytes, in which no stop sequence can be seen inside a character.

Where an answer may hold its program in a fenced block, each block, and what stands before, between and behind them, is
read as Python by itself: a fence is none, and behind it a "#" line of a string would pass for a thought.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
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
    thoughts: int
    """Thoughts that start before the cut."""


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
        visible, marked, starts, raw = self._bytes(ids)
        kept, dropped = self._rows_of(prompt, raw)
        rest = b"".join(raw[start:end] for start, end in kept)
        found = [(place, stop) for stop in self.stops if (place := rest.find(stop.encode())) >= 0]
        length = min(found)[0] if found else len(rest)
        end = _original(kept, length) if found else len(raw)
        before_cut = [place for place, start in zip(visible, starts, strict=True) if start < end]
        last = 1 + max(before_cut, default=-1) if found else len(ids)
        hidden = sum(start < end and _in(dropped, start) for start in starts)
        shown = [thought for thought in marked if thought[0] < last]
        return Cut(
            text=rest[:length].decode("utf-8", "replace"),
            stopped=bool(found),
            tokens=last,
            thought_tokens=hidden + sum(place < last for thought in shown for place in thought),
            thoughts=len(shown) + sum(start < end for start, _ in dropped),
        )

    def ended(self, prompt: str, ids: Sequence[int], seen: int = 0) -> int | None:
        """How many of `ids` are the continuation, as a stop is met behind them; None: it goes on. `seen` of them were
        looked at before.

        The text is looked at behind each token that completes what may be a stop, whether later ones are there or not:
        what is seen between may be read otherwise (a string that is open, and is not Python in the end), so the
        answer would depend on how many tokens are sampled at once.
        """
        visible, _, starts, raw = self._bytes(ids)
        ends = {end for part in self._last_lines for end in _ends_of(part, raw)}
        looks = sorted({1 + visible[bisect_right(starts, end) - 1] for end in ends})
        return next((look for look in looks if look > seen and self.cut(prompt, ids[:look]).stopped), None)

    def _bytes(self, ids: Sequence[int]) -> tuple[list[int], list[list[int]], list[int], bytes]:
        """Places of visible tokens, and of those of each marked thought; where each visible one starts in the bytes
        that they are together; these."""
        special = self.tokenizer.special if self.thoughts == "tokens" else {}
        visible, marked = _without_marked(ids, special, self.ends)
        table = self.tokenizer.token_bytes
        parts = [table[ids[place]] for place in visible]
        starts = list(accumulate((len(part) for part in parts), initial=0))[:-1]
        return visible, marked, starts, b"".join(parts)

    @cached_property
    def _last_lines(self) -> set[bytes]:
        """The last line of each stop, with the "\\n" before it, if any: a dropped line takes its own along, so that
        stands in the raw text, too, where a stop is complete."""
        return {b"\n" * ("\n" in stop) + stop.encode().rsplit(b"\n", 1)[-1] for stop in self.stops}

    def _rows_of(self, prompt: str, raw: bytes) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Byte ranges of the lines that are no thoughts, and of those that are. A comment line that begins with a whole
        stop sequence, such as "### Question", is none."""
        if self.thoughts != "comment":
            return [(0, len(raw))], []
        before = prompt if self.code_prompt else ""
        above = before.count("\n")
        first_whole = above + (bool(before) and not before.endswith("\n"))
        comments = {row for row in self._comments(before + raw.decode("utf-8", "replace")) if row >= first_whole}
        kept: list[tuple[int, int]] = []
        dropped: list[tuple[int, int]] = []
        start = 0
        ends = tuple(stop.encode() for stop in self.stops)
        for number, row in enumerate(_rows(raw), start=above):
            thought = number in comments and not row.lstrip(SPACE).startswith(ends)
            (dropped if thought else kept).append((start, start + len(row)))
            start += len(row)
        return kept, dropped

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


def _ends_of(part: bytes, raw: bytes) -> Iterator[int]:
    """Places of the last byte of `part` wherever it stands."""
    place = raw.find(part)
    while place >= 0:
        yield place + len(part) - 1
        place = raw.find(part, place + 1)


def _without_marked(
    ids: Sequence[int], special: dict[str, int], ends: frozenset[int]
) -> tuple[list[int], list[list[int]]]:
    """Places of visible tokens, and of those of each thought between reserved markers; `<act>`, an end without a
    beginning, and what ends a completion are neither."""
    think, end, act = (special.get(name, -1) for name in (THINK, END_THINK, ACT))
    visible: list[int] = []
    thoughts: list[list[int]] = []
    inside = False
    for place, token in enumerate(ids):
        if inside:
            thoughts[-1].append(place)
            inside = token != end
        elif token == think:
            thoughts.append([place])
            inside = True
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
