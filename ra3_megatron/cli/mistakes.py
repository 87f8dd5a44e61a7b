"""A mistake in the words of a command as one line: the option, its value, what would be right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

UsageError: Any = typer.BadParameter.__mro__[1]
"""What parsing raises; typer has its own or click's, as its version wants."""


def shows_help(error: Exception) -> bool:
    """Whether nothing is wrong but that no words were given, which asks for help."""
    return type(error).__name__ == "NoArgsIsHelpError"


def one_line(error: Any, words: Sequence[str]) -> str:
    """What is wrong with `words`, and whose help says more. error: a `UsageError`."""
    said = error.format_message()
    given = _given(getattr(getattr(error, "param", None), "opts", ()), words)
    if given is not None and error.message:
        said = f"{' '.join(given)}: {error.message}"
    command = error.ctx.command_path if error.ctx is not None else "ra3"
    return f"{' '.join(said.split()).rstrip('.')} ({command} --help)"


def _given(options: Sequence[str], words: Sequence[str]) -> tuple[str, str] | None:
    """The last of these options among `words`, and its value."""
    found = None
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in options and (equals or place + 1 < len(words)):
            found = (option, value if equals else words[place + 1])
    return found
