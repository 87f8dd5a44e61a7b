"""From a YAML file and dotted overrides to a `RunConfig`, and back.

Later sources win key by key: the defaults of `RunConfig`, then the file, then the overrides in their order. The
defaults take part in the merging, so that `estep.optimizer.learning_rate=1e-4` keeps the other defaults of
`estep.optimizer` instead of falling back to those of `OptimizerConfig`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ra3_megatron import __version__
from ra3_megatron.config.describe import field_of, is_section
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.problems import path_problem, problems, unknown_key
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.yaml_io import dump, parse, parse_override

__all__ = ["dump_config", "load_config"]


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in `path` (none: the defaults) with `overrides` such as `estep.steps=5` on top.

    Raises `UserError` with one line for each problem.
    """
    values = RunConfig().model_dump()
    if path is not None:
        _merge(values, _read(path))
    wrong: list[str] = []
    for override in overrides:
        try:
            _apply(values, override)
        except UserError as error:
            wrong.append(str(error))
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        wrong += problems(error)
    if wrong:
        raise UserError("\n".join(wrong))
    return config


def dump_config(config: RunConfig) -> str:
    """Every key of `config` as YAML; `load_config` of that text gives an equal configuration."""
    header = f"# Resolved configuration of a run, written by ra3 {__version__}. Every key is explained by\n"
    return header + "# `ra3 config --describe` and in docs/configuration.md.\n" + dump(config.model_dump())


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(path_problem(str(path), error)) from error
    values = parse(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}:1: must be a mapping of sections, such as `estep:` with `steps: 5` indented below it")
    return values


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    """Put `values` over `into`; a section without keys (all of them commented out, say) changes nothing."""
    for key, value in values.items():
        if isinstance(into.get(key), dict) and (isinstance(value, dict) or value is None):
            _merge(into[key], value or {})
        else:
            into[key] = value


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    parts = tuple(key.split("."))
    if not equals or not all(parts):
        raise UserError(f"{override}: is no override; write section.key=value, such as estep.steps=5")
    field = field_of(parts)
    if field is None:
        raise UserError(unknown_key(key))
    value = parse_override(text, override)
    if is_section(field) and not isinstance(value, dict):
        raise UserError(f"{override}: {key} is a section; override one of its keys, {key}.{_first_key(field)}=…")
    nested: Any = value
    for part in reversed(parts):
        nested = {part: nested}
    _merge(values, nested)


def _first_key(field: Any) -> str:
    return next(iter(field.annotation.model_fields))
