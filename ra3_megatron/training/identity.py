"""What a checkpoint says of its tokenizer, and the check that it fits a configuration before anything is built."""

from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.mcore.checkpoint_record import check_architecture, read_record
from ra3_megatron.mcore.model import architecture_of
from ra3_megatron.text.tokenizer import Tokenizer


def identity_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """The part of a checkpoint's record that `check_fit` reads, beside the architecture."""
    return {"tokenizer": tokenizer.fingerprint}


def require_checkpoint(checkpoint: Path, name: str) -> dict[str, Any]:
    """Its record. name: how the user named it. Raises UserError when it is no complete checkpoint."""
    try:
        return read_record(checkpoint)
    except UserError as error:
        raise UserError(f"{name}={error}") from error


def check_fit(checkpoint: Path, name: str, config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The record of `checkpoint`, when its weights are those of the model that `config` and `tokenizer` describe.

    name: how the user named it (`warm_start.checkpoint`). Raises UserError with what differs otherwise.
    """
    record = require_checkpoint(checkpoint, name)
    if "tokenizer" not in record:
        raise UserError(f"{name}={checkpoint}: its record names no tokenizer: not a checkpoint of ra3 train")
    if record["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"{name}={checkpoint}: was trained with another tokenizer ({record['tokenizer'][:12]}, here "
            f"{tokenizer.fingerprint[:12]}): set tokenizer.path to the folder corpus/tokenizer of its run"
        )
    check_architecture(f"{name}={checkpoint}", record, architecture_of(config.model, tokenizer.vocab_size))
    return record
