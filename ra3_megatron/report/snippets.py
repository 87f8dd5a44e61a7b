"""Which parts of an infused text are thoughts, for displays that set them apart."""

import re

_MARKERS = re.compile(r"<think>.*?(?:</think>|$)|<act>", re.DOTALL)
_COMMENT_LINE = re.compile(r"^[ \t]*(#[^\n]*)$", re.MULTILINE)


def thought_spans(text: str) -> list[tuple[int, int]]:
    """Start and end of each thought in an infused text, in characters, in order; indentation is left out.

    In the `comment` format every full-line comment is a thought, because the expert's own were stripped. In the
    `tokens` format thoughts and decisions stand in `<think>…</think>` and `<act>`; then comments are the expert's.
    """
    if _MARKERS.search(text):
        return [match.span() for match in _MARKERS.finditer(text)]
    return [match.span(1) for match in _COMMENT_LINE.finditer(text)]
