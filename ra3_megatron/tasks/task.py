"""A generated task: a program, the items it is made of, and the truth about each of its lines.

Invariants: `Task.code` is valid Python and starts with the prompt; without its full-line comments, `Task.warm_text` is
`Task.code`; behind the prompt, its primitive actions are one a line of an item, then those of the ending.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import Protocol

from ra3_megatron.config.tasks import TasksConfig
from ra3_megatron.text.segment import segment


@dataclass(frozen=True)
class Item:
    """What one latent governs: a run of lines, and the computation that tells which."""

    lines: tuple[str, ...]
    """Source lines, indented, without line breaks."""
    thought: str
    """The right thought: the computation written out, as the text of a comment behind "# "."""
    hops: int
    """Steps of serial computation that tell which lines follow."""
    label: str
    """Which lines follow: the name of the routine, or the value of the equation."""
    request: str | None = None
    """A source line before the item that says what is asked; None: only the prompt does."""


@dataclass(frozen=True)
class LineTruth:
    """What is true about one primitive action."""

    item: int | None
    """Number of its item; None: it belongs to none (the ending)."""
    place: int
    """Its place in the item, from 0."""
    hops: int = 0
    """Of the item."""
    label: str = ""
    """Of the item."""
    thought: str = ""
    """The right thought of the item."""

    @property
    def boundary(self) -> bool:
        """Whether an item starts here: where a thought pays."""
        return self.item is not None and self.place == 0


@dataclass(frozen=True)
class Task:
    """One program with its truth."""

    name: str
    """`<family>#<number>`."""
    prompt: str
    """What is given: everything before the first item, line break included."""
    items: tuple[Item, ...]
    """In order."""
    ending: str
    """What stands behind the last item, line break included."""
    comments: Mapping[tuple[int, int], str] = field(default_factory=dict)
    """Comments of the warm-start text: (item, place) -> text behind "# "."""

    @cached_property
    def code(self) -> str:
        """The program, without comments."""
        return self._text({})

    @cached_property
    def warm_text(self) -> str:
        """The program with the thoughts that a warm start reads."""
        return self._text(self.comments)

    @cached_property
    def truth(self) -> tuple[LineTruth, ...]:
        """What is true about each primitive action of `code` behind the prompt, which is given, [actions]."""
        body = []
        for number, item in enumerate(self.items):
            body += [LineTruth(None, 0)] if item.request is not None else []
            places = range(len(item.lines))
            body += [LineTruth(number, place, item.hops, item.label, item.thought) for place in places]
        ending = [LineTruth(None, place) for place in range(len(segment(self.ending, "line")))]
        return (*body, *ending)

    def _text(self, comments: Mapping[tuple[int, int], str]) -> str:
        parts = [self.prompt]
        for number, item in enumerate(self.items):
            parts += [item.request + "\n"] if item.request is not None else []
            for place, line in enumerate(item.lines):
                comment = comments.get((number, place))
                if comment is not None:
                    parts.append(f"{line[: len(line) - len(line.lstrip())]}# {comment}\n")
                parts.append(line + "\n")
        return "".join(parts) + self.ending


class TaskFamily(Protocol):
    """Tasks of one kind. Task number k depends on (configuration, k, split) alone."""

    words: Sequence[str]
    """Strings that a tokenizer for these tasks makes one piece each: the entries of tables, say."""

    def task(self, number: int, training: bool) -> Task:
        """Task `number`; training: of the training split, where `withheld` routines do not occur."""

    def example(self, rng: Random) -> str:
        """Text with which `f` can be called, between its parentheses."""


def comments(
    config: TasksConfig, items: Sequence[Item], rng: Random, junk: Callable[[Random], str]
) -> dict[tuple[int, int], str]:
    """Comments of a warm-start text, as in `Task.comments`: right thoughts above items, `junk` above lines inside."""
    found = {}
    for number, item in enumerate(items):
        written = config.thought_hops is None or item.hops <= config.thought_hops
        if rng.random() < config.thought_share and written:
            found[number, 0] = item.thought
        for place in range(1, len(item.lines)):
            if rng.random() < config.junk_share:
                found[number, place] = junk(rng)
    return found
