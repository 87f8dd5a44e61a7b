"""A scaling study from the options of `ra3 study scaling`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.yaml_io import parse
from ra3_megatron.study.scaling.spec import ScalingConfig, is_scaling_file, load_scaling, make_scaling


def scaling_study(file: Path, given: Mapping[str, Any], overrides: Sequence[str]) -> ScalingConfig:
    """The study of a file with these options (None: not given) over its keys. UserError.

    file: a configuration of a run, or a scaling study.
    """
    changes = {key: value for key, value in given.items() if value is not None}
    if "processes" in changes:
        changes["processes"] = _numbers(changes["processes"])
    if "layouts" in changes:
        changes["layouts"] = [part.strip() for part in changes["layouts"].split(";") if part.strip()]
    if "sizes" in changes:
        changes["sizes"] = _sizes(changes["sizes"])
    if is_scaling_file(file):
        return load_scaling(file, changes, overrides)
    for key in ("folder", "processes"):
        if key not in changes:
            raise UserError(f"study scaling needs --{key}, or the file of a scaling study instead of a run's")
    values = {"name": f"scaling of {file.stem}", "config": str(file), **changes}
    return make_scaling(values, "study scaling", overrides)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--processes {text}: must be numbers, such as 1,2,4") from None


def _sizes(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, settings = _size(text)
        if name in found:
            raise UserError(f"--sizes {text}: {name} is named twice")
        found[name] = settings
    return found


def _size(text: str) -> tuple[str, dict[str, Any]]:
    """`small=num_layers:2,hidden_size:64`."""
    name, equals, rest = text.partition("=")
    pairs = [part.partition(":") for part in rest.split(",")]
    if not equals or not name or not all(key and colon and value for key, colon, value in pairs):
        raise UserError(f"--sizes {text}: must be a name and settings, such as small=num_layers:2,hidden_size:64")
    settings = {key.strip(): parse(value, f"--sizes {text}") for key, _, value in pairs}
    if len(settings) < len(pairs):
        raise UserError(f"--sizes {text}: the same key stands twice")
    return name, settings
