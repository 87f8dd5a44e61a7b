"""Tokenizers: exact round trips, right bytes for every id, no markup from text, files that come back, clear errors."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from samples import AWKWARD, functions, modules
from trained import CONTROL, NAMES, SPLITS, write_files
from transformers import PreTrainedTokenizerFast

from ra3_megatron.config.data import TokenizerConfig
from ra3_megatron.config.errors import UserError
from ra3_megatron.text.tokenizer import (
    HFTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)

SCALARS = st.characters(exclude_categories=["Cs"])
PIECES = [
    "x",
    " ",
    "   ",
    "\t",
    "\n",
    "\r",
    "\x0c",
    "\0",
    "▁",
    "▁▁",
    "é",
    "e\u0301",
    "😀",
    "#",
    "# ",
    "return",
    "12345",
]
PIECES += [*CONTROL, "<|bos|>", "<|eos|>", "<unk>", "<0x41>", "<think", "\u2028", "\ufeff", "ﬁ"]
TEXTS = st.text(SCALARS) | st.lists(st.sampled_from(PIECES), max_size=20).map("".join)


@given(data=st.data())
def test_every_text_comes_back_and_holds_no_control_token(
    data: st.DataObject, all_tokenizers: dict[str, Tokenizer]
) -> None:
    text = data.draw(TEXTS)
    for tokenizer in all_tokenizers.values():
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.decode(ids) == text
        control = {tokenizer.bos, tokenizer.eos, tokenizer.pad, *tokenizer.special.values()}
        assert control.isdisjoint(ids)


def test_code_comes_back(tokenizer: Tokenizer) -> None:
    for text in (*modules(), *AWKWARD):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) < 0.6 * len(text.encode()) or len(text) < 100, "code is merged, not spelled in bytes"


def test_table_covers_all_ids_and_all_bytes(tokenizer: Tokenizer) -> None:
    table = tokenizer.token_bytes
    assert len(table) == tokenizer.vocab_size
    assert {token[0] for token in table if len(token) == 1} == set(range(256))
    assert sorted(tokenizer.special) == ["</think>", "<act>", "<think>"]
    assert all(table[index] == b"" for index in (tokenizer.bos, tokenizer.eos, *tokenizer.special.values()))
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode("x"), tokenizer.eos]) == "x"


def test_invalid_bytes_decode_to_the_replacement_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é")
    lone = [index for index, token in enumerate(tokenizer.token_bytes) if token == b"\xc3"][:1]
    assert tokenizer.decode([*lone, *ids]) == "\ufffdé"


@pytest.mark.parametrize("kind", SPLITS)
def test_byte_level_ids_are_those_of_the_library(kind: str, tokenizer_folder: Path) -> None:
    theirs = tokenizers.Tokenizer.from_file(str(tokenizer_folder / kind / "tokenizer.json"))
    ours = HFTokenizer.load(tokenizer_folder / kind)
    for text in modules():
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    theirs.encode_special_tokens = True
    text = "if x: return <|end|>, </think>"
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, "markup reads as ordinary text"


@pytest.mark.parametrize("kind", ["sentencepiece", "llama3", "byte_fallback"])
def test_saved_tokenizer_is_the_same(kind: str, all_tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = all_tokenizers[kind]
    tokenizer.save(tmp_path)
    config = TokenizerConfig(kind="sentencepiece" if kind == "sentencepiece" else "hf", path="/does/not/matter")
    again = load_tokenizer(config, tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.token_bytes == tokenizer.token_bytes
    assert (again.bos, again.eos, again.pad) == (tokenizer.bos, tokenizer.eos, tokenizer.pad)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")], "no temporary file stays"


def test_fingerprints_differ(all_tokenizers: dict[str, Tokenizer]) -> None:
    fingerprints = {tokenizer.fingerprint for tokenizer in all_tokenizers.values()}
    assert len(fingerprints) == len(all_tokenizers)


# --- SentencePiece -------------------------------------------------------------------------------------------------


def test_training_is_deterministic(tmp_path: Path) -> None:
    first = train_sentencepiece(functions(), 900, tmp_path / "a")
    second = train_sentencepiece(iter(functions()), 900, tmp_path / "b")
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 900
    assert (tmp_path / "a" / "tokenizer.model").read_bytes() == (tmp_path / "b" / "tokenizer.model").read_bytes()


def test_indentation_never_merges_with_what_follows(all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers["sentencepiece"]
    for text in modules():
        ids = tokenizer.encode(text)
        at_line_start = True
        for index in ids:
            token = tokenizer.token_bytes[index]
            if at_line_start and token.strip(b" \t\f"):
                assert token[:1] not in (b" ", b"\t", b"\f")
            at_line_start = token == b"\n" or (at_line_start and not token.strip(b" \t\f"))
    assert all(token == b"\n" or b"\n" not in token for token in tokenizer.token_bytes)


def test_transformers_gives_the_same_ids(all_tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = all_tokenizers["sentencepiece"]
    tokenizer.write_hf(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tokenizer.bos,
        tokenizer.eos,
        tokenizer.pad,
    )
    texts = [*modules(), *functions(), *(text for text in AWKWARD if "▁" not in text)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs.encode(text) == [tokenizer.bos, *ids]
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == text
    assert theirs.convert_tokens_to_ids(["<act>", "<think>", "</think>"]) == [
        tokenizer.special[name] for name in ("<act>", "<think>", "</think>")
    ]


def test_superwords_cross_spaces_and_words_are_one_piece(tmp_path: Path) -> None:
    texts = [f"for v in x:\n    y.append(v)\n    a{n % 8}b{n % 5}\n" for n in range(200)]
    tokenizer = train_sentencepiece(texts, 320, tmp_path / "super", superwords=True, words=("a1", "b2", '"5++"'))
    assert pieces(tokenizer, "for v in x:\n") == ["for v in x:", "\n"]
    plain = train_sentencepiece(texts, 300, tmp_path / "plain")
    assert "for v in x:" not in pieces(plain, "for v in x:\n")
    text = 'a1b2a2b1 "5++" a1\n'
    assert pieces(tokenizer, text) == ["a1", "b2", "a", "2", "b", "1", " ", '"5++"', " ", "a1", "\n"]
    tokenizer.write_hf(tmp_path / "hf")
    fast = PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
    for line in (text, *texts[:20]):
        assert fast.encode(line, add_special_tokens=False, split_special_tokens=True) == tokenizer.encode(line)


def pieces(tokenizer: SentencePieceTokenizer, text: str) -> list[str]:
    return [tokenizer.token_bytes[index].decode() for index in tokenizer.encode(text)]


@given(data=st.data())
def test_transformers_gives_the_same_ids_on_made_texts(
    data: st.DataObject, exported: PreTrainedTokenizerFast, all_tokenizers: dict[str, Tokenizer]
) -> None:
    parts = st.sampled_from(
        [
            " ",
            "  ",
            "\t",
            "\n",
            "=",
            "==",
            "=-",
            "---",
            "aaa",
            "_",
            "__init__",
            "self.",
            "((",
            "))",
            "#",
            "é😀",
            "\x0c",
            "\r",
        ]
    )
    text = "".join(data.draw(st.lists(parts, max_size=30)))
    assert exported.encode(text, add_special_tokens=False) == all_tokenizers["sentencepiece"].encode(text)


@pytest.fixture(scope="session")
def exported(all_tokenizers: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("hf")
    all_tokenizers["sentencepiece"].write_hf(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_export_reads_as_a_tokenizer_of_ours(all_tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = all_tokenizers["sentencepiece"]
    tokenizer.write_hf(tmp_path)
    again = HFTokenizer.load(tmp_path)
    assert again.token_bytes == tokenizer.token_bytes
    assert again.special == tokenizer.special
    text = AWKWARD[2] + "a ▁ b"
    assert again.decode(again.encode(text)) == text


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [(50_000, r"vocab_size=50000 is more than .* at most \d+"), (300, r"vocab_size=300 is too small .* at least \d+")],
)
def test_wrong_size_is_a_user_error(vocab_size: int, message: str, tmp_path: Path) -> None:
    letters = "".join(chr(code) for code in range(0x4E00, 0x4E80))
    with pytest.raises(UserError, match=message):
        train_sentencepiece([letters, *functions()[:20]], vocab_size, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_size_that_the_error_names_works(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train_sentencepiece(functions()[:5], 50_000, tmp_path)
    limit = int(str(caught.value).split("at most ")[1].split(",")[0])
    assert train_sentencepiece(functions()[:5], limit, tmp_path).vocab_size == limit


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "unigram"}, "its model_type is not bpe"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalises the text"),
        ({"add_dummy_prefix": True}, "it puts a space before the text"),
        ({"remove_extra_whitespaces": True}, "it drops spaces of the text"),
        ({"treat_whitespace_as_suffix": True}, "it has spaces at the ends of words"),
        ({}, None),
    ],
)
def test_a_sentencepiece_model_that_changes_the_text_is_refused(
    settings: dict[str, Any], reason: str | None, tmp_path: Path
) -> None:
    same = {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(functions()),
        model_writer=model,
        vocab_size=600,
        byte_fallback=True,
        pad_id=3,
        minloglevel=2,
        **(same | settings),
    )
    file = tmp_path / "some.model"
    file.write_bytes(model.getvalue())
    if reason is None:
        assert len(SentencePieceTokenizer.load(file).encode("    return value\n")) < 12
        return
    with pytest.raises(UserError, match=reason):
        SentencePieceTokenizer.load(file)


# --- Reading from disk ---------------------------------------------------------------------------------------------


def test_nothing_to_read_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.model: train the tokenizer first, or set tokenizer\.path"):
        load_tokenizer(TokenizerConfig(), tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.path=.*nowhere: no SentencePiece model"):
        load_tokenizer(TokenizerConfig(path=str(tmp_path / "nowhere")), tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.path=.*nowhere: no tokenizer\.json"):
        load_tokenizer(TokenizerConfig(kind="hf", path=str(tmp_path / "nowhere")), tmp_path)
    (tmp_path / "bad.model").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"bad\.model is not a SentencePiece model"):
        SentencePieceTokenizer.load(tmp_path / "bad.model")


def test_path_may_be_a_file_or_a_folder(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = tokenizer_folder / "llama3"
    by_folder = load_tokenizer(TokenizerConfig(kind="hf", path=str(folder)), tmp_path)
    by_file = load_tokenizer(TokenizerConfig(kind="hf", path=str(folder / "tokenizer.json")), tmp_path)
    assert by_folder.fingerprint == by_file.fingerprint


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({}, "names eos_token"),
        ({"eos_token": "<nope>"}, "eos_token='<nope>' is not in tokenizer.json"),
        ({"eos_token": "<|end|>", "bos_token": "<nope>"}, "bos_token='<nope>' is not in tokenizer.json"),
        ({"eos_token": ["<|end|>"]}, r'eos_token=\["<\|end\|>"\] must be the name of a token'),
        (["<|end|>"], r"tokenizer_config\.json: must hold an object"),
    ],
)
def test_missing_control_token_is_named(names: Any, message: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    write_files(tmp_path, (tokenizer_folder / "llama3" / "tokenizer.json").read_text("utf-8"), names)
    with pytest.raises(UserError, match=message):
        HFTokenizer.load(tmp_path)


def test_no_bos_and_no_pad_are_eos(tokenizer_folder: Path, tmp_path: Path) -> None:
    spec = (tokenizer_folder / "qwen2" / "tokenizer.json").read_text("utf-8")
    write_files(tmp_path, spec, {"bos_token": None, "eos_token": "<|end|>"})
    tokenizer = HFTokenizer.load(tmp_path)
    assert tokenizer.bos == tokenizer.pad == tokenizer.eos == CONTROL.index("<|end|>")


def test_names_may_stand_in_the_special_tokens_map(tokenizer_folder: Path, tmp_path: Path) -> None:
    write_files(tmp_path, (tokenizer_folder / "llama3" / "tokenizer.json").read_text("utf-8"), {})
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(NAMES))
    assert HFTokenizer.load(tmp_path).eos == CONTROL.index("<|end|>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase changes the text"),
        ({"pre_tokenizer": {"type": "Whitespace"}, "decoder": None}, "neither byte-level nor has it byte fallback"),
        ({"model": {"type": "Unheard"}}, "cannot be read by the tokenizers library"),
    ],
)
def test_unfit_tokenizer_is_refused(
    change: dict[str, object], message: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    spec = json.loads((tokenizer_folder / "llama3" / "tokenizer.json").read_text("utf-8"))
    write_files(tmp_path, json.dumps(spec | change))
    with pytest.raises(UserError, match=message):
        HFTokenizer.load(tmp_path)


def test_dropout_of_merges_is_off(tokenizer_folder: Path, tmp_path: Path) -> None:
    spec = json.loads((tokenizer_folder / "llama3" / "tokenizer.json").read_text("utf-8"))
    spec["model"]["dropout"] = 0.5
    tokenizer = HFTokenizer.load(write_files(tmp_path, json.dumps(spec)))
    text = functions()[0]
    assert tokenizer.encode(text) == HFTokenizer.load(tokenizer_folder / "llama3").encode(text)


def test_a_token_outside_the_byte_level_alphabet_is_its_own_text(tokenizer_folder: Path, tmp_path: Path) -> None:
    spec = json.loads((tokenizer_folder / "llama3" / "tokenizer.json").read_text("utf-8"))
    index = spec["model"]["vocab"]["日本"] = len(spec["model"]["vocab"])
    tokenizer = HFTokenizer.load(write_files(tmp_path, json.dumps(spec)))
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.decode([index]) == library.decode([index]) == "日本"
    ids = tokenizer.encode("日本 x")
    assert index not in ids and tokenizer.decode(ids) == "日本 x"


def test_broken_json_is_a_user_error(tmp_path: Path) -> None:
    write_files(tmp_path, "{")
    with pytest.raises(UserError, match=r"tokenizer\.json is not valid JSON"):
        HFTokenizer.load(tmp_path)


def test_ids_are_plain_integers(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("def f(x):\n    return x\n")
    assert np.array(ids).dtype.kind == "i"
    assert all(type(index) is int for index in ids)
