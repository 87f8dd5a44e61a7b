"""A `tokenizer.json` of Hugging Face as a `Tokenizer`: byte-level BPE (Llama-3, Qwen) or byte fallback (Llama-2).

What would keep a text from coming back exactly is taken out when the file is read: Unicode normalisation, and the
space that some tokenizers put before a text. So is dropout of merges, with which a text is encoded differently each
time. Texts that need none of them are encoded as transformers would.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import tokenizers

from ra3_megatron.config.errors import UserError
from ra3_megatron.text.files import write_atomic
from ra3_megatron.text.vocabulary import MARKERS, SPACE_SYMBOL, Vocabulary, byte_level_alphabet, byte_piece

CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_DROPPED_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Prepend")


class HFTokenizer:
    """A `Tokenizer` made of `tokenizer.json` and the files beside it.

    `eos` has to be named in `tokenizer_config.json` or `special_tokens_map.json`. A tokenizer without a `bos` (Qwen)
    starts documents with `eos`, one without a `pad` (Llama-3) pads with `eos`, as is the practice for these families.
    """

    FILE: ClassVar[str] = "tokenizer.json"

    def __init__(self, files: dict[str, bytes], source: str, vocab_size: int | None = None) -> None:
        """`files`: contents of `tokenizer.json` and those of `CONFIG_FILES` that are there; `source`: for errors.

        `vocab_size`: tokens of the model that it goes with, when these are more; those behind have no text.
        """
        self._files = files
        spec = _read_json(files[self.FILE], f"{source}/{self.FILE}")
        if not isinstance(spec, dict) or "model" not in spec:
            raise UserError(f"{source}/{self.FILE} is not a tokenizer.json: it has no model")
        added = {token["content"]: token for token in spec.get("added_tokens") or []}
        for name in MARKERS:
            if name in added:
                added[name]["special"] = True
        _keep_text_exact(spec, source)
        if spec["model"].get("dropout"):
            spec["model"]["dropout"] = None
        self._tokenizer = _build(spec, source)
        vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        if vocab_size is not None:
            if vocab_size < self.vocab_size:
                raise UserError(
                    f"{source}/tokenizer.json: has {self.vocab_size} tokens, but model.vocab_size={vocab_size}: use "
                    "the tokenizer that belongs to the model"
                )
            self.vocab_size = vocab_size
        self.special = {name: vocab[name] for name in MARKERS if name in added}
        self._vocabulary = _vocabulary(spec, vocab, added, self.vocab_size, source)
        self.token_bytes = self._vocabulary.token_bytes
        names = _token_names(files, source)
        self.eos = _token_id("eos_token", names, vocab, source)
        self.bos = _token_id("bos_token", names, vocab, source) if names.get("bos_token") else self.eos
        self.pad = _token_id("pad_token", names, vocab, source) if names.get("pad_token") else self.eos
        for index in (self.bos, self.eos, self.pad):
            self.token_bytes[index] = b""
        digest = hashlib.sha256(files[self.FILE])
        digest.update(f"{self.bos} {self.eos} {self.pad}".encode())
        self.fingerprint = digest.hexdigest()

    @classmethod
    def saved_in(cls, folder: str | Path) -> bool:
        """Whether `folder` holds a saved tokenizer of this kind."""
        return (Path(folder) / cls.FILE).is_file()

    @classmethod
    def load(cls, path: str | Path, vocab_size: int | None = None) -> "HFTokenizer":
        """Read a `tokenizer.json` and the files beside it, or a folder with them."""
        path = Path(path)
        file = path / cls.FILE if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"tokenizer.path={path}: no tokenizer.json there")
        beside = {name: file.parent / name for name in CONFIG_FILES}
        files = {cls.FILE: file.read_bytes()} | {n: p.read_bytes() for n, p in beside.items() if p.is_file()}
        return cls(files, str(file.parent), vocab_size)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos and eos."""
        return self._vocabulary.exact(text, self._encode) if text else []

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of `ids`."""
        return self._vocabulary.decode_bytes(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self._vocabulary.decode(ids)

    def save(self, folder: str | Path) -> None:
        """Write the files it was made of, unchanged."""
        for name, content in self._files.items():
            write_atomic(Path(folder) / name, content)

    def write_hf(self, folder: str | Path) -> None:
        """The same as `save`: the files are Hugging Face's own."""
        self.save(folder)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _build(spec: dict[str, Any], source: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{source}/tokenizer.json cannot be read by the tokenizers library: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # their names in a text are text
    return tokenizer


def _parts(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or decoder, a Sequence taken apart."""
    if component is None:
        return []
    if component["type"] == "Sequence":
        return [part for inner in component[key] for part in _parts(inner, key)]
    return [component]


def _keep_text_exact(spec: dict[str, Any], source: str) -> None:
    kept = [p for p in _parts(spec.get("normalizer"), "normalizers") if p["type"] not in _DROPPED_NORMALIZERS]
    for part in kept:
        if part["type"] != "Replace" or part["pattern"] != {"String": " "} or part["content"] != SPACE_SYMBOL:
            raise UserError(
                f"{source}/tokenizer.json: its normalizer {part['type']} changes the text, so code would not come back "
                "exactly; use a byte-level or byte-fallback tokenizer"
            )
    spec["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    for part in _parts(spec.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"


def _vocabulary(
    spec: dict[str, Any], vocab: dict[str, int], added: dict[str, Any], size: int, source: str
) -> Vocabulary:
    """Bytes of each id; holes in the numbering hold nothing."""
    components = _parts(spec.get("pre_tokenizer"), "pretokenizers") + _parts(spec.get("decoder"), "decoders")
    byte_level = any(part["type"] == "ByteLevel" for part in components)
    if not byte_level and not spec["model"].get("byte_fallback"):
        raise UserError(
            f"{source}/tokenizer.json is neither byte-level nor has it byte fallback: it cannot encode every text"
        )
    alphabet = byte_level_alphabet()
    pieces = {byte_piece(byte): byte for byte in range(256)}
    token_bytes = [b""] * size
    byte_ids: dict[int, int] = {}
    for token, index in vocab.items():
        if token in added:
            token_bytes[index] = b"" if added[token].get("special") else token.encode()
        elif byte_level:
            spelled = alphabet.keys() >= set(token)  # else it stands for itself, and no text is encoded to it
            token_bytes[index] = bytes(alphabet[char] for char in token) if spelled else token.encode()
        elif token in pieces:
            token_bytes[index] = bytes([pieces[token]])
        else:
            token_bytes[index] = token.replace(SPACE_SYMBOL, " ").encode()
        if token not in added and len(token_bytes[index]) == 1 and (byte_level or token in pieces):
            byte_ids[token_bytes[index][0]] = index
    return Vocabulary(token_bytes, byte_ids)


def _read_json(content: bytes, name: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(f"{name} is not valid JSON: {error}") from error


def _token_names(files: dict[str, bytes], source: str) -> dict[str, str]:
    """`eos_token` and its like from the files beside tokenizer.json; the first file that names one counts."""
    names: dict[str, str] = {}
    for file in CONFIG_FILES:
        entries = _read_json(files[file], f"{source}/{file}") if file in files else {}
        if not isinstance(entries, dict):
            raise UserError(f"{source}/{file}: must hold an object")
        for key in ("bos_token", "eos_token", "pad_token"):
            value = entries.get(key)
            text = value.get("content") if isinstance(value, dict) else value
            if text and not isinstance(text, str):
                raise UserError(f"{source}/{file}: {key}={json.dumps(value)} must be the name of a token")
            if text:
                names.setdefault(key, text)
    return names


def _token_id(key: str, names: dict[str, str], vocab: dict[str, int], source: str) -> int:
    if key not in names:
        raise UserError(f"{source}: neither {' nor '.join(CONFIG_FILES)} names {key}; add it")
    if names[key] not in vocab:
        raise UserError(f"{source}: {key}={names[key]!r} is not in tokenizer.json")
    return vocab[names[key]]
