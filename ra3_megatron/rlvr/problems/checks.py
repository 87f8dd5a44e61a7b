"""Checks of tests before anything is sampled: what cannot be executed would be a reward that cannot be had."""

import ast
from collections.abc import Sequence


def require_parsed(setup: str, tests: Sequence[str]) -> None:
    """Raise ValueError unless the setup and each of the tests are Python."""
    if not tests:
        raise ValueError("there are no tests")
    for name, text in (("setup", setup), *((f"test {n}", test) for n, test in enumerate(tests, 1))):
        try:
            ast.parse(text)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{name} is no Python ({error})") from error
