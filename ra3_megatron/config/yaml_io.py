"""YAML in and out, with the scalars of YAML 1.2.

PyYAML reads YAML 1.1, where `1e-3` is a string, `off` is false, `010` is eight and `1:30` is ninety. Here `1e-3` is a
number, `inf` and `.inf` are infinity, and only `true`, `false`, `null` and `~` are special words. Underscores may group
digits (`20_000_000`). Invariants: a key that stands twice in one mapping is refused, and reader and writer share one
table of scalars, so that what `dump` writes `parse` reads back as the same values.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml

from ra3_megatron.config.errors import UserError

_DIGITS = r"[0-9](?:[0-9_]*[0-9])?"
_SCALARS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$")),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")),
    ("tag:yaml.org,2002:int", re.compile(rf"^[-+]?{_DIGITS}$")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            rf"^(?:[-+]?(?:{_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?|[-+]?{_DIGITS}[eE][-+]?[0-9]+"
            r"|[-+]?\.?(?:inf|Inf|INF)|\.?(?:nan|NaN|NAN))$"
        ),
    ),
    ("tag:yaml.org,2002:merge", re.compile(r"^<<$")),
)


def _number(tag: str, text: str) -> int | float:
    digits = text.replace("_", "")
    if tag.endswith(":int"):
        try:
            return int(digits, 10)
        except ValueError as error:  # Python reads none of thousands of digits
            raise ValueError("a number of too many digits") from error
    return float(re.sub(r"\.(?=inf|nan)", "", digits, flags=re.IGNORECASE))


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars above; refuses duplicate keys."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        try:
            return _number(node.tag, str(self.construct_scalar(node)))
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in first:
                problem = f"duplicate key {key.value!r} (first on line {first[key.value]})"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            first[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the strings which YAML 1.1 or the scalars above would read as something else."""

    def represent_string(self, text: str) -> yaml.ScalarNode:
        # PyYAML folds exotic line breaks such as U+0085 away unless the string is in double quotes.
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


for _tag, _pattern in _SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, None)
    _Dumper.add_implicit_resolver(_tag, _pattern, None)
for _tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
    _Loader.add_constructor(_tag, _Loader.construct_number)
_Dumper.add_representer(str, _Dumper.represent_string)


def parse(text: str, source: str) -> Any:
    """The value of one YAML document; `source` is the file name for messages.

    Raises `UserError` with `source`, the line and the problem.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        raise UserError(f"{source}{line}: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        line = f":{text[: error.position].count(chr(10)) + 1}"
        raise UserError(f"{source}{line}: character U+{error.character:04X} is not allowed in YAML") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{source}: is not YAML: {' '.join(str(error).split())}") from error


def parse_override(text: str, override: str) -> Any:
    """The value of the override `key=text`; the whole `override` is for messages.

    A value in quotes, brackets or braces is YAML; anything else is one scalar, so that `*`, `#`, `:` need no quoting.
    Raises `UserError` when the value is malformed.
    """
    stripped = text.strip()
    if stripped[:1] in ("[", "{", '"', "'"):
        try:
            return parse(stripped, "value")
        except UserError as error:
            raise UserError(f"{override}: {str(error).partition(': ')[2]}") from error
    for tag, pattern in _SCALARS:
        if pattern.match(stripped):
            kind = tag.rsplit(":", 1)[1]
            if kind == "null":
                return None
            if kind == "bool":
                return stripped.lower() == "true"
            if kind in ("int", "float"):
                try:
                    return _number(tag, stripped)
                except ValueError as error:
                    raise UserError(f"{scalar_text(override)}: {error}") from error
    return stripped


def dump(value: Any) -> str:
    """`value` (mappings, lists and scalars) as block YAML, keys in their order."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def scalar_text(value: Any, limit: int = 60) -> str:
    """`value` on one line as the user would write it, for messages; cut at `limit` characters."""
    if isinstance(value, str):
        text = value if value.isprintable() else repr(value)
    else:
        text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10_000)
        text = " ".join(text.removesuffix("...\n").split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
