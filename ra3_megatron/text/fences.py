"""Fenced code blocks in what a model wrote, and which of them is its program.

A line that begins with ``` opens a block, whatever language it names; the next such line closes it, and so does ``` at
the end of a line of code. A block that nothing closes goes on to the end of the text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ra3_megatron.text.segment import WHITESPACE, split_rows

FENCE = "```"
_PYTHON = re.compile(r"(?:python|py)\d*(?![\w-])", re.IGNORECASE)
"""python, py, python3, Python 3; not pycon."""


@dataclass(frozen=True)
class Part:
    """Rows of a text between two fences."""

    first: int
    end: int
    """Behind the last one."""
    block: bool
    """They are code, not the text around it."""
    python: bool = False
    """The block is marked as Python."""


def program_in(text: str) -> str:
    """The program that an answer holds: its last block that is marked as Python or, where none is, its last block;
    the text as it is where there is no block."""
    rows = split_rows(text)
    blocks = [part for part in parts(rows) if part.block]
    if not blocks:
        return text
    chosen = ([part for part in blocks if part.python] or blocks)[-1]
    code = "".join(rows[chosen.first : chosen.end])
    return code.rstrip(WHITESPACE).removesuffix(FENCE) if _ends(code) else code


def parts(rows: Sequence[str]) -> list[Part]:
    """The parts of a text in order, without the lines of fences. rows: its lines, each with its "\\n"."""
    found: list[Part] = []
    part = Part(0, 0, block=False)
    for number, row in enumerate(rows):
        named = _named(row)
        if part.block and (named is not None or _ends(row)):
            found.append(replace(part, end=number + (named is None)))
            part = Part(number + 1, 0, block=False)
        elif not part.block and named is not None and row.endswith("\n") and "`" not in named:
            found.append(replace(part, end=number))
            part = Part(number + 1, 0, block=True, python=bool(_PYTHON.match(named)))
    return [*found, replace(part, end=len(rows))]


def _named(row: str) -> str | None:
    """What a row that begins with a fence says behind it; None: it does not begin with one."""
    row = row.strip(WHITESPACE)
    return row[len(FENCE) :].strip(WHITESPACE) if row.startswith(FENCE) else None


def _ends(code: str) -> bool:
    """Whether a fence stands behind the last line; behind a comment it is a part of that."""
    last = code.rstrip(WHITESPACE).rsplit("\n", 1)[-1].lstrip(WHITESPACE)
    return last.endswith(FENCE) and not last.startswith("#")
