"""The configuration as a table: every key with its type, default and meaning, read off the classes themselves.

The table is shown by `ra3 config --describe` and written to `docs/configuration.md` by `make docs-config`.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from ra3_megatron.config.base import Section
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.yaml_io import scalar_text

_NAMES = {int: "int", float: "float", str: "str", bool: "bool"}
_BOUNDS = ((Ge, "ge", ">="), (Gt, "gt", ">"), (Le, "le", "<="), (Lt, "lt", "<"))


class Row(NamedTuple):
    """One key of the configuration."""

    key: str
    """Dotted key."""
    type: str
    """Type and bounds, such as `int >= 2` or `mean | sum`."""
    default: str
    """Default value as YAML."""
    doc: str
    """What the key decides."""


def field_of(key: tuple[str, ...]) -> FieldInfo | None:
    """The field at a key given as its parts; None when there is none."""
    section: type[Section] = RunConfig
    for part in key[:-1]:
        child = section.model_fields.get(part)
        if child is None or not is_section(child):
            return None
        assert isinstance(child.annotation, type)
        section = child.annotation
    return section.model_fields.get(key[-1]) if key else None


def is_section(field: FieldInfo) -> bool:
    """Whether a field holds further keys."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def choices(annotation: Any) -> tuple[str, ...]:
    """The values a `Literal` allows; () for any other annotation."""
    return tuple(str(value) for value in get_args(annotation)) if get_origin(annotation) is Literal else ()


def _type_text(annotation: Any, metadata: list[Any]) -> str:
    if get_origin(annotation) is Annotated:
        base, *more = get_args(annotation)
        return _type_text(base, [*more, *metadata])
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
        text = " | ".join(_type_text(kind, metadata) for kind in kinds)
        return f"{text} | null" if NoneType in get_args(annotation) else text
    if get_origin(annotation) is Literal:
        return " | ".join(choices(annotation))
    if get_origin(annotation) is list:
        return f"list of {_type_text(get_args(annotation)[0], [])}"
    bounds = [
        f"{sign} {_number(getattr(bound, name))}"
        for bound in metadata
        for kind, name, sign in _BOUNDS
        if type(bound) is kind
    ]
    if any(isinstance(bound, MinLen) for bound in metadata):
        bounds.append("not empty")
    return " ".join([_NAMES[annotation], ", ".join(bounds)]).strip()


def _number(value: Any) -> str:
    return str(int(value)) if value == int(value) else str(value)


def type_text(field: FieldInfo) -> str:
    """Type and bounds of a field, such as `int >= 2`."""
    return _type_text(field.annotation, list(field.metadata))


def sections() -> Iterator[tuple[str, Section]]:
    """Every section as (dotted key, defaults), the whole run first with the key ""."""

    def walk(prefix: str, section: Section) -> Iterator[tuple[str, Section]]:
        yield prefix, section
        for name, field in type(section).model_fields.items():
            if is_section(field):
                yield from walk(f"{prefix}.{name}".lstrip("."), getattr(section, name))

    return walk("", RunConfig())


def describe() -> list[Row]:
    """Every key of the configuration, sections in the order of `RunConfig`."""
    return [row for prefix, section in sections() for row in _rows(prefix, section)]


def _rows(prefix: str, section: Section) -> list[Row]:
    return [
        Row(
            key=f"{prefix}.{name}".lstrip("."),
            type=type_text(field),
            default=scalar_text(getattr(section, name)),
            doc=" ".join((field.description or "").split()),
        )
        for name, field in type(section).model_fields.items()
        if not is_section(field)
    ]


def markdown() -> str:
    """The page `docs/configuration.md`."""
    lines = [
        "# Configuration",
        "",
        "<!-- Written by `make docs-config` from ra3_megatron/config. Do not edit. -->",
        "",
        "A run is configured by a YAML file and dotted overrides, which win over the file:",
        "",
        "    ra3 train examples/quickstart.yaml estep.latent_price=0.03 mstep.optimizer.learning_rate=5e-4",
        "",
        "A key that is left out has its default. Unknown keys, wrong types and impossible combinations are refused",
        "before anything starts. `ra3 config FILE key=value …` prints the resolved configuration; the run folder",
        "keeps it. Numbers may be written `1e-3`, `20_000_000` and `inf`; the empty value is `null`.",
        "",
    ]
    for prefix, section in sections():
        rows = _rows(prefix, section)
        if not rows:
            continue
        lines += [f"## {prefix or 'Run'}", "", " ".join((type(section).__doc__ or "").split()), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for row in rows:
            cells = (f"`{row.key}`", _cell(row.type), f"`{row.default}`", _cell(row.doc))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;") if "`" not in text else text.replace("|", r"\|")
