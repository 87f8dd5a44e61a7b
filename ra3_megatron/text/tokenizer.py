"""What a tokenizer is to this project, and how one is found on disk.

Invariants of every `Tokenizer`: `decode_bytes(encode(text))` is `text` in UTF-8, for every text; `encode` never yields
the id of a control token or of a latent marker, even when their names stand in the text; `token_bytes` joined over
ids is what the ids decode to.
"""

from pathlib import Path
from typing import Protocol

from ra3_megatron.config.data import TokenizerConfig
from ra3_megatron.config.errors import UserError
from ra3_megatron.text.hf_tokenizer import HFTokenizer
from ra3_megatron.text.sentencepiece_tokenizer import SentencePieceTokenizer, train_sentencepiece

__all__ = ["HFTokenizer", "SentencePieceTokenizer", "Tokenizer", "load_tokenizer", "train_sentencepiece"]


class Tokenizer(Protocol):
    """Text to token ids and back, exactly."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below this; no padding included."""

    @property
    def bos(self) -> int:
        """Id that starts a document."""

    @property
    def eos(self) -> int:
        """Id that ends a document; may be the same as `bos`."""

    @property
    def pad(self) -> int:
        """Id that fills a batch; may be the same as `eos`, so mask by length, not by id."""

    @property
    def special(self) -> dict[str, int]:
        """Ids of the latent markers "<act>", "<think>", "</think>"; a marker that the tokenizer lacks has no key."""

    @property
    def token_bytes(self) -> list[bytes]:
        """Bytes of each id, [vocab_size]; b"" for control tokens and latent markers."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the ids."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without `bos` and `eos`."""

    def decode(self, ids: "list[int]") -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, control tokens nothing."""

    def decode_bytes(self, ids: "list[int]") -> bytes:
        """Bytes of `ids`."""

    def save(self, folder: str | Path) -> None:
        """Write the files from which `load_tokenizer` makes the same tokenizer."""

    def write_hf(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` for Hugging Face transformers and vLLM."""


def load_tokenizer(config: TokenizerConfig, folder: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer saved in `folder` (a run's own copy) when there is one, else the one at `config.path`.

    vocab_size: tokens of the model, where it has more than the tokenizer; the rest are tokens without text.
    Raises UserError when neither is there: with `kind=sentencepiece` and no path, one has to be trained first.
    """
    kind = SentencePieceTokenizer if config.kind == "sentencepiece" else HFTokenizer
    if not kind.saved_in(folder) and config.path is None:
        raise UserError(f"{folder} holds no {kind.FILE}: train the tokenizer first, or set tokenizer.path")
    place = folder if kind.saved_in(folder) else config.path
    assert place is not None
    if kind is HFTokenizer:
        return HFTokenizer.load(place, vocab_size)
    return kind.load(place)
