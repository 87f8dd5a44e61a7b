"""SentencePiece BPE tokenizer: training, exact encoding, and export to Hugging Face.

Indentation is encoded apart from what follows it, in training and in use, so that no piece spans the two; "\\n" is a
piece of its own. The latent markers are control pieces: text never encodes to them.
"""

import hashlib
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from ra3_megatron.config.errors import UserError
from ra3_megatron.text.files import write_atomic
from ra3_megatron.text.segment import split_rows
from ra3_megatron.text.vocabulary import MARKERS, SPACE_SYMBOL, Vocabulary, byte_piece

UNK, BOS, EOS, PAD = "<|unk|>", "<|bos|>", "<|eos|>", "<|pad|>"
INDENTATION = " \t\f"
_TRAINING_CHUNK = 4096  # characters; longer lines are cut

logger = logging.getLogger(__name__)

WORD_LENGTH, SUPERWORD_LENGTH = 16, 64
"""Characters of a piece at most."""


class SentencePieceTokenizer:
    """A `Tokenizer` made of a SentencePiece model that `train_sentencepiece` wrote (or one with the same settings).

    Raises UserError for other settings: a model that changes the text would have it spelled byte by byte, and the
    merges of `write_hf` are those of BPE.
    """

    FILE: ClassVar[str] = "tokenizer.model"

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        _check_settings(model)
        sp = self._processor
        self.vocab_size: int = sp.get_piece_size()
        self.bos, self.eos, self.pad = sp.bos_id(), sp.eos_id(), sp.pad_id()
        for name, index in (("bos", self.bos), ("eos", self.eos), ("pad", self.pad)):
            if index < 0:
                raise UserError(f"the SentencePiece model has no {name} piece: train it with one")
        byte_ids = {byte: sp.piece_to_id(byte_piece(byte)) for byte in range(256)}
        if any(not sp.is_byte(index) for index in byte_ids.values()):
            raise UserError("the SentencePiece model has no byte pieces: train it with byte_fallback=True")
        self.special: dict[str, int] = {
            name: sp.piece_to_id(name) for name in MARKERS if sp.is_control(sp.piece_to_id(name))
        }
        self._vocabulary = Vocabulary([_piece_bytes(sp, index) for index in range(self.vocab_size)], byte_ids)
        self.token_bytes = self._vocabulary.token_bytes
        self.fingerprint = hashlib.sha256(model).hexdigest()

    @classmethod
    def saved_in(cls, folder: str | Path) -> bool:
        """Whether `folder` holds a saved tokenizer of this kind."""
        return (Path(folder) / cls.FILE).is_file()

    @classmethod
    def load(cls, path: str | Path) -> "SentencePieceTokenizer":
        """Read a `*.model` file, or `tokenizer.model` in a folder."""
        path = Path(path)
        file = path / cls.FILE if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"tokenizer.path={path}: no SentencePiece model there (a *.model file or its folder)")
        try:
            return cls(file.read_bytes())
        except RuntimeError as error:
            raise UserError(f"{file} is not a SentencePiece model") from error

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos and eos."""
        ids: list[int] = []
        for chunk in _chunks(text):
            ids.extend(self._vocabulary.exact(chunk, self._processor.encode))
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of `ids`."""
        return self._vocabulary.decode_bytes(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self._vocabulary.decode(ids)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.model`."""
        write_atomic(Path(folder) / self.FILE, self._model)

    def write_hf(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`: transformers' PreTrainedTokenizerFast gives the same ids.

        Two differences, both in texts that hold markup: transformers turns the literal name of a special token into
        its id (`split_special_tokens=True` switches that off), and reads U+2581 as a space.
        """
        write_atomic(Path(folder) / "tokenizer.json", json.dumps(self._hf_json(), ensure_ascii=False).encode())
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        roles = {"bos": self.bos, "eos": self.eos, "pad": self.pad, "unk": self._processor.unk_id()}
        settings |= {f"{role}_token": self._processor.id_to_piece(index) for role, index in roles.items()}
        write_atomic(Path(folder) / "tokenizer_config.json", json.dumps(settings, indent=2).encode())

    def _hf_json(self) -> dict[str, object]:
        sp = self._processor
        bos = sp.id_to_piece(self.bos)
        pieces = [sp.id_to_piece(index) for index in range(self.vocab_size)]
        whole = _user_defined(self._model)
        added = [
            {
                "id": index,
                "content": pieces[index],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": index not in whole,
            }
            for index in range(self.vocab_size)
            if sp.is_control(index) or sp.is_unknown(index) or index in whole
        ]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_SYMBOL},
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": rf"\A[{SPACE_SYMBOL}\t\f]+"},
                "behavior": "Isolated",
                "invert": False,
            },
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [
                    {"SpecialToken": {"id": bos, "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"Sequence": {"id": "B", "type_id": 0}},
                ],
                "special_tokens": {bos: {"id": bos, "ids": [self.bos], "tokens": [bos]}},
            },
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": SPACE_SYMBOL}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                ],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": sp.id_to_piece(sp.unk_id()),
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": {piece: index for index, piece in enumerate(pieces)},
                "merges": _merges(sp, whole),
            },
        }


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, folder: str | Path, superwords: bool = False, words: Iterable[str] = ()
) -> SentencePieceTokenizer:
    """Train a BPE model on `texts`, save it in `folder` and return it. The same texts give the same bytes.

    superwords: pieces may hold spaces, letters and punctuation together (up to `SUPERWORD_LENGTH` characters), so that
    a frequent line is one piece; digits stay apart. words: strings that are always one piece.

    Raises UserError when `vocab_size` is more than the texts give rise to, or too small for their characters.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_chunks(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            split_by_whitespace=not superwords,
            split_by_unicode_script=not superwords,
            max_sentencepiece_length=SUPERWORD_LENGTH if superwords else WORD_LENGTH,
            character_coverage=0.9999,
            required_chars="#",
            user_defined_symbols=["\n", *words],
            control_symbols=list(MARKERS),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            pad_piece=PAD,
            max_sentence_length=8 * _TRAINING_CHUNK,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_training_error(str(error), vocab_size)) from error
    tokenizer = SentencePieceTokenizer(model.getvalue())
    tokenizer.save(folder)
    logger.info("trained a SentencePiece model of %d pieces", tokenizer.vocab_size)
    return tokenizer


def _chunks(text: str) -> Iterator[str]:
    """Cut `text` so that indentation stands alone: what is encoded at once holds either it or none of it."""
    for line in split_rows(text):
        visible = len(line) - len(line.lstrip(INDENTATION))
        if visible:
            yield line[:visible]
        if visible < len(line):
            yield line[visible:]


def _training_chunks(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for chunk in _chunks(text):
            clean = chunk.rstrip("\n").replace(SPACE_SYMBOL, "").replace("\0", "")
            for start in range(0, len(clean), _TRAINING_CHUNK):
                yield clean[start : start + _TRAINING_CHUNK]


def _training_error(message: str, vocab_size: int) -> str:
    limit = re.search(r"Please set it to a value <= (\d+)", message)
    if limit:
        return (
            f"tokenizer.vocab_size={vocab_size} is more than the corpus gives rise to: "
            f"set it to at most {limit.group(1)}, or add text"
        )
    small = re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message)
    if small:
        return f"tokenizer.vocab_size={vocab_size} is too small for this corpus: set it to at least {small.group(2)}"
    return f"tokenizer.vocab_size={vocab_size}: SentencePiece could not be trained on this corpus ({message})"


def _piece_bytes(sp: sentencepiece.SentencePieceProcessor, index: int) -> bytes:
    if sp.is_control(index) or sp.is_unknown(index):
        return b""
    piece: str = sp.id_to_piece(index)
    return bytes([int(piece[3:5], 16)]) if sp.is_byte(index) else piece.replace(SPACE_SYMBOL, " ").encode()


def _check_settings(model: bytes) -> None:
    """UserError unless the model is BPE and takes a text as it is."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    wrong = {
        "its model_type is not bpe": trainer.model_type != sentencepiece_model_pb2.TrainerSpec.BPE,
        "it normalises the text (train it with normalization_rule_name=identity)": normalizer.precompiled_charsmap,
        "it puts a space before the text (add_dummy_prefix)": normalizer.add_dummy_prefix,
        "it drops spaces of the text (remove_extra_whitespaces)": normalizer.remove_extra_whitespaces,
        "it does not write spaces as U+2581 (escape_whitespaces)": not normalizer.escape_whitespaces,
        "it has spaces at the ends of words (treat_whitespace_as_suffix)": trainer.treat_whitespace_as_suffix,
    }
    for reason, holds in wrong.items():
        if holds:
            raise UserError(
                f"the SentencePiece model cannot be used: {reason}; use the tokenizer.json that transformers makes of "
                "it, with tokenizer.kind=hf"
            )


def _user_defined(model: bytes) -> frozenset[int]:
    """Pieces that are never made by merging nor part of another: the line break, and words."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
    return frozenset(index for index, piece in enumerate(proto.pieces) if piece.type == kind)


def _merges(sp: sentencepiece.SentencePieceProcessor, whole: frozenset[int]) -> list[Sequence[str]]:
    """Every pair of pieces that makes a piece, in the order in which SentencePiece would merge them; `whole` ones are
    not made."""
    normal = {
        sp.id_to_piece(index): -sp.get_score(index)
        for index in range(sp.get_piece_size())
        if not (sp.is_control(index) or sp.is_unknown(index) or sp.is_byte(index) or index in whole)
    }
    merges = []
    for piece, rank in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                merges.append((rank, -cut, (left, right)))
    return [pair for _, _, pair in sorted(merges)]
