"""The small files of a Hugging Face folder: which ones go with a model, and `config.json` of a model that is written.

Beside weights, a folder holds what says how they are used: `config.json`, `generation_config.json`, the tokenizer, its
chat template. These are kept byte for byte, except for the data type in `config.json`, which is that of the weights
beside it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ra3_megatron.config.model import ModelConfig
from ra3_megatron.hf.config_json import FILE, ConfigJson
from ra3_megatron.hf.families import family_for
from ra3_megatron.text.files import write_atomic

GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
SMALL_FILES = (FILE, GENERATION, *TOKENIZER_FILES)
CHAT_TEMPLATES = "additional_chat_templates"
"""Folder of further chat templates beside a tokenizer."""
_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def small_files(folder: Path) -> list[str]:
    """Names of the small files that are there, relative to the folder."""
    templates = sorted(path.relative_to(folder).as_posix() for path in (folder / CHAT_TEMPLATES).glob("*.jinja"))
    return [name for name in SMALL_FILES if (folder / name).is_file()] + templates


def keep_small_files(source: Path, target: Path) -> None:
    """Copy the small files of a Hugging Face folder, byte for byte; makes the folder. Each appears whole."""
    target.mkdir(parents=True, exist_ok=True)
    for name in small_files(source):
        write_atomic(target / name, (source / name).read_bytes())


def write_config(
    folder: Path, model: ModelConfig, vocab_size: int, special: Mapping[str, int | None], source: Path | None = None
) -> None:
    """Write `config.json` and `generation_config.json` of a model, in the data type that `model.precision` names.

    source: the folder that the model came from; its files are kept, with the data type changed and nothing else.
    special: `bos_token_id`, `eos_token_id`, `pad_token_id` of a model without such a folder. vocab_size: rows of the
    embedding without padding. Raises UserError when no family can hold the model or the source cannot be read.
    """
    if source is None:
        ids = {key: value for key, value in special.items() if value is not None}
        values = {**with_dtype(family_for(model).config_json(model, vocab_size), model.weight_type), **ids}
        write_atomic(folder / FILE, _json(values))
        write_atomic(folder / GENERATION, _json({"_from_model_config": True, **ids}))
        return
    old = ConfigJson.read(source).values
    values = with_dtype(old, model.weight_type)
    write_atomic(folder / FILE, (source / FILE).read_bytes() if values == old else _json(values))
    if (source / GENERATION).is_file():
        write_atomic(folder / GENERATION, (source / GENERATION).read_bytes())


def with_dtype(values: dict[str, Any], precision: str) -> dict[str, Any]:
    """The content of a `config.json` with another data type, `fp32` or `bf16`, under the key that it uses."""
    keys = [key for key in ("torch_dtype", "dtype") if key in values] or ["torch_dtype"]
    return {**values, **dict.fromkeys(keys, _TORCH_NAMES[precision])}


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
