"""Checks of tests before anything is sampled: what cannot be executed would be a reward that cannot be had."""

import warnings
from collections.abc import Sequence


def syntax_error(source: str, name: str) -> str:
    """Why this is no Python that compiles; nothing when it is. name: of it, for the message."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes in published tests
            compile(source, name, "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return str(error) or type(error).__name__
    return ""


def require_parsed(setup: str, tests: Sequence[str]) -> None:
    """Raise ValueError unless the setup and each of the tests are Python."""
    if not tests:
        raise ValueError("there are no tests")
    for name, text in (("setup", setup), *((f"test {n}", test) for n, test in enumerate(tests, 1))):
        if said := syntax_error(text, name):
            raise ValueError(f"{name} is no Python ({said})")
