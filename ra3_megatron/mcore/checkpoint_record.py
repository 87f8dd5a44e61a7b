"""The JSON record of a checkpoint: its form, and whether there is one."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.problems import first_problem

RECORD = "checkpoint.json"
PARTIAL = ".partial"
_MISSING = "Field required"
"""What pydantic says of a field that is not there."""


class _File(BaseModel, extra="allow", strict=True):
    bytes: int
    sha256: str


class _Record(BaseModel, extra="allow", strict=True):
    """What the package reads of a record; that of a converted checkpoint holds no state of a run."""

    architecture: dict[str, Any]
    precision: str
    optimizer: str | None
    layout: dict[str, int | bool | None]
    files: dict[str, _File]
    tokenizer: str | None = None
    phase: str = ""
    iteration: int = 0
    step: int = 0
    weight_version: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data: dict[str, Any] | None = None
    spikes: dict[str, Any] | None = None


def read_record(folder: Path) -> dict[str, Any]:
    """The JSON record of a complete checkpoint. Raises UserError when there is none."""
    path = folder / RECORD
    try:
        if folder.name.endswith(PARTIAL) or not path.is_file():
            raise UserError(_no_checkpoint(folder))
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise UserError(f"{path}: cannot be read: {problem}") from problem
    try:
        _Record.model_validate(record)
    except ValidationError as problem:
        key, said = first_problem(problem)
        wrong = f"names no {key}" if said == _MISSING else f"{key or 'its content'}: {said}"
        raise UserError(f"{path}: {wrong}: not a checkpoint of this version of ra3") from problem
    return record


def _no_checkpoint(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder"
    below = [path for depth in (1, 2, 3) for path in folder.glob("*/" * depth + RECORD)]  # of a run, or a part of it
    records = sorted(below, key=lambda path: path.stat().st_mtime)
    found = [str(path.parent) for path in records if not is_partial(path.parent)]
    if not found:
        return f"{folder}: is no complete checkpoint (no {RECORD})"
    return f"{folder}: is no checkpoint itself; those below it, oldest first: {', '.join(found)}"


def check_architecture(name: str, record: dict[str, Any], architecture: dict[str, Any]) -> None:
    """UserError unless the record is that of a model with this architecture. name: what the user called it."""
    for key, wanted in architecture.items():
        held = record["architecture"].get(key)
        if held != wanted:
            raise UserError(f"{name}: holds a model with {key}={held}, but this model has {key}={wanted}")


def is_partial(path: Path) -> bool:
    """Whether a folder is a checkpoint that is being written, or that a kill left unfinished."""
    return path.name.endswith(PARTIAL)
