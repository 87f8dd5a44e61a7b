"""Rows and plain texts: jsonl, parquet, text files, and data sets through the `datasets` library.

Local files are read directly, one row (or one batch of rows) at a time: no copy in a cache, and an error can name the
file and the line. `datasets` and `pyarrow` are imported only when a source needs them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.corpus.files import decode_utf8, read_bytes, unreadable

Row = tuple[str, int | None, str]
"""File (or data set), number of the row in it (from 0; None: the file is one text), text."""

_PARQUET_BATCH_ROWS = 1024


def jsonl(files: Iterable[tuple[str, Path]], field: str) -> Iterator[Row]:
    """Rows of JSON-lines files; blank lines are passed over (and numbered)."""
    for name, file in files:
        try:
            with file.open("rb") as stream:
                offset = 0
                for number, line in enumerate(stream):
                    if line.strip():
                        yield name, number, _jsonl_text(line, field, f"{file}:{number + 1}", offset)
                    offset += len(line)
        except OSError as error:
            raise unreadable(file, error) from error


def _jsonl_text(line: bytes, field: str, where: str, offset: int) -> str:
    text = decode_utf8(line, where, offset)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not a JSON value ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
        raise UserError(f"{where}: a JSON value that cannot be read ({_first_line(error)})") from error
    if not isinstance(row, dict):
        raise UserError(f'{where}: a {type(row).__name__}, not a JSON object such as {{"{field}": "…"}}')
    return _text_of(row, field, where)


def parquet(files: Iterable[tuple[str, Path]], field: str) -> Iterator[Row]:
    """Rows of parquet files, read in batches."""
    pq = _import("pyarrow.parquet")
    arrow = _import("pyarrow")
    for name, file in files:
        try:
            with pq.ParquetFile(file) as table:
                _check_field(table.schema_arrow.names, field, str(file))
                number = 0
                for batch in table.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=[field]):
                    for row in batch.to_pylist():
                        yield name, number, _text_of(row, field, f"{file}, row {number}")
                        number += 1
        except OSError as error:
            raise unreadable(file, error) from error
        except (arrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(f"{file}: not a readable parquet file ({_first_line(error)})") from error


def text(files: Iterable[tuple[str, Path]], separator: str | None) -> Iterator[Row]:
    """Plain texts: one document a file, or the parts between lines that are equal to `separator`."""
    for name, file in files:
        if separator is None:
            yield name, None, decode_utf8(read_bytes(file), str(file))
        else:
            yield from _separated(name, file, separator)


def _separated(name: str, file: Path, separator: str) -> Iterator[Row]:
    number, offset = 0, 0
    part: list[str] = []
    try:
        with file.open("rb") as stream:
            for raw in stream:
                line = decode_utf8(raw, str(file), offset)
                offset += len(raw)
                if line.rstrip("\r\n") == separator:
                    yield name, number, "".join(part)
                    number, part = number + 1, []
                else:
                    part.append(line)
    except OSError as error:
        raise unreadable(file, error) from error
    if any(line.strip() for line in part):
        yield name, number, "".join(part)


def hub(path: str, name: str | None, split: str, field: str, streaming: bool) -> Iterator[Row]:
    """Rows of a data set that `datasets.load_dataset` understands (hub name or local folder)."""
    datasets = _import("datasets")
    datasets.disable_progress_bars()  # the build shows its own
    where = f"corpus.path={path}"
    try:
        data = datasets.load_dataset(path, name, split=split, streaming=streaming)
    except Exception as error:  # the library raises many kinds, OSError and its own among them
        wanted = f"corpus.hub_config={name}, corpus.hub_split={split}"
        raise UserError(f"{where}: the data set cannot be loaded with {wanted} ({_first_line(error)})") from error
    if data.column_names is not None:
        _check_field(data.column_names, field, where)
        data = data.select_columns([field])
    iterator = enumerate(data)
    while True:
        try:
            number, row = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise UserError(f"{where}: reading the data set failed ({_first_line(error)})") from error
        yield path, number, _text_of(row, field, f"{where}, row {number}")


def _text_of(row: Mapping[str, Any], field: str, where: str) -> str:
    _check_field(list(row), field, where)
    value = row[field]
    if not isinstance(value, str):
        raise UserError(f"{where}: corpus.text_field={field} holds a {type(value).__name__}, not a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: character {error.start} of {field!r} is half of a surrogate pair") from error
    return value


def _check_field(fields: list[str], field: str, where: str) -> None:
    if field not in fields:
        raise UserError(f"{where}: no field corpus.text_field={field}; the fields are: {', '.join(fields) or 'none'}")


def _import(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"corpus.source needs the package {module}: pip install 'ra3-megatron[data]'") from error


def _first_line(error: BaseException) -> str:
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
