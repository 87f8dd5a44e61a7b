"""Primitive actions: nothing lost, no cut where a comment would change the program, comments found by the tokenizer."""

import ast
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import AWKWARD, modules, snippets

from ra3_megatron.text.segment import (
    WHITESPACE,
    comment_rows,
    drop_leading_blank_lines,
    segment,
    split_rows,
    strip_comment_lines,
    written_comment_rows,
)

Granularity = Literal["line", "statement"]
GRANULARITIES: tuple[Granularity, ...] = ("line", "statement")
PIECES = [
    "x",
    "=",
    "1",
    " ",
    "    ",
    "\t",
    "\n",
    "\n\n",
    "\r",
    "\r\n",
    "\x0c",
    "\x0b",
    "\\",
    "\\\n",
    "#",
    "# c\n",
    "(",
    ")",
]
PIECES += ["[", "]", ":", "'", '"""', "'''", "f'", "if x:\n", "def f():\n", "é", "\u2028", "\x85", "$", "\0", "\ufeff"]
FRAGMENTS = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


def with_comments(parts: list[str]) -> str:
    """A comment line before every part, at the indentation of its first visible line."""
    text = ""
    for part in parts:
        blank = len(part) - len(part.lstrip(WHITESPACE))
        start = part.rfind("\n", 0, blank) + 1
        text += part[:start] + part[start:blank] + "# thought\n" + part[start:]
    return text


@pytest.mark.parametrize("granularity", GRANULARITIES)
@given(code=FRAGMENTS | st.text())
def test_parts_join_to_the_text_and_each_shows_something(granularity: Granularity, code: str) -> None:
    parts = segment(code, granularity)
    assert "".join(parts) == code
    if code.strip(WHITESPACE):
        assert all(part.strip(WHITESPACE) for part in parts)
    for part in parts[1:]:
        assert part.split("\n")[0].strip(WHITESPACE), "blank lines belong to the part before"


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("code", [*snippets(), *modules()])
def test_a_comment_before_every_part_leaves_the_program_as_it_is(granularity: Granularity, code: str) -> None:
    parts = segment(code, granularity)
    assert "".join(parts) == code
    assert ast.dump(ast.parse(with_comments(parts))) == ast.dump(ast.parse(code))


@given(code=FRAGMENTS)
def test_where_text_parses_comments_never_change_it(code: str) -> None:
    try:
        tree = ast.dump(ast.parse(code))
    except (SyntaxError, ValueError):
        return
    if code.startswith("\ufeff"):
        return
    assert ast.dump(ast.parse(with_comments(segment(code, "line")))) == tree
    assert ast.dump(ast.parse(strip_comment_lines(code))) == tree


def test_lines_are_physical_lines_with_their_blank_lines() -> None:
    code = "def f(a,\n      b):\n\n    x = [1,\n         2]\n\n\n    return x"
    assert segment(code, "line") == [
        "def f(a,\n",
        "      b):\n\n",
        "    x = [1,\n",
        "         2]\n\n\n",
        "    return x",
    ]


def test_statements_are_logical_lines() -> None:
    code = (
        "@d\ndef f(a,\n      b):\n    # why\n    x = [1,\n         # in\n         2]\n\n"
        "    return x + \\\n        1; y\n"
    )
    assert segment(code, "statement") == [
        "@d\n",
        "def f(a,\n      b):\n",
        "    # why\n",
        "    x = [1,\n         # in\n         2]\n\n",
        "    return x + \\\n        1; y\n",
    ]


def test_strings_and_continuations_stay_whole() -> None:
    code = "x = '''a\n# b\n\nc''' + \\\n  y\nz = 'a\\\nb'\n"
    assert segment(code, "line") == ["x = '''a\n# b\n\nc''' + \\\n  y\n", "z = 'a\\\nb'\n"]


def test_a_comment_that_ends_in_a_backslash_continues_nothing() -> None:
    assert segment("x = 1  # a \\\ny = 2\n", "line") == ["x = 1  # a \\\n", "y = 2\n"]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_other_text_falls_back_to_physical_lines(granularity: Granularity) -> None:
    text = "Let's add $3 and $4.\n\n  It's 7.\n#### 7"
    assert segment(text, granularity) == ["Let's add $3 and $4.\n\n", "  It's 7.\n", "#### 7"]


def test_what_is_open_at_the_end_counts_as_closed_there() -> None:
    assert segment("x = 1\ny = f(1,\n  '''a\n# b''',\n  2", "line") == [
        "x = 1\n",
        "y = f(1,\n",
        "  '''a\n# b''',\n",
        "  2",
    ]
    assert segment("x = 1\ny = f(1,\n  2", "statement") == ["x = 1\n", "y = f(1,\n  2"]
    assert segment('x = 1\ny = """a\n\n# b\n  c', "line") == ["x = 1\n", 'y = """a\n\n# b\n  c']
    assert strip_comment_lines('# a\ny = """a\n# b') == 'y = """a\n# b'
    assert segment("b = '''\na'''\nc = 2 \\\n", "line") == ["b = '''\na'''\n", "c = 2 \\\n"]


def test_a_comment_that_ends_a_continued_line_is_no_comment_line() -> None:
    code = "x = 1 \\\n    # one\ny = 2\n"
    assert strip_comment_lines(code) == code
    assert segment(code, "line") == ["x = 1 \\\n    # one\n", "y = 2\n"]


def test_carriage_returns_end_lines_only_for_the_compiler() -> None:
    code = "# a\rx = 1\n# b\r# c\ny = 2\n"
    assert strip_comment_lines(code) == "# a\rx = 1\ny = 2\n"
    assert segment(code, "line") == ["# a\rx = 1\n", "# b\r# c\n", "y = 2\n"]


def test_a_statement_may_start_with_a_continuation() -> None:
    assert segment("y = 1\n\\\nx = 2\nz = 3\n", "statement") == ["y = 1\n", "\\\nx = 2\n", "z = 3\n"]


def test_no_text_has_no_parts() -> None:
    assert segment("", "line") == []
    assert segment(" \n\n", "line") == [" \n\n"]


@pytest.mark.parametrize("code", [*snippets(), *modules()])
def test_stripping_comment_lines_keeps_the_program_and_leaves_none(code: str) -> None:
    stripped = strip_comment_lines(code)
    assert ast.dump(ast.parse(stripped)) == ast.dump(ast.parse(code))
    assert comment_rows(stripped) == []


def test_only_real_full_line_comments_are_stripped() -> None:
    code = "# a\n\nx = '''\n# b\n'''  # c\n    # d\ny = (\n  # e\n  1)\n# f"
    assert strip_comment_lines(code) == "x = '''\n# b\n'''  # c\ny = (\n  1)\n"
    assert comment_rows(code) == [0, 5, 7, 9]


def test_text_that_stops_being_python_is_stripped_up_to_there() -> None:
    code = "# a\nx = 1\n  y = $\n# b\n"
    assert strip_comment_lines(code) == "x = 1\n  y = $\n# b\n"
    assert written_comment_rows(code) == [0, 3]


@pytest.mark.parametrize("code", ["\0", "x = 1\n\0\ny = 2\n", "# a\n\0", "if x:\n    y\n\0\n", "    x\n\0"])
def test_null_characters_are_no_python(code: str) -> None:
    """Python 3.12 raises SystemError for one that ends an indented block."""
    assert "".join(segment(code, "line")) == code
    assert written_comment_rows(code + "\n# b\n")[-1] == (code + "\n").count("\n")
    assert strip_comment_lines(code) == code.removeprefix("# a\n")


def test_comments_of_generated_text_are_not_those_of_an_open_string() -> None:
    assert written_comment_rows("\n    # go on\n    return (1,\n        # two\n") == [1, 3]
    assert written_comment_rows('\n    x = """a\n# b\n') == []


@given(st.text(st.sampled_from("ab \t\n\r\x0b\x0c\x1c\x85\u2028")))
def test_rows_end_at_line_feeds_only(text: str) -> None:
    rows = split_rows(text)
    assert "".join(rows) == text
    assert all(row.endswith("\n") for row in rows[:-1])
    assert all("\n" not in row[:-1] for row in rows)
    assert all(rows)


def test_leading_blank_lines() -> None:
    assert drop_leading_blank_lines("\n  \n  x\n\ny") == "  x\n\ny"
    assert drop_leading_blank_lines("\n \n") == ""
    assert all(drop_leading_blank_lines(code).endswith(code.lstrip(WHITESPACE)) for code in AWKWARD)
