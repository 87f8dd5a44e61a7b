"""Safetensors files, read and written tensor by tensor: no more than one tensor is in memory, and nothing is mapped.

A file is 8 bytes with the length of a JSON header (little endian), the header (for each tensor its data type, shape
and place in the data), and the data of all tensors without gaps. The header is read with suspicion: a file that is
shorter or longer than it says, tensors that overlap or leave gaps, and names that stand in it twice are errors.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ra3_megatron.config.errors import UserError
from ra3_megatron.hf.weights import Shape

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Data types that are read and written; a tensor of any other is refused by name."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000
_ALIGNMENT = 8
_PIECE = 16 * 2**20
"""Bytes that are written at once."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor is."""

    path: Path
    dtype: str
    """As the header has it: `F32`, `BF16`, …"""
    shape: Shape
    start: int
    """First byte, counted from the beginning of the file."""
    length: int
    """Bytes."""


class DuplicateNameError(ValueError):
    """A name that stands twice in one JSON object."""


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a file, in the order of the data. Raises UserError when the file is not whole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= _LONGEST_HEADER:
                raise UserError(f"{path}: is damaged or no safetensors file (its header cannot be read)")
            if 8 + length > size:
                raise UserError(f"{path}: is truncated: its header has {length} bytes, the file {size}")
            text = stream.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        content = json.loads(text, object_pairs_hook=unique)
    except DuplicateNameError as error:
        raise UserError(f"{path}: names {error} twice") from error
    except ValueError as error:
        raise UserError(f"{path}: is damaged: its header is not JSON") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is damaged: its header is no object")
    content.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in content.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].length)):
        if entry.start != end:
            raise UserError(f"{path}: is damaged: {name} does not begin where the tensor before it ends")
        end = entry.start + entry.length
    if end != size:
        kind = "truncated" if size < end else "damaged"
        raise UserError(f"{path}: is {kind}: {size} bytes instead of {end}")
    return dict(sorted(entries.items(), key=lambda item: item[1].start))


def read_tensor(entry: Entry, rows: slice | None = None, pad_to: int | None = None) -> Tensor:
    """One tensor, or `rows` of it (of its first dimension); in memory of its own.

    pad_to: rows of zeros are added behind it up to this number.
    """
    shape = entry.shape
    first, last = (0, shape[0] if shape else 1) if rows is None else rows.indices(shape[0])[:2]
    row = entry.length // (shape[0] or 1) if shape else entry.length
    size = (last - first) * row
    total = max(last - first, pad_to or 0)
    memory = torch.empty(total * row, dtype=torch.uint8)
    memory[size:] = 0
    view = memory.numpy().data[:size]
    with entry.path.open("rb", buffering=0) as stream:
        stream.seek(entry.start + first * row)
        while view:
            count = stream.readinto(view)
            if not count:
                raise UserError(f"{entry.path}: became shorter while it was read")
            view = view[count:]
    return memory.view(DTYPES[entry.dtype]).view((total, *shape[1:]) if shape else ())


class Writer:
    """A file whose tensors are known beforehand by name, data type and shape, and are then written in this order."""

    def __init__(self, path: Path, tensors: Sequence[tuple[str, Shape]], dtype: torch.dtype) -> None:
        self._path = path
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in tensors:
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._left = list(tensors)
        self._dtype = dtype
        self._stream: BinaryIO = path.open("wb", buffering=0)
        self._write(struct.pack("<Q", len(text)))
        self._write(text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor."""
        expected = self._left.pop(0)
        assert (name, tuple(tensor.shape), tensor.dtype) == (*expected, self._dtype), f"{name} is not next in the file"
        self._write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Force the file to the disk."""
        assert not self._left, "tensors are missing"
        os.fsync(self._stream.fileno())
        self._stream.close()

    def _write(self, content: bytes | memoryview) -> None:
        view = memoryview(content)
        while view:
            view = view[self._stream.write(view[:_PIECE]) :]


def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object none of whose names may stand twice. Raises DuplicateNameError."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise DuplicateNameError(name)
        found[name] = value
    return found


def _entry(path: Path, name: str, value: Any, data: int) -> Entry:
    try:
        dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, start, end))
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: is damaged: its header does not say where {name} is") from error
    if not whole or not isinstance(dtype, str) or end < start:
        raise UserError(f"{path}: is damaged: its header does not say where {name} is")
    if dtype in DTYPES and end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise UserError(f"{path}: is damaged: {name} has {end - start} bytes, which are not those of its shape")
    return Entry(path, dtype, shape, data + start, end - start)
