"""The tensors of a Hugging Face folder: `model.safetensors`, or shards and their index.

`Source.open` reads headers only; `check` compares them with what a family's map expects, before anything is written.
Numbers are looked at while they are read: NaN and infinite ones are refused by the name of their tensor.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ra3_megatron.config.errors import UserError
from ra3_megatron.hf.finite import is_finite
from ra3_megatron.hf.safetensors_files import (
    DTYPES,
    DuplicateNameError,
    Entry,
    read_header,
    read_tensor,
    unique,
)
from ra3_megatron.hf.weights import Link, manifest

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_BUFFERS = (".rotary_emb.inv_freq",)
"""Endings of tensors that old checkpoints hold and nobody reads: they follow from `config.json`."""
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_NAMED = 3
"""Tensors that an error names."""
_COMPARED_ROWS = 1024


@dataclass(frozen=True)
class Source:
    """The weights of a Hugging Face folder."""

    folder: Path
    entries: dict[str, Entry]
    """Every tensor, by name."""
    files: tuple[Path, ...]
    """The files that hold them, and the index."""

    @classmethod
    def open(cls, folder: Path) -> "Source":
        """Read headers and index. Raises UserError for files that are missing, not whole or contradict each other."""
        single, index = folder / SINGLE, folder / INDEX
        if single.is_file() and index.is_file():
            raise UserError(f"{folder}: holds both {SINGLE} and {INDEX}: remove the one that is not to be read")
        if single.is_file():
            return cls(folder, read_header(single), (single,))
        if not index.is_file():
            other = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
            if other:
                raise UserError(f"{folder}: holds {other[0]}, which is not read: save its weights as safetensors")
            raise UserError(f"{folder}: holds no weights (neither {SINGLE} nor {INDEX})")
        places = _read_index(index)
        files = {name: folder / name for name in sorted(set(places.values()))}
        entries: dict[str, Entry] = {}
        for file, path in files.items():
            if not path.is_file():
                raise UserError(f"{index}: names {file}, which is not there")
            for name, entry in read_header(path).items():
                if name in entries:
                    raise UserError(f"{path}: holds {name}, which {entries[name].path.name} holds too")
                if name not in places:
                    raise UserError(f"{path}: holds {name}, which {INDEX} does not name")
                entries[name] = entry
        for name, file in places.items():
            if name not in entries:
                raise UserError(f"{index}: says that {name} is in {file}, which does not hold it")
            if entries[name].path.name != file:
                raise UserError(f"{index}: says that {name} is in {file}, but it is in {entries[name].path.name}")
        return cls(folder, entries, (*files.values(), index))

    def check(self, links: Sequence[Link]) -> None:
        """UserError unless the tensors are those of these links, in a data type that is read."""
        wanted = manifest(links)
        held = {name: entry for name, entry in self.entries.items() if not name.endswith(_BUFFERS)}
        tied = _HEAD not in wanted
        unknown = [name for name in held if name not in wanted and not (tied and name == _HEAD)]
        missing = [name for name in wanted if name not in held]
        if missing:
            raise UserError(f"{self.folder}: lacks {_listed(missing)}")
        if unknown:
            raise UserError(f"{held[unknown[0]].path}: holds {_listed(unknown)}, which this family's map does not know")
        for name, entry in held.items():
            shape = wanted[_EMBEDDING if name == _HEAD and tied else name]
            if entry.shape != shape:
                raise UserError(
                    f"{entry.path}: {name} has shape {list(entry.shape)}, but {list(shape)} follows from config.json"
                )
            if entry.dtype not in DTYPES:
                raise UserError(
                    f"{entry.path}: {name} is {entry.dtype}: only {', '.join(DTYPES)} are read "
                    "(quantised weights have to be turned back first)"
                )
        if tied and _HEAD in held:
            self._check_head(held[_HEAD], held[_EMBEDDING])

    @property
    def dtype(self) -> torch.dtype:
        """bf16 when all tensors are, otherwise fp32, which holds F16 exactly."""
        kinds = {entry.dtype for name, entry in self.entries.items() if not name.endswith(_BUFFERS)}
        return torch.bfloat16 if kinds == {"BF16"} else torch.float32

    def read(self, name: str, dtype: torch.dtype, pad_to: int | None = None) -> Tensor:
        """One tensor. pad_to: rows, with zeros behind its own. Raises UserError when a number is not finite."""
        entry = self.entries[name]
        tensor = read_tensor(entry, pad_to=pad_to).to(dtype)
        if not is_finite(tensor):
            raise UserError(f"{entry.path}: {name} holds NaN or infinite numbers")
        return tensor

    def _check_head(self, head: Entry, embedding: Entry) -> None:
        """A tied model has one matrix; some checkpoints hold it twice."""
        for start in range(0, head.shape[0], _COMPARED_ROWS):
            rows = slice(start, start + _COMPARED_ROWS)
            if not torch.equal(read_tensor(head, rows).float(), read_tensor(embedding, rows).float()):
                raise UserError(
                    f"{head.path}: {_HEAD} differs from {_EMBEDDING}, although config.json says tie_word_embeddings"
                )


def _read_index(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
        places = content["weight_map"]
        if not isinstance(places, dict) or not places:
            raise TypeError
    except DuplicateNameError as error:
        raise UserError(f"{path}: names {error} twice") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: cannot be read: it must hold an object weight_map of tensors and files") from error
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{path}: {name} must be in a file of this folder, not {json.dumps(file)}")
    return places


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
