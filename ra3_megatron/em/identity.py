"""What a checkpoint says of its model and tokenizer, and the check that it fits a configuration before it is loaded."""

from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.mcore.checkpoint import read_record
from ra3_megatron.text.tokenizer import Tokenizer

FREE = ("context_length", "init_std", "precision")
"""Keys of `model` that may differ: the weights are the same with any value of them."""


def identity_of(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The part of a checkpoint's record that `check_fit` reads."""
    return {
        "model": config.model.model_dump(mode="json"),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.fingerprint,
    }


def check_fit(checkpoint: Path, name: str, config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The record of `checkpoint`, when its weights are those of the model that `config` and `tokenizer` describe.

    name: how the user named it (`warm_start.checkpoint`). Raises UserError with what differs otherwise.
    """
    record = read_record(checkpoint)
    here = identity_of(config, tokenizer)
    missing = [key for key in here if key not in record]
    if missing:
        raise UserError(f"{name}={checkpoint}: its record names no {missing[0]}: not a checkpoint of ra3 train")
    if record["tokenizer"] != here["tokenizer"]:
        raise UserError(
            f"{name}={checkpoint}: was trained with another tokenizer ({record['tokenizer'][:12]}, here "
            f"{tokenizer.fingerprint[:12]}): set tokenizer.path to the folder corpus/tokenizer of its run"
        )
    for key, value in record["model"].items():
        if key not in FREE and here["model"].get(key) != value:
            raise UserError(f"{name}={checkpoint}: has model.{key}={value}, not {here['model'].get(key)}")
    return record
