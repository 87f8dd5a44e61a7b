"""The tensors of a distributed checkpoint, written and read one by one, without a model or process groups.

What is written is what Megatron-Core writes: files of `torch.save`d shards, an index of them (`.metadata`), and the
files that name the format. Layers and experts are stacked in leading axes; each is a shard of its own, the halves of a
gated layer are two. Reading takes shards as any layout has cut them. Extra states of modules are neither written nor
read: they hold no weights.
"""

import hashlib
import io
import json
import math
import os
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ra3_megatron.config.errors import UserError
from ra3_megatron.hf.weights import Link, Shape, Slot
from ra3_megatron.mcore.checkpoint_contents import INDEX, Contents
from ra3_megatron.mcore.checkpoint_files import ALGORITHM, FileFacts, wrong_sizes
from ra3_megatron.mcore.model import SHARDING, padded_vocabulary

_VERSION = "1.0.0"
"""Of torch's format."""
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""What Megatron-Core writes to `metadata.json`."""
_HALVED = "linear_fc1.weight"


def stored_shape(slot: Slot) -> Shape:
    """Shape of a slot in a checkpoint: rows of the vocabulary are padded."""
    return (padded_vocabulary(slot.shape[0], 1), *slot.shape[1:]) if slot.padded else slot.shape


class ShardFile:
    """A file of shards that is being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = _HashingStream(path)
        self._shards: list[dict[str, Any]] = []

    def write(self, slot: Slot, whole: Tensor) -> None:
        """Write the shards of a slot. whole: its tensor, rows of the vocabulary padded."""
        assert tuple(whole.shape) == stored_shape(slot)
        pieces = list(whole.chunk(2)) if slot.key.endswith(_HALVED) else [whole]
        row = 0
        for piece in pieces:
            start = self._stream.tell()
            shard = piece.reshape((1,) * len(slot.place) + tuple(piece.shape))
            if shard.untyped_storage().nbytes() != shard.nbytes:
                shard = shard.clone()  # else the whole storage would be written
            torch.save(shard, cast(Any, self._stream))
            offsets = [*slot.place, row, *(0 for _ in slot.shape[1:])]
            self._shards.append(
                {
                    "key": slot.key,
                    "offsets": offsets,
                    "sizes": list(shard.shape),
                    "place": [start, self._stream.tell() - start],
                }
            )
            row += piece.shape[0]

    def close(self) -> dict[str, Any]:
        """Force it to the disk; what `write_index` needs to know of it, as JSON."""
        facts = self._stream.close()
        return {"file": self._path.name, "facts": facts, "shards": self._shards}


def write_index(folder: Path, files: Iterable[dict[str, Any]], dtype: torch.dtype) -> None:
    """Write what makes a folder of shard files a distributed checkpoint. files: what `ShardFile.close` returned."""
    tensors: dict[str, list[ChunkStorageMetadata]] = defaultdict(list)
    places: dict[MetadataIndex, Any] = {}
    for file in files:
        for shard in file["shards"]:
            offsets = torch.Size(shard["offsets"])
            tensors[shard["key"]].append(ChunkStorageMetadata(offsets, torch.Size(shard["sizes"])))
            places[MetadataIndex(shard["key"], offsets)] = _StorageInfo(file["file"], *shard["place"])
    entries: dict[str, Any] = {}
    for key, chunks in tensors.items():
        ends = ([o + n for o, n in zip(chunk.offsets, chunk.sizes, strict=True)] for chunk in chunks)
        size = torch.Size(max(axis) for axis in zip(*ends, strict=True))
        entries[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)
    with (folder / INDEX).open("wb") as stream:
        pickle.dump(Metadata(entries, storage_data=places, version=_VERSION), stream)
    torch.save({"content_metadata": dict(SHARDING)}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_FORMAT))


@dataclass(frozen=True)
class _Shard:
    offsets: Shape
    sizes: Shape
    info: Any


class ShardReader:
    """Reads slots from a complete checkpoint that was saved at any layout."""

    def __init__(self, contents: Contents, links: Sequence[Link]) -> None:
        """Raises UserError when files are missing, or the tensors are not those of `links`."""
        folder, index = contents.folder, contents.index
        wrong = wrong_sizes(folder, contents.record["files"])
        if wrong:
            name, problem = min(wrong.items())
            raise UserError(f"{folder / name}: {problem}: use another checkpoint")
        if index is None:
            raise UserError(f"{folder / INDEX}: is missing or damaged: use another checkpoint")
        self._folder = folder
        self._shards: dict[tuple[str, Shape], list[_Shard]] = defaultdict(list)
        stacked = {link.slot.key: len(link.slot.place) for link in links}
        weights = {tensor.name: tensor for tensor in contents.tensors if tensor.is_weight}
        unknown = sorted(weights.keys() - stacked.keys())
        if unknown:
            raise UserError(f"{folder}: holds {unknown[0]}, which this family's map does not know")
        for name in weights:
            entry = index.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata)
            for chunk in entry.chunks:
                shard = _Shard(
                    tuple(chunk.offsets), tuple(chunk.sizes), index.storage_data[MetadataIndex(name, chunk.offsets)]
                )
                self._shards[name, shard.offsets[: stacked[name]]].append(shard)
        for link in links:
            self._check(link.slot)

    def read(self, slot: Slot) -> Tensor:
        """The tensor of a slot, without padding, in memory of its own. Raises UserError when a shard is damaged."""
        first = len(slot.place)
        whole: Tensor | None = None
        for shard in self._shards[slot.key, slot.place]:
            rows, sizes = shard.offsets[first:], shard.sizes[first:]
            if any(start >= end for start, end in zip(rows, slot.shape, strict=True)):
                continue  # padding
            piece = self._load(shard, slot).view(sizes)
            kept = tuple(slice(0, end - start) for start, end in zip(rows, slot.shape, strict=True))
            if whole is None and piece[kept].shape == slot.shape:
                return piece[kept]
            if whole is None:
                whole = torch.empty(slot.shape, dtype=piece.dtype)
            place = tuple(slice(start, start + size) for start, size in zip(rows, sizes, strict=True))
            whole[place] = piece[kept]
        assert whole is not None
        return whole

    def _check(self, slot: Slot) -> None:
        first, covered = len(slot.place), 0
        for shard in self._shards.get((slot.key, slot.place), []):
            ends = zip(shard.offsets[first:], shard.sizes[first:], slot.shape, strict=False)
            covered += math.prod(max(0, min(start + size, end) - start) for start, size, end in ends)
            if len(shard.sizes) != first + len(slot.shape) or any(size != 1 for size in shard.sizes[:first]):
                covered = -1
                break
        if covered != math.prod(slot.shape):
            where = f" at {list(slot.place)}" if slot.place else ""
            raise UserError(f"{self._folder}: holds no whole {slot.key}{where} of shape {list(slot.shape)}")

    def _load(self, shard: _Shard, slot: Slot) -> Tensor:
        path = self._folder / shard.info.relative_path
        try:
            with path.open("rb") as stream:
                view = _View(stream, shard.info.offset, shard.info.length)
                with zipfile.ZipFile(cast(Any, view)) as archive:
                    damaged = archive.testzip()  # compares the checksums, which torch.load does not
                if damaged is not None:
                    raise ValueError("a checksum differs")
                view.seek(0)
                tensor = torch.load(cast(Any, view), map_location="cpu", weights_only=True)
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shard.sizes:
                raise ValueError("not the shard that the index names")
        except Exception as error:  # reading what is damaged can raise anything
            problem = f"{path}: is damaged: a shard of {slot.key} cannot be read: use another checkpoint"
            raise UserError(problem) from error
        return tensor


class _View(io.RawIOBase):
    """A stretch of a file, as a file. Reads no more ahead than it is asked for."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        super().__init__()
        self._stream, self._start, self._length = stream, start, length
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._length}[whence]
        return self._stream.seek(self._start + max(0, base + offset)) - self._start

    def tell(self) -> int:
        return self._stream.tell() - self._start

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        left = max(0, self._length - self.tell())
        count: int = cast(Any, self._stream).readinto(view[:left])
        return count


class _HashingStream:
    """A file that knows its checksum: what it is given goes to the file and into the digest."""

    def __init__(self, path: Path) -> None:
        self._stream: BinaryIO = path.open("wb")
        self._digest = hashlib.new(ALGORITHM)

    def write(self, content: bytes | memoryview) -> int:
        self._digest.update(content)
        return self._stream.write(content)

    def flush(self) -> None:
        self._stream.flush()

    def tell(self) -> int:
        return self._stream.tell()

    def close(self) -> FileFacts:
        """Force the file to the disk; its size and checksum."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        size = self._stream.tell()
        self._stream.close()
        return {"bytes": size, "sha256": self._digest.hexdigest()}
