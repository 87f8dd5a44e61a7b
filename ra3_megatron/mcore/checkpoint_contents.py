"""What is in a checkpoint, and whether it is whole: read from its files, without process groups or a model.

A tensor is stored in one or more shards, each a stretch of one of the `*.distcp` files. Checksums find a damaged file;
the index of shards says which tensors are in it.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ra3_megatron.mcore.checkpoint_files import wrong_contents, wrong_sizes
from ra3_megatron.mcore.checkpoint_record import read_record
from ra3_megatron.mcore.names import EXTRA_STATE

INDEX = ".metadata"
"""File that says where each shard is."""
_OPTIMIZER = "optimizer.state."


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of the whole model (layers and experts are stacked in the first dimensions)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    shards: int
    bytes: int

    @property
    def is_weight(self) -> bool:
        """Whether it is a weight of the model, not state of its optimizer."""
        return not self.name.startswith(_OPTIMIZER)


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file or a tensor."""

    name: str
    problem: str
    tensors: tuple[str, ...] = ()
    """Weights and optimizer state that have a shard in it."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds."""

    folder: Path
    record: dict[str, Any]
    tensors: list[TensorFacts]
    """By name; none when the index of shards cannot be read."""
    index: Metadata | None

    @property
    def parameters(self) -> int:
        """Numbers in the weights, with the padding of the vocabulary."""
        return sum(torch.Size(t.shape).numel() for t in self.tensors if t.is_weight)

    @property
    def bytes(self) -> int:
        """Size of all files but the record."""
        return sum(facts["bytes"] for facts in self.record["files"].values())


def read_contents(folder: Path) -> Contents:
    """The record and the tensors of a checkpoint. Reads no data.

    Raises UserError when `folder` is no complete checkpoint; the message lists those below it.
    """
    record = read_record(folder)
    index = _read_index(folder)
    tensors = []
    for name, entry in sorted(index.state_dict_metadata.items() if index is not None else ()):
        if isinstance(entry, TensorStorageMetadata):
            dtype = entry.properties.dtype
            size = entry.size.numel() * dtype.itemsize
            tensors.append(
                TensorFacts(name, tuple(entry.size), str(dtype).removeprefix("torch."), len(entry.chunks), size)
            )
    return Contents(folder, record, tensors, index)


def problems_at_sight(contents: Contents) -> list[Problem]:
    """Files that are missing or have another size. Reads no data."""
    wrong = wrong_sizes(contents.folder, contents.record["files"])
    return [_problem(name, problem, _places(contents.index)) for name, problem in sorted(wrong.items())]


def find_problems(contents: Contents) -> list[Problem]:
    """Read everything: files that are missing, truncated or damaged, and tensors that hold NaN or infinite numbers."""
    folder, files = contents.folder, contents.record["files"]
    wrong = wrong_sizes(folder, files)
    wrong |= wrong_contents(folder, files, [name for name in sorted(files) if name not in wrong])
    if contents.index is None and INDEX not in wrong:
        wrong[INDEX] = "cannot be read"
    places = _places(contents.index)
    problems = [_problem(name, problem, places) for name, problem in sorted(wrong.items())]
    bad: dict[str, list[str]] = {}
    names = {tensor.name for tensor in contents.tensors}
    for file in sorted(places.keys() - wrong.keys()):
        with (folder / file).open("rb") as stream:
            for tensor, (offset, length) in places[file]:
                if tensor not in names:
                    continue
                stream.seek(offset)
                shard = torch.load(io.BytesIO(stream.read(length)), map_location="cpu", weights_only=True)
                for kind, test in (("NaN", torch.isnan), ("infinite numbers", torch.isinf)):
                    if kind not in bad.setdefault(tensor, []) and bool(test(shard).any()):
                        bad[tensor].append(kind)
    return problems + [Problem(name, f"holds {' and '.join(kinds)}") for name, kinds in sorted(bad.items()) if kinds]


def _problem(file: str, problem: str, places: dict[str, list[tuple[str, tuple[int, int]]]]) -> Problem:
    """What is wrong with a file, with the tensors whose shards it holds."""
    return Problem(file, problem, tuple(sorted({name for name, _ in places.get(file, []) if EXTRA_STATE not in name})))


def _places(index: Metadata | None) -> dict[str, list[tuple[str, tuple[int, int]]]]:
    """What is stored in each file: names, with the offset and the length of each shard in bytes."""
    places: dict[str, list[tuple[str, tuple[int, int]]]] = {}
    if index is not None:
        for key, info in index.storage_data.items():
            places.setdefault(info.relative_path, []).append((key.fqn, (info.offset, info.length)))
    return places


def _read_index(folder: Path) -> Metadata | None:
    try:
        index: Metadata = FileSystemReader(folder).read_metadata()
    except Exception:  # unpickling what is damaged can raise anything; `find_problems` reports it
        return None
    return index
