"""Tables of sections that other code adds to the page of a study."""

from collections.abc import Mapping, Sequence
from html import escape


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """An HTML table; the keys of the first row are its head."""
    if not rows:
        return "<p>Nothing is done yet.</p>"
    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(v)}</td>" for v in row.values()) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
