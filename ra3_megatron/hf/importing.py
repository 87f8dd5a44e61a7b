"""A Hugging Face folder becomes a distributed checkpoint that loads at any layout, tensor by tensor, without a model.

The checkpoint holds weights alone, in the form that `mcore.checkpoint` saves, and the small files of the folder in
`hf/`, byte for byte. Whatever a folder holds too much, too little or in another shape is refused before anything is
written.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from ra3_megatron import __version__
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ModelConfig
from ra3_megatron.config.problems import first_problem
from ra3_megatron.hf.config_json import FILE
from ra3_megatron.hf.conversion import OnBytes, Progress, convert
from ra3_megatron.hf.distcp import ShardFile, stored_shape, write_index
from ra3_megatron.hf.families import family_named, read_folder
from ra3_megatron.hf.families.base import Family
from ra3_megatron.hf.files import keep_small_files, small_files
from ra3_megatron.hf.source import Source
from ra3_megatron.hf.weights import Link
from ra3_megatron.mcore.checkpoint_files import facts_of
from ra3_megatron.mcore.checkpoint_record import RECORD
from ra3_megatron.mcore.model import architecture_of
from ra3_megatron.text.tokenizer import HFTokenizer

HF_FOLDER = "hf"
"""Folder of a converted checkpoint with the small files of the one it was made from."""
PHASE = "converted"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
UNIT_BYTES = 512 * 2**20
"""What a file of shards holds at most, unless one tensor is larger; what a kill costs."""
_ONE_PROCESS = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor", "data")


def import_hf(
    folder: Path, out: Path, dtype: str | None = None, workers: int = 1, progress: Progress | None = None
) -> bool:
    """Convert the Hugging Face folder `folder` to the checkpoint `out`; False when that has been done already.

    dtype: `fp32` or `bf16`; None: that of the weights (fp32 for F16 and for mixtures). Raises UserError for everything
    that cannot be represented or is damaged; then nothing is left behind.
    """
    family, model, vocab_size = model_of(folder)
    source = Source.open(folder)
    source.check(family.links(model, vocab_size))
    tokenizer = HFTokenizer.load(folder, vocab_size).fingerprint if HFTokenizer.saved_in(folder) else None
    precision = dtype or {torch.float32: "fp32", torch.bfloat16: "bf16"}[source.dtype]
    job = _Import(source, family.name, model, vocab_size, precision, tokenizer, UNIT_BYTES)
    identity = {
        "conversion": "Hugging Face to Megatron",
        "ra3": __version__,
        "dtype": precision,
        "unit_bytes": UNIT_BYTES,
        "files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in source.files},
        "small_files": {name: facts_of(folder / name)["sha256"] for name in small_files(folder)},
    }
    return convert(job, out, identity, workers, progress)


def model_of(folder: Path) -> tuple[Family, ModelConfig, int]:
    """Family, architecture (in fp32) and vocabulary of a Hugging Face folder.

    Raises UserError for what cannot be represented.
    """
    family, keys, longest = read_folder(folder)
    try:
        model = ModelConfig(**keys, context_length=longest)
    except ValidationError as error:
        name, reason = first_problem(error)
        raise UserError(
            f"{folder / FILE}: cannot be represented: {f'model.{name}: ' if name else ''}{reason}"
        ) from error
    return family, model, int(keys["vocab_size"])


@dataclass(frozen=True)
class _Import:
    source: Source
    family: str
    model: ModelConfig
    vocab_size: int
    dtype: str
    tokenizer: str | None
    """Fingerprint."""
    unit_bytes: int

    def sizes(self) -> list[int]:
        size = DTYPES[self.dtype].itemsize
        return [sum(_numbers(link) * size for link in unit) for unit in self._units()]

    def run(self, unit: int, folder: Path, on_bytes: OnBytes) -> dict[str, Any]:
        dtype = DTYPES[self.dtype]
        file = ShardFile(folder / f"__0_{unit}.distcp")
        for link in self._units()[unit]:
            rows = stored_shape(link.slot)[0] if link.slot.padded else None
            file.write(link.slot, link.join([self.source.read(name, dtype, rows) for name in link.names]))
            on_bytes(_numbers(link) * dtype.itemsize)
        return file.close()

    def finish(self, folder: Path, results: Sequence[dict[str, Any]]) -> None:
        write_index(folder, results, DTYPES[self.dtype])
        keep_small_files(self.source.folder, folder / HF_FOLDER)
        files = {result["file"]: result["facts"] for result in results}
        small = (HF_FOLDER + "/" + name for name in small_files(folder / HF_FOLDER))
        files |= {name: facts_of(folder / name) for name in (".metadata", "common.pt", "metadata.json", *small)}
        record = {
            "version": __version__,
            "layout": {**dict.fromkeys(_ONE_PROCESS, 1), "distributed_optimizer": None},
            "architecture": architecture_of(self.model, self.vocab_size),
            "precision": self.dtype,
            "optimizer": None,
            "phase": PHASE,
            "step": 0,
            "weight_version": 0,
            **({} if self.tokenizer is None else {"tokenizer": self.tokenizer}),
            "hf": {"family": self.family, "dtype": self.dtype},
            "files": dict(sorted(files.items())),
        }
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    def _units(self) -> list[list[Link]]:
        return _units(self.family, self.model.model_dump_json(), self.vocab_size, self.dtype, self.unit_bytes)


@lru_cache(maxsize=1)
def _units(family: str, model: str, vocab_size: int, dtype: str, unit_bytes: int) -> list[list[Link]]:
    """Consecutive links, `unit_bytes` each."""
    units: list[list[Link]] = []
    size = 0
    for link in family_named(family).links(ModelConfig.model_validate_json(model), vocab_size):
        bytes_ = _numbers(link) * DTYPES[dtype].itemsize
        if not units or size + bytes_ > unit_bytes:
            units.append([])
            size = 0
        units[-1].append(link)
        size += bytes_
    return units


def _numbers(link: Link) -> int:
    return torch.Size(link.slot.shape).numel()
