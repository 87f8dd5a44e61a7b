"""How a generated function is laid out: its head with the tables in a docstring, and its indentation."""

from collections.abc import Iterable, Mapping

INDENT = "    "
_QUOTES = f'{INDENT}"""\n'


def head(parameters: str, tables: Iterable[str]) -> str:
    """The definition of `f` and its docstring, one table a line. Two primitive actions: a docstring is one."""
    return f"def f({parameters}):\n" + _QUOTES + "".join(f"{INDENT}{table}\n" for table in tables) + _QUOTES


def indented(lines: Iterable[str]) -> tuple[str, ...]:
    """Lines of the body of `f`."""
    return tuple(INDENT + line for line in lines)


def pairs(table: Mapping[str, str]) -> str:
    """A table as text: each key, followed by its value."""
    return "".join(key + value for key, value in table.items())
