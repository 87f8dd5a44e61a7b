"""Says in one line each what is wrong with a configuration: `estep.group_size=1: must be at least 2`."""

from __future__ import annotations

from difflib import get_close_matches
from types import NoneType
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ra3_megatron.config.describe import choices, describe, field_of, sections
from ra3_megatron.config.yaml_io import scalar_text

_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a string (write numbers and words such as true in quotes)",
    "string_too_short": "a string that is not empty",
    "bool_type": "true or false",
    "list_type": "a list, such as [a, b]",
    "model_type": "a section with keys of its own",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "greater than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}


def problems(error: ValidationError) -> list[str]:
    """One line for each problem, in the order in which pydantic found them."""
    return [line for details in error.errors(include_url=False) for line in _lines(details)]


def first_problem(error: ValidationError) -> tuple[str, str]:
    """Of what is no configuration but a file's content: the key of the first problem, dotted ("": the whole), and what
    pydantic says of it."""
    first = error.errors(include_url=False)[0]
    return ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")


def _lines(details: ErrorDetails) -> list[str]:
    kind, location = details["type"], details["loc"]
    key = dotted(location)
    if kind in ("extra_forbidden", "invalid_key"):
        return [unknown_key(key)]
    if kind == "value_error":
        return [_with_section(line, location) for line in str(details["ctx"]["error"]).splitlines()]
    if kind == "literal_error":
        field = field_of(tuple(part for part in location if isinstance(part, str)))
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()  # its own, or that of a list's items
        expected = "one of " + ", ".join(next(filter(None, map(choices, kinds)), ()))
    elif kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        bound = details["ctx"][name]
        expected = f"{words} {int(bound) if bound == int(bound) else bound}"
    else:
        expected = _EXPECTED.get(kind) or details["msg"]
    if _takes_null(location) and kind not in _BOUNDS:
        expected += " or null"
    return [f"{key}={scalar_text(details['input'])}: must be {expected}"]


def dotted(location: tuple[int | str, ...]) -> str:
    """`("corpus", "packages", 0)` as `corpus.packages[0]`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) and text else f".{part}"
    return text.lstrip(".")


def unknown_key(key: str) -> str:
    """The line for a key that does not exist, with the nearest one that does."""
    known = [row.key for row in describe()] + [prefix for prefix, _ in sections() if prefix]
    if key in known and "." in key:
        return f"{key}: unknown key; write it nested, one level of indentation for each dot"
    name = key.rsplit(".", 1)[-1]
    candidates = [other for other in known if other.rsplit(".", 1)[-1] == name]
    if not candidates:
        candidates = get_close_matches(key, known, n=1, cutoff=0.75)
    if not candidates:
        names = {other.rsplit(".", 1)[-1]: other for other in reversed(known)}
        candidates = [names[match] for match in get_close_matches(name, names, n=1, cutoff=0.7)]
    hint = f"; did you mean {' or '.join(candidates)}?" if candidates else "; `ra3 config --describe` lists all keys"
    return f"{key}: unknown key{hint}"


def _with_section(line: str, location: tuple[int | str, ...]) -> str:
    """A section that occurs at several places names its keys without the place: put it in front."""
    return line if not location or line.startswith(f"{location[0]}.") else f"{dotted(location)}.{line}"


def _takes_null(location: tuple[int | str, ...]) -> bool:
    field = field_of(tuple(str(part) for part in location))
    return field is not None and NoneType in get_args(field.annotation)


def path_problem(path: str, error: OSError | UnicodeDecodeError) -> str:
    """The line for a configuration file that cannot be read."""
    reasons: dict[type[Any], str] = {
        FileNotFoundError: "no such configuration file",
        IsADirectoryError: "is a folder, not a configuration file",
        PermissionError: "is not readable",
        UnicodeDecodeError: "is not UTF-8 text",
    }
    return f"{path}: {reasons.get(type(error)) or error}"
