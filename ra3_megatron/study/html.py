"""Tables of sections that other code adds to the page of a study."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import get_args

from ra3_megatron.study.predictions import Word


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """An HTML table; the keys of the first row are its head. Verdicts are coloured."""
    if not rows:
        return "<p>Nothing is done yet.</p>"
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(_cell(text) for text in row.values()) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    return f'<td class="{text}">{text}</td>' if text in get_args(Word) else f"<td>{escape(text)}</td>"
