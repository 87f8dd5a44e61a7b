"""Settings of runs as they stand in a study: nested or dotted keys, brought into one form and back into overrides."""

import json
import math
from collections.abc import Mapping
from typing import Any

from ra3_megatron.config.describe import field_of, is_section
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.problems import unknown_key
from ra3_megatron.config.yaml_io import scalar_text

OWN = {"run_dir": "each cell has a folder of its own", "seed": "it is set by `seeds`"}
"""Keys of a run that the study decides."""


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings by dotted key: `{"estep": {"steps": 5}}` and `{"estep.steps": 5}` are one.

    Raises UserError with one line for each key that does not exist, stands twice or is the study's to decide.
    """
    found: dict[str, Any] = {}
    wrong: list[str] = []
    for key, value in _leaves("", settings, wrong):
        if key in found:
            wrong.append(f"{key}: stands twice, dotted and nested")
        elif key in OWN:
            wrong.append(f"{key}={scalar_text(value)}: cannot be set in a study: {OWN[key]}")
        found[key] = value
    if wrong:
        raise UserError("\n".join(wrong))
    return found


def _leaves(prefix: str, settings: Mapping[str, Any], wrong: list[str]) -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, value in settings.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        field = field_of(tuple(key.split(".")))
        if field is None:
            wrong.append(unknown_key(key))
        elif not is_section(field):
            leaves.append((key, value))
        elif isinstance(value, Mapping):
            leaves += _leaves(key, value, wrong)
        elif value is not None:
            wrong.append(f"{key}={scalar_text(value)}: is a section; set one of its keys, such as {key}.…")
    return leaves


def overrides(settings: Mapping[str, Any]) -> list[str]:
    """Dotted settings as overrides that `load_config` reads back as the same values."""
    return [f"{key}={_text(value)}" for key, value in settings.items()]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | dict):
        return _flow(value)
    return scalar_text(value, limit=10_000)


def _flow(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_flow(item)}" for key, item in value.items()) + "}"
    return _text(value)


def value_text(value: Any) -> str:
    """A value as people write it: infinity without the point of YAML."""
    return "inf" if value == math.inf else scalar_text(value, limit=80)
