"""Checks of tests before anything is sampled: what cannot be executed would be a reward that cannot be had."""

import ast
import warnings
from collections.abc import Sequence


def require_parsed(setup: str, tests: Sequence[str]) -> None:
    """Raise ValueError unless the setup and each of the tests are Python that compiles."""
    if not tests:
        raise ValueError("there are no tests")
    for name, text in (("setup", setup), *((f"test {n}", test) for n, test in enumerate(tests, 1))):
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes in published tests
                compile(text, name, "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{name} is no Python ({error})") from error


def require_checker(source: str) -> None:
    """Raise ValueError unless this is Python that defines `check`."""
    require_parsed(source, ["check"])
    if not any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in ast.parse(source).body):
        raise ValueError("checker does not define check(input, expected, output)")
