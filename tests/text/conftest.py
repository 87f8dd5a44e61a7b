"""Tokenizers of every supported kind, trained once a session on standard-library code."""

from pathlib import Path

import pytest
from samples import modules
from tokenizers import normalizers
from trained import KINDS, SPLITS, write_byte_fallback, write_byte_level

from ra3_megatron.text.tokenizer import HFTokenizer, SentencePieceTokenizer, Tokenizer, train_sentencepiece


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    train_sentencepiece(modules(), 2000, folder / "sentencepiece")
    for kind, pattern in SPLITS.items():
        write_byte_level(folder / kind, pattern, normalizers.NFC() if kind == "qwen2" else None)
    write_byte_fallback(folder / "byte_fallback")
    return folder


@pytest.fixture(scope="session")
def all_tokenizers(tokenizer_folder: Path) -> dict[str, Tokenizer]:
    loaded: dict[str, Tokenizer] = {"sentencepiece": SentencePieceTokenizer.load(tokenizer_folder / "sentencepiece")}
    return loaded | {kind: HFTokenizer.load(tokenizer_folder / kind) for kind in KINDS[1:]}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, all_tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return all_tokenizers[request.param]
