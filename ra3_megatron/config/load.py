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
from ra3_megatron.config.inherit import inherit
from ra3_megatron.config.problems import path_problem, problems, unknown_key
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.yaml_io import dump, parse, parse_override, scalar_text

__all__ = ["dump_config", "load_config"]


def load_config(path: Path | None, overrides: Sequence[str] = (), resolved: bool = False) -> RunConfig:
    """The configuration in `path` (none: the defaults) with `overrides` such as `estep.steps=5` on top.

    With `model.hf`, the folder's `config.json` decides the architecture. resolved: the file is what `dump_config`
    wrote, so that has been done. Raises `UserError` with one line for each problem.
    """
    given: dict[str, Any] = {} if path is None else _read(path)
    wrong: list[str] = []
    for override in overrides:
        try:
            _apply(given, override)
        except UserError as error:
            wrong.append(str(error))
    values = RunConfig().model_dump()
    _merge(values, given)
    if not resolved and not wrong:
        inherit(values, given)
        wrong += _apply_hf(values, given)
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


def _apply_hf(values: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Fill in what the folder `model.hf` decides; lines on keys that say something else. given: the user's own keys."""
    model, asked = values.get("model"), given.get("model")
    if not isinstance(model, dict) or not isinstance(asked, dict) or not isinstance(model.get("hf"), str):
        return []
    from ra3_megatron.hf.families import read_folder  # the one arrow that points back: it reads JSON only

    folder = model["hf"]
    warm_start = given.get("warm_start") or {}
    if isinstance(warm_start, dict) and "steps" not in warm_start:
        values["warm_start"]["steps"] = 0  # the base model is there already
    try:
        _, keys, longest = read_folder(Path(folder))
    except UserError as error:
        return [f"model.hf={folder}: {line}" for line in str(error).splitlines()]
    except OSError as error:
        return [f"model.hf={folder}: cannot be read ({error.strerror})"]
    wrong = []
    for key, value in keys.items():
        own = asked.get(key)
        said = {**value, **own} if isinstance(value, dict) and isinstance(own, dict) else own
        if own is not None and said != value:
            wrong.append(
                f"model.{key}={scalar_text(own)}: model.hf={folder} has {scalar_text(value)}: leave model.{key} out"
            )
        model[key] = value
    length = model.get("context_length")
    if "context_length" not in asked:
        model["context_length"] = min(int(length or longest), longest)
    elif isinstance(length, int) and length > longest:
        wrong.append(f"model.context_length={length}: model.hf={folder} reads at most {longest} tokens")
    own = given.get("tokenizer")
    if not own:
        values["tokenizer"] |= {"kind": "hf", "path": folder}
    elif isinstance(own, dict) and own.get("kind") != "hf":
        kind = values["tokenizer"]["kind"]
        wrong.append(f"tokenizer.kind={kind}: model.hf={folder} has its tokenizer: leave the section tokenizer out")
        values["tokenizer"] = RunConfig().tokenizer.model_dump() | {"kind": "hf", "path": folder}
    elif isinstance(own, dict) and own.get("path") is None:
        values["tokenizer"]["path"] = folder
    return wrong


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
