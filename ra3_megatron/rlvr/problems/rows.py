"""Files of benchmarks and problems: one JSON object a line, gzipped or not."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError

Row = dict[str, Any]
Table = list[tuple[str, Row]]
"""Rows, each with its place: FILE:LINE, or its number on the hub."""


def read_rows(path: Path) -> Table:
    """The objects of a `.jsonl` file, gzipped or not. Raises UserError when it cannot be read."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read as lines of JSON ({error})") from error
    return [
        (f"{path}:{number}", _row(path, number, line))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def _row(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{number}: must be a line of JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: must be a JSON object")
    return row
