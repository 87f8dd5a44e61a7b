"""Writes a small tokenizer of every supported kind, trained on standard-library code."""

import json
from pathlib import Path

import tokenizers
from samples import modules
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

SPLITS = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
NATURAL = ("llama3", "qwen2")
"""Kinds for which line-by-line encoding is the encoding of the whole text."""
KINDS = ("sentencepiece", *SPLITS, "byte_fallback")
CONTROL = ["<|begin|>", "<|end|>", "<act>", "<think>", "</think>"]
NAMES = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}, "pad_token": None}


def write_byte_level(folder: Path, pattern: str, normalizer: normalizers.Normalizer | None = None) -> Path:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1800, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(modules(), trainer)
    return write_files(folder, tokenizer.to_str())


def write_byte_fallback(folder: Path) -> Path:
    """As Llama-2 and Gemma have it: spaces as U+2581, a space put before the text, bytes for unknown characters."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"▁*[^▁\n]+|▁+|\n+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", *CONTROL]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=special + byte_pieces, show_progress=False)
    tokenizer.train_from_iterator(modules(), trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in special]
    for token in spec["added_tokens"]:
        token["special"] = token["content"] not in ("<think>", "</think>")  # as Qwen3 has them
    return write_files(folder, json.dumps(spec))


def write_files(folder: Path, spec: str, names: dict[str, object] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(spec, "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMES if names is None else names))
    return folder
