"""A checkpoint becomes a Hugging Face folder, tensor by tensor: safetensors, and the small files around them.

Any checkpoint of this project will do, whatever layout it was saved at and whether it holds optimizer state. Tensors
are read shard by shard from the files that hold them; the padding of the vocabulary stays behind.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from ra3_megatron import __version__
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ModelConfig
from ra3_megatron.hf.conversion import OnBytes, Progress, convert
from ra3_megatron.hf.distcp import ShardReader
from ra3_megatron.hf.families import family_named
from ra3_megatron.hf.files import small_files
from ra3_megatron.hf.finite import is_finite
from ra3_megatron.hf.importing import DTYPES
from ra3_megatron.hf.origin import Origin, origin_of
from ra3_megatron.hf.safetensors_files import Writer
from ra3_megatron.hf.source import INDEX, SINGLE
from ra3_megatron.hf.weights import Link, by_name, manifest
from ra3_megatron.mcore.checkpoint_contents import read_contents
from ra3_megatron.mcore.checkpoint_files import facts_of
from ra3_megatron.mcore.checkpoint_record import RECORD

SHARD_BYTES = 5_000_000_000
_STATE = ("phase", "iteration", "step", "weight_version")
"""What `conversion.json` repeats of a checkpoint's record."""


def export_hf(
    checkpoint: Path,
    out: Path,
    dtype: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    template: Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> bool:
    """Write a checkpoint as the Hugging Face folder `out`; False when that has been done already.

    dtype: `fp32` or `bf16`; None: that of the weights. max_shard_bytes: of the tensors in one file; a larger tensor
    has a file of its own. template: folder whose small files are kept, instead of those that the checkpoint or its run
    has. Raises UserError for what is damaged, does not fit, or is not finite; then nothing is left behind.
    """
    contents = read_contents(checkpoint)
    origin = origin_of(checkpoint, contents.record, template)
    links = origin.family.links(origin.model, origin.vocab_size)
    precision = dtype or contents.record["precision"]
    reader = ShardReader(contents, links)
    size = DTYPES[precision].itemsize
    files = _files([(name, math.prod(shape) * size) for name, shape in manifest(links).items()], max_shard_bytes)
    job = _Export(checkpoint, reader, origin, precision, files)
    kept = origin.files
    identity = {
        "conversion": "Megatron to Hugging Face",
        "ra3": __version__,
        "dtype": precision,
        "max_shard_bytes": max_shard_bytes,
        **{key: contents.record[key] for key in _STATE if key in contents.record},
        "checkpoint": hashlib.sha256((checkpoint / RECORD).read_bytes()).hexdigest(),
        "small_files": {} if kept is None else {name: facts_of(kept / name)["sha256"] for name in small_files(kept)},
    }
    return convert(job, out, identity, workers, progress)


@dataclass(frozen=True)
class _Export:
    checkpoint: Path
    reader: ShardReader
    origin: Origin
    dtype: str
    files: list[list[str]]
    """Names of the tensors in each file."""

    def sizes(self) -> list[int]:
        shapes = {name: link.shapes[place] for name, (link, place) in self._links().items()}
        return [sum(self._bytes(shapes[name]) for name in names) for names in self.files]

    def run(self, unit: int, folder: Path, on_bytes: OnBytes) -> dict[str, Any]:
        names, links, dtype = self.files[unit], self._links(), DTYPES[self.dtype]
        path = folder / self._file(unit)
        writer = Writer(path, [(name, links[name][0].shapes[links[name][1]]) for name in names], dtype)
        current: Link | None = None
        parts: list[Tensor] = []
        for name in names:
            link, place = links[name]
            if link is not current:
                parts.clear()
                current, parts = link, link.split(self.reader.read(link.slot))
            tensor = parts[place].to(dtype)
            if not is_finite(tensor):
                raise UserError(f"{self.checkpoint}: {name} holds NaN or infinite numbers")
            writer.write(name, tensor)
            on_bytes(tensor.nbytes)
        writer.close()
        return {"file": path.name, "facts": {"bytes": path.stat().st_size}}

    def finish(self, folder: Path, results: Sequence[dict[str, Any]]) -> None:
        if len(self.files) > 1:
            places = {name: self._file(unit) for unit, names in enumerate(self.files) for name in names}
            index = {"metadata": {"total_size": sum(self.sizes())}, "weight_map": places}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        self.origin.write_small_files(folder, self.dtype)

    def _file(self, unit: int) -> str:
        return SINGLE if len(self.files) == 1 else f"model-{unit + 1:05}-of-{len(self.files):05}.safetensors"

    def _bytes(self, shape: Sequence[int]) -> int:
        return math.prod(shape) * DTYPES[self.dtype].itemsize

    def _links(self) -> dict[str, tuple[Link, int]]:
        return _links(self.origin.family.name, self.origin.model.model_dump_json(), self.origin.vocab_size)


@lru_cache(maxsize=1)
def _links(family: str, model: str, vocab_size: int) -> dict[str, tuple[Link, int]]:
    links = family_named(family).links(ModelConfig.model_validate_json(model), vocab_size)
    return {name: (link, place) for name, link, place in by_name(links)}


def _files(sizes: Sequence[tuple[str, int]], most: int) -> list[list[str]]:
    """Consecutive tensors, at most `most` bytes a file."""
    files: list[list[str]] = []
    held = 0
    for name, size in sizes:
        if not files or held + size > most:
            files.append([])
            held = 0
        files[-1].append(name)
        held += size
    return files
