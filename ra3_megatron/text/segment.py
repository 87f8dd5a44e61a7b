"""Cut program text into primitive actions, and find its full-line comments.

Invariants: only "\\n" ends a line; `"".join(segment(code, ...)) == code`, byte for byte; no segment starts where a
comment line would change the program (inside a string that spans lines, after a backslash continuation).

Python text is read with the `tokenize` module; a bracket or string that is still open at the end of the text counts as
closed there. Text that does not tokenize as Python is cut into its non-blank physical lines.
"""

import io
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

WHITESPACE = " \t\n\r\x0b\x0c"
"""What does not make a line visible. ASCII only, so that text and token bytes agree."""

_LAYOUT_TOKENS = (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
_NESTED_STRING_STARTS = {getattr(tokenize, name, None) for name in ("FSTRING_START", "TSTRING_START")} - {None}
_NESTED_STRING_ENDS = {getattr(tokenize, name, None) for name in ("FSTRING_END", "TSTRING_END")} - {None}


@dataclass
class _Rows:
    """What `tokenize` says about the rows of a text; all lists have one entry a row."""

    texts: list[str]
    inside: list[bool]
    """The row starts inside a string or after a backslash continuation: no comment may stand before it."""
    statement: list[bool]
    """A logical line starts here."""
    comment: list[bool]
    """The row is a full-line comment."""
    known: int
    """Rows before this one were read as Python."""
    complete: bool = True
    """The whole text tokenizes as Python; when it does not, `comment` holds for what was read up to the failure."""


def segment(code: str, granularity: Literal["line", "statement"]) -> list[str]:
    """Cut `code` into primitive actions; their concatenation is `code`.

    `line`: physical lines. Blank lines belong to the line before them (leading ones to the first line), and so does a
    line that starts inside a string or after a backslash continuation. Lines inside brackets are lines of their own.
    `statement`: logical lines; a decorator, a compound header and a full-line comment is each one of its own.
    Text that does not tokenize as Python is cut into its non-blank physical lines in either case.
    """
    rows = _analyse(code)
    parts: list[str] = []
    leading = ""
    for index, text in enumerate(rows.texts):
        if not text.strip(WHITESPACE):
            starts = False
        elif not rows.complete:
            starts = True
        elif granularity == "line":
            starts = not rows.inside[index]
        else:
            starts = rows.statement[index]
        if starts:
            parts.append(leading + text)
            leading = ""
        elif parts:
            parts[-1] += text
        else:
            leading += text
    if leading:
        parts.append(leading)
    return parts


def strip_comment_lines(code: str) -> str:
    """`code` without its full-line comments; a "#" line inside a string stays.

    Blank lines that come to stand at the start are dropped with them. From the first place that does not tokenize as
    Python, the text is left as it is.
    """
    dropped = comment_rows(code)
    return drop_leading_blank_lines(_without(code, dropped)) if dropped else code


def written_comment_rows(text: str) -> list[int]:
    """Indices of the full-line comments of text that a model wrote: where it stops being Python, of all "#" lines."""
    rows = _analyse(text)
    rest = [r for r in range(rows.known, len(rows.texts)) if rows.texts[r].lstrip(WHITESPACE).startswith("#")]
    return sorted({*_comment_indices(rows), *rest})


def drop_leading_blank_lines(code: str) -> str:
    """`code` from its first visible line on."""
    blank = len(code) - len(code.lstrip(WHITESPACE))
    return code[code.rfind("\n", 0, blank) + 1 :]


def comment_rows(code: str) -> list[int]:
    """Indices of the full-line comments among the lines of `code` (as `split_rows` cuts them)."""
    return _comment_indices(_analyse(code))


def split_rows(code: str) -> list[str]:
    """Physical lines with their "\\n"; unlike `str.splitlines`, nothing else ends a line."""
    rows = [row + "\n" for row in code.split("\n")]
    rows[-1] = rows[-1][:-1]
    return rows if rows[-1] else rows[:-1]


def _comment_indices(rows: _Rows) -> list[int]:
    return [index for index, is_comment in enumerate(rows.comment) if is_comment]


def _without(code: str, dropped: list[int]) -> str:
    gone = set(dropped)
    return "".join(row for index, row in enumerate(split_rows(code)) if index not in gone)


def _analyse(code: str) -> _Rows:
    """Tokenize `code` as the compiler reads it ("\\r\\n" and a lone "\\r" end a line too) and map back to our rows."""
    texts = split_rows(code)
    rows_of: list[int] = []  # compiler's row -> our row
    plain: list[str] = []
    for index, text in enumerate(texts):
        pieces = split_rows(text.replace("\r\n", "\n").replace("\r", "\n"))
        plain.extend(pieces)
        rows_of.extend([index] * len(pieces))
    inner = _tokenize_rows(plain)

    rows = _Rows(texts, [False] * len(texts), [False] * len(texts), [False] * len(texts), len(texts), inner.complete)
    has_code = [False] * len(texts)
    for index, row in reversed(list(enumerate(rows_of))):
        rows.inside[row] = inner.inside[index]  # of its first compiler's row, the last one seen here
        rows.statement[row] |= inner.statement[index]
        rows.comment[row] |= inner.comment[index]
        has_code[row] |= not inner.comment[index] and bool(plain[index].strip(WHITESPACE))
    rows.comment = [is_comment and not code_too for is_comment, code_too in zip(rows.comment, has_code, strict=True)]
    rows.statement = _move_to_start(rows.statement, rows.inside)
    if inner.known < len(rows_of):
        rows.known = rows_of[inner.known]
    return rows


def _move_to_start(statement: list[bool], inside: list[bool]) -> list[bool]:
    """A statement whose first token stands after a backslash continuation starts at the row that continues."""
    moved = [False] * len(statement)
    for row, starts in enumerate(statement):
        if starts:
            while inside[row]:
                row -= 1
            moved[row] = True
    return moved


def _tokenize_rows(texts: list[str]) -> _Rows:
    """`_Rows` of lines that hold no "\\r"; `known` is the first row that does not tokenize as Python."""
    count = len(texts)
    rows = _Rows(texts, [False] * count, [False] * count, [False] * count, count)
    commented = [False] * count
    in_statement = False
    strings: list[int] = []  # start rows of the open f-strings
    last = 0
    try:
        for token in _tokens("".join(texts)):
            first, last = token.start[0] - 1, token.end[0] - 1
            if token.type == tokenize.ERRORTOKEN:
                raise SyntaxError(token.string)
            if token.type == tokenize.COMMENT:
                commented[first] = True
                rows.comment[first] = not texts[first][: token.start[1]].strip(WHITESPACE)
                rows.statement[first] |= rows.comment[first] and not in_statement
            elif token.type == tokenize.NEWLINE:
                in_statement = False
            elif token.type not in _LAYOUT_TOKENS and not in_statement:
                in_statement = True
                rows.statement[first] = True
            if token.type in _NESTED_STRING_STARTS:
                strings.append(first)
            if token.type in _NESTED_STRING_ENDS:
                first = strings.pop()
            if token.type == tokenize.STRING or token.type in _NESTED_STRING_ENDS:
                rows.inside[first + 1 : last + 1] = [True] * (last - first)
    except (tokenize.TokenError, SyntaxError, SystemError) as error:
        # SystemError: Python 3.12, for "\0" behind an indented block
        opened = _open_at_end(error)
        if opened is None:
            rows.complete, rows.known = False, last
        else:
            rows.inside[opened:] = [True] * max(0, count - opened)
    for row in range(1, count):
        if texts[row - 1].endswith("\\\n") and not commented[row - 1]:
            rows.inside[row] = True
            rows.comment[row] = False  # it ends the line that it continues
    return rows


def _tokens(code: str) -> Iterator[tokenize.TokenInfo]:
    lines = iter(io.StringIO(code, newline="\n"))
    return tokenize.generate_tokens(lambda: next(lines, ""))


def _open_at_end(error: Exception) -> int | None:
    """First row inside the string that is open at the end of the text (a row beyond it, when it is a bracket or a
    continuation that is open); None when the text fails for another reason."""
    if not isinstance(error, tokenize.TokenError):
        return None
    message, (row, _) = error.args
    if "EOF in multi-line string" in message or "unterminated triple-quoted" in message:
        return int(row)  # counted from 1, so this is the row after the one where it starts
    return sys.maxsize if "EOF in multi-line statement" in message else None
