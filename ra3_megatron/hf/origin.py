"""What a checkpoint is to be written as in Hugging Face's format: its architecture, and the small files around it.

They come from the folder that the model came from, where there is one: named by the user, kept in the checkpoint
(`hf/`, of a converted one) or kept in the run that it belongs to (`hf_source/`). A model that was trained from scratch
has its run's configuration and tokenizer.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import load_config
from ra3_megatron.config.model import ModelConfig
from ra3_megatron.hf.config_json import FILE
from ra3_megatron.hf.families import family_for
from ra3_megatron.hf.families.base import Family
from ra3_megatron.hf.files import keep_small_files, write_config
from ra3_megatron.hf.importing import HF_FOLDER, model_of
from ra3_megatron.mcore.checkpoint_record import check_architecture
from ra3_megatron.mcore.model import architecture_of
from ra3_megatron.text.tokenizer import HFTokenizer, Tokenizer, load_tokenizer

RUN_FOLDER = "hf_source"
"""Folder of a run with the small files of the one that `model.hf` named."""
_RUN_CONFIG = "config.yaml"


@dataclass(frozen=True)
class Origin:
    """What a checkpoint is to be written as."""

    family: Family
    model: ModelConfig
    vocab_size: int
    files: Path | None
    """Hugging Face folder whose small files are kept."""
    run: Path | None
    """Run whose tokenizer is written, when there is no such folder."""

    def write_small_files(self, folder: Path, precision: str) -> None:
        """Write `config.json`, for weights in `precision`, and all that goes with it."""
        model = self.model.model_copy(update={"precision": precision})
        if self.files is not None:
            keep_small_files(self.files, folder)
            write_config(folder, model, self.vocab_size, {}, self.files)
            return
        assert self.run is not None
        tokenizer = _tokenizer_of(self.run)
        special = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
        write_config(folder, model, self.vocab_size, special)
        tokenizer.write_hf(folder)


def origin_of(checkpoint: Path, record: dict[str, Any], template: Path | None = None) -> Origin:
    """That of a checkpoint. template: the Hugging Face folder that the user names.

    Raises UserError when there is none, it does not fit the weights, or no family can hold the model.
    """
    run = next((path for path in checkpoint.resolve().parents if (path / _RUN_CONFIG).is_file()), None)
    files = [template] if template is not None else [checkpoint / HF_FOLDER, *([run / RUN_FOLDER] if run else [])]
    for folder in files:
        if template is not None or (folder / FILE).is_file():
            return _of_folder(checkpoint, record, folder)
    if run is None:
        raise UserError(
            f"{checkpoint}: neither it nor a run around it holds a {FILE}: name a folder that has one, with --hf"
        )
    return _of_run(checkpoint, record, run)


def _of_folder(checkpoint: Path, record: dict[str, Any], folder: Path) -> Origin:
    family, model, vocab_size = model_of(folder)
    check_architecture(f"{checkpoint}: does not fit {folder}", record, architecture_of(model, vocab_size))
    if "tokenizer" in record and HFTokenizer.saved_in(folder):
        _check_tokenizer(checkpoint, record, HFTokenizer.load(folder, vocab_size), folder)
    return Origin(family, model, vocab_size, folder, None)


def _of_run(checkpoint: Path, record: dict[str, Any], run: Path) -> Origin:
    config = load_config(run / _RUN_CONFIG, [], resolved=True)
    vocab_size = record["architecture"]["vocabulary"]
    check_architecture(f"{checkpoint}: does not fit {run}", record, architecture_of(config.model, vocab_size))
    _check_tokenizer(checkpoint, record, _tokenizer_of(run), run)
    return Origin(family_for(config.model), config.model, vocab_size, None, run)


def _tokenizer_of(run: Path) -> Tokenizer:
    config = load_config(run / _RUN_CONFIG, [], resolved=True)
    return load_tokenizer(config.tokenizer, run / "corpus" / "tokenizer", config.model.vocab_size)


def _check_tokenizer(checkpoint: Path, record: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> None:
    if record.get("tokenizer") != tokenizer.fingerprint:
        raise UserError(f"{checkpoint}: was trained with another tokenizer than the one in {folder}")
