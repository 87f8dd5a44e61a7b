"""Transcripts on disk, in Megatron's `IndexedDataset` format.

A store with the prefix P is four parts:

| file | content |
|---|---|
| `P_ids.{bin,idx}` | token ids, int32 |
| `P_marks.{bin,idx}` | one byte a token: role; +8 at the first token of a line; +16 there when a thought was offered |
| `P_names.{bin,idx}` | document names, UTF-8 bytes, each followed by a line break |
| `P.json` | counts, weight version, size of each file; written last |

Invariants: what is read back equals what was written, log-probabilities excepted (they are not stored); a store
without its `P.json` does not exist, so a write that was cut short is never taken for whole, also where the
machine went down (every part is on the disk before it has its name); the same transcripts give the same bytes.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch

from ra3_megatron.config.errors import UserError
from ra3_megatron.corpus.megatron_dataset import IndexedDataset, IndexedDatasetBuilder
from ra3_megatron.text.files import force_to_disk
from ra3_megatron.text.latents import Document, LatentFormat, Line
from ra3_megatron.text.tokenizer import Tokenizer
from ra3_megatron.text.transcript import Role, Transcript

FORMAT_VERSION = 1
_LATENT_ROLES = (Role.DECISION, Role.THOUGHT)
_ROLE_MASK = 7
_LINE_START = 8
_OFFERED = 16
_PARTS: dict[str, Any] = {"ids": np.int32, "marks": np.uint8, "names": np.uint8}


class TranscriptWriter:
    """Writes transcripts one by one; the store appears as a whole when the `with` block ends without an error.

    ValueError for a transcript that the format cannot hold, or when transcripts differ in their weight version.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._folder = prefix.with_name(f".{prefix.name}.partial")
        self._builders: dict[str, Any] = {}
        self._weight_version: int | None = None
        self.count = 0
        self.tokens = 0

    def __enter__(self) -> "TranscriptWriter":
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        for part, dtype in _PARTS.items():
            self._builders[part] = IndexedDatasetBuilder(str(self._folder / f"{part}.bin"), dtype=dtype)
        return self

    def add(self, transcript: Transcript) -> None:
        """Append one transcript."""
        if self._weight_version is None:
            self._weight_version = transcript.weight_version
        if transcript.weight_version != self._weight_version:
            raise ValueError(
                f"transcript of weight version {transcript.weight_version} in a store of {self._weight_version}"
            )
        name = f"{transcript.document}\n".encode()
        self._append("marks", _marks(transcript))
        self._append("ids", transcript.ids)
        self._append("names", np.frombuffer(name, dtype=np.uint8))
        self.count += 1
        self.tokens += transcript.num_tokens

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None or not self.count:
            for builder in self._builders.values():
                builder.data_file.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            if kind is None:
                raise ValueError(f"{self.prefix}: a store holds at least one transcript")
            return
        self._finish()

    def _append(self, part: str, values: npt.NDArray[Any]) -> None:
        self._builders[part].add_item(torch.from_numpy(np.array(values, dtype=_PARTS[part])))
        self._builders[part].end_document()

    def _finish(self) -> None:
        for part, builder in self._builders.items():
            builder.finalize(str(self._folder / f"{part}.idx"))
        meta_file = _meta_file(self.prefix)
        meta_file.unlink(missing_ok=True)
        sizes = {}
        for part in _PARTS:
            for ending in ("bin", "idx"):
                file = _part_file(self.prefix, part, ending)
                force_to_disk(self._folder / f"{part}.{ending}")
                os.replace(self._folder / f"{part}.{ending}", file)
                sizes[file.name] = file.stat().st_size
        meta = {
            "format": FORMAT_VERSION,
            "transcripts": self.count,
            "tokens": self.tokens,
            "weight_version": self._weight_version,
            "bytes": sizes,
        }
        new = self._folder / "meta.json"
        new.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        force_to_disk(new)
        os.replace(new, meta_file)
        self._folder.rmdir()


def write_transcripts(prefix: Path, transcripts: Iterable[Transcript]) -> int:
    """Write a store (see `TranscriptWriter`) and return the number of transcripts."""
    with TranscriptWriter(prefix) as writer:
        for transcript in transcripts:
            writer.add(transcript)
    return writer.count


def to_document(transcript: Transcript, format: LatentFormat, tokenizer: Tokenizer) -> Document:
    """The document that `transcript` was composed from; its thoughts are the document's `observed` ones.

    `compose(document, document.observed, …)` gives its tokens and roles again. A line may think where its latent was
    offered, or where a thought stands (one that a human wrote is not offered where the rest is sampled).
    """
    ids = transcript.ids.tolist()
    complete = ids[-1] == tokenizer.eos and transcript.roles[-1] == Role.LAYOUT
    stop = len(ids) - 1 if complete else len(ids)
    starts = np.searchsorted(transcript.lines, np.arange(transcript.num_lines + 1))
    lines: list[Line] = []
    observed: dict[int, tuple[int, ...]] = {}
    for index, (start, end) in enumerate(pairwise(starts.tolist())):
        roles = transcript.roles[start : min(end, stop)]
        part = ids[start : min(end, stop)]
        expert = np.flatnonzero(roles == Role.EXPERT)
        layout = np.flatnonzero(roles == Role.LAYOUT)
        body = tuple(part[position] for position in expert)
        indent = tuple(part[position] for position in layout if position < expert[0])
        tail = tuple(part[position] for position in layout if position > expert[0])
        think_set = format.think_set_of(body)
        latent = tuple(part[position] for position in np.flatnonzero(np.isin(roles, _LATENT_ROLES)))
        if latent and format.sets[think_set, latent[0]]:  # else the latent is <act>
            observed[index] = latent
        may_think = bool(transcript.offered[index]) or index in observed
        lines.append(Line(indent, body, tail, think_set, may_think))
    prompt = tuple(ids[1 : int(starts[0])])
    return Document(transcript.document, tuple(lines), observed, complete, prompt)


class TranscriptStore(Sequence[Transcript]):
    """A memory-mapped store of transcripts. Transcripts are copies: they stay valid when the store is gone.

    UserError naming the file when a part is missing, cut short, or not of this store.
    """

    def __init__(self, prefix: Path, remedy: str = "write the data set again") -> None:
        """remedy: what to do where it is damaged."""
        self.prefix = prefix
        meta = _read_meta(prefix, remedy)
        self.weight_version: int = meta["weight_version"]
        self.num_tokens: int = meta["tokens"]
        self._parts = {part: _open_part(prefix, part, meta, remedy) for part in _PARTS}
        self.lengths: npt.NDArray[np.int32] = np.array(self._parts["ids"].sequence_lengths)
        """Tokens of each transcript, [transcripts]."""
        if not np.array_equal(self.lengths, self._parts["marks"].sequence_lengths):
            file = _part_file(prefix, "marks", "idx")
            raise UserError(f"{file}: lengths differ from those of the ids: {remedy}")

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Transcript: ...

    @overload
    def __getitem__(self, index: slice) -> list[Transcript]: ...

    def __getitem__(self, index: int | slice) -> Transcript | list[Transcript]:
        if isinstance(index, slice):
            return [self._read(i) for i in range(*index.indices(len(self)))]
        return self._read(index)

    def name(self, index: int) -> str:
        """Name of the document at `index`."""
        return self._values("names", index).tobytes().decode().removesuffix("\n")

    def names(self) -> Iterator[str]:
        """Names of all documents, in order."""
        return (self.name(index) for index in range(len(self)))

    def _read(self, index: int) -> Transcript:
        marks = self._values("marks", index)
        start = marks & _LINE_START > 0
        return Transcript(
            ids=self._values("ids", index),
            roles=(marks & _ROLE_MASK).astype(np.uint8),
            lines=np.cumsum(start, dtype=np.int32) - np.int32(1),
            offered=marks[start] & _OFFERED > 0,
            weight_version=self.weight_version,
            document=self.name(index),
        )

    def _values(self, part: str, index: int) -> npt.NDArray[Any]:
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"transcript {index} of {len(self)}")
        return np.array(self._parts[part][int(position)])  # a copy: the mapping is closed with the store


def _marks(transcript: Transcript) -> npt.NDArray[np.uint8]:
    lines, offered = transcript.lines, transcript.offered
    steps = np.diff(lines, prepend=np.int32(-1))
    start = steps == 1
    whole = len(lines) > 0 and lines[-1] == len(offered) - 1 and bool(np.all(start | (steps == 0)))
    if not whole or not np.array_equal(lines < 0, transcript.roles == Role.CONTEXT):
        raise ValueError(f"transcript {transcript.document!r}: lines must be -1 for CONTEXT, then 0, 1, 2 … in order")
    marks = transcript.roles.astype(np.uint8) | start.astype(np.uint8) * np.uint8(_LINE_START)
    marks[start] |= offered.astype(np.uint8) * np.uint8(_OFFERED)
    return marks


class _Data(IndexedDataset):
    """Megatron's, which speaks up when it is deleted after an index that it could not read."""

    def __del__(self) -> None:
        if hasattr(self, "index"):
            super().__del__()


def _open_part(prefix: Path, part: str, meta: dict[str, Any], remedy: str) -> Any:
    for ending in ("bin", "idx"):
        file = _part_file(prefix, part, ending)
        if not file.is_file():
            raise UserError(f"{file}: missing, though {_meta_file(prefix).name} names it: {remedy}")
        size, expected = file.stat().st_size, meta["bytes"].get(file.name)
        if size != expected:
            raise UserError(f"{file}: {size} bytes instead of {expected}: {remedy}")
    file = _part_file(prefix, part, "idx")
    try:
        data = _Data(str(prefix.with_name(f"{prefix.name}_{part}")))
    except (AssertionError, ValueError, KeyError, OverflowError) as error:
        raise UserError(f"{file}: not the index of a Megatron data set: {remedy}") from error
    if len(data) != meta["transcripts"] or data.index.dtype != _PARTS[part] or not _covers(data, prefix, part):
        raise UserError(f"{file}: not of the data set that {_meta_file(prefix).name} describes: {remedy}")
    return data


def _covers(data: Any, prefix: Path, part: str) -> bool:
    """Whether the sequences that the index names follow each other from the first byte of the data to its last."""
    lengths = np.array(data.sequence_lengths, dtype=np.int64) * data.index.dtype_size
    ends = np.cumsum(lengths)
    size = _part_file(prefix, part, "bin").stat().st_size
    return bool(
        (lengths >= 0).all() and ends[-1:].sum() == size and (data.index.sequence_pointers == ends - lengths).all()
    )


def _read_meta(prefix: Path, remedy: str) -> dict[str, Any]:
    file = _meta_file(prefix)
    try:
        meta: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = meta["format"]
    except FileNotFoundError as error:
        raise UserError(f"{file}: no data set here, or its writing was cut short: {remedy}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not the description of a data set: {remedy}") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{file}: format {version}, this version reads format {FORMAT_VERSION}: {remedy}")
    return meta


def _meta_file(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.json")


def _part_file(prefix: Path, part: str, ending: str) -> Path:
    return prefix.with_name(f"{prefix.name}_{part}.{ending}")
