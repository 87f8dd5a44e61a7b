"""Latent formats: token sets, what they write around a line, what counts as a thought, and what they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
from samples import functions
from trained import write_files

from ra3_megatron.config.data import TextConfig
from ra3_megatron.config.errors import UserError
from ra3_megatron.text.latents import CommentFormat, LatentFormat, TokensFormat, build_format, encode_document
from ra3_megatron.text.tokenizer import HFTokenizer, Tokenizer
from ra3_megatron.text.transcript import Role

COMMENT = TextConfig(latent_format="comment", max_latent_tokens=5)
TOKENS = TextConfig(latent_format="tokens", max_latent_tokens=5)


@pytest.fixture
def comment(tokenizer: Tokenizer) -> LatentFormat:
    return build_format(COMMENT, tokenizer)


@pytest.fixture
def tokens(tokenizer: Tokenizer) -> LatentFormat:
    return build_format(TOKENS, tokenizer)


def members(format: LatentFormat, row: int) -> set[int]:
    return set(np.flatnonzero(format.sets[row]).tolist())


def named(tokenizer: Tokenizer, *names: str) -> set[int]:
    return {tokenizer.special[name] for name in names}


def test_comment_sets_are_what_they_say(comment: LatentFormat, tokenizer: Tokenizer) -> None:
    table = tokenizer.token_bytes
    assert isinstance(comment, CommentFormat)
    assert comment.sets.shape[1] == tokenizer.vocab_size
    assert comment.sets[comment.ALL].all()
    assert comment.universe == comment.ALL
    rows = set(comment.think_set_of_token.tolist()) - {0}
    assert rows, "some token can follow a thought"
    for row in rows:
        starts = {table[index].partition(b"#")[0] for index in members(comment, row)}
        assert len(starts) == 1, "one set, one leading whitespace"
        prefix = starts.pop()
        assert not prefix.strip()
        expected = {
            index
            for index, token in enumerate(table)
            if token.startswith(prefix + b"#") and not set(b"\n\r\0") & set(token[:-1]) and not token.endswith(b"\r")
        }
        assert members(comment, row) == expected - {i for i in expected if table[i].endswith(b"\0")}
        assert (comment.sets[comment.act_set(row)] == ~comment.sets[row]).all()
        for index in np.flatnonzero(comment.think_set_of_token == row):
            text = table[index].lstrip(b" \t\n\r\x0b\x0c")
            assert text
            assert table[index] == prefix + text
    assert comment.act_set(0) == comment.ALL


def test_comment_thoughts_end_with_the_first_line_break(comment: LatentFormat, tokenizer: Tokenizer) -> None:
    table = tokenizer.token_bytes
    inside = members(comment, comment.thought_set)
    for index, token in enumerate(table):
        breaks = token.count(b"\n") + token.count(b"\r")
        one_at_the_end = breaks == 1 and token.endswith(b"\n")
        assert (index in inside) == (token != b"" and b"\0" not in token and (breaks == 0 or one_at_the_end))
        assert comment.ends_thought(index) == (index in inside and token.endswith(b"\n"))
    assert tokenizer.decode(list(comment.forced_end)) == "\n"
    assert comment.ends_thought(comment.forced_end[-1])


def test_tokens_sets_are_what_they_say(tokens: LatentFormat, tokenizer: Tokenizer) -> None:
    assert isinstance(tokens, TokensFormat)
    line = encode_document("    x = 1\n", "d", tokenizer, tokens, TOKENS).lines[0]
    assert line.may_think
    assert members(tokens, line.think_set) == named(tokenizer, "<think>")
    assert members(tokens, tokens.act_set(line.think_set)) == named(tokenizer, "<act>")
    assert members(tokens, tokens.universe) == named(tokenizer, "<think>", "<act>")
    assert tokens.act_set(0) == tokens.ALL
    visible = {index for index, token in enumerate(tokenizer.token_bytes) if token}
    assert members(tokens, tokens.thought_set) == visible | named(tokenizer, "</think>")
    assert set(np.flatnonzero(tokens.ends)) == named(tokenizer, "</think>") == set(tokens.forced_end)


def test_comment_writes_the_indentation_before_the_decision_and_again_after_a_thought(
    comment: LatentFormat, tokenizer: Tokenizer
) -> None:
    line = encode_document("def f():\n        pass\n\n", "d", tokenizer, comment, COMMENT).lines[1]
    assert line.indent
    assert comment.implicit_decision
    assert comment.first_role == Role.THOUGHT
    assert comment.before_decision(line) == (line.indent, (Role.LAYOUT,) * len(line.indent))
    assert comment.act(line) == ((), ())
    assert comment.after_thought(line) == (line.indent, (Role.FORCED,) * len(line.indent))
    ids, roles = comment.action(line)
    assert ids == line.body + line.tail
    assert roles == (Role.EXPERT,) * len(line.body) + (Role.LAYOUT,) * len(line.tail)


def test_tokens_writes_the_indentation_with_the_action(tokens: LatentFormat, tokenizer: Tokenizer) -> None:
    line = encode_document("def f():\n        pass\n\n", "d", tokenizer, tokens, TOKENS).lines[1]
    assert not tokens.implicit_decision
    assert tokens.first_role == Role.DECISION
    assert tokens.before_decision(line) == tokens.after_thought(line) == ((), ())
    assert tokens.act(line) == ((tokenizer.special["<act>"],), (Role.DECISION,))
    ids, roles = tokens.action(line)
    assert ids == line.ids
    assert [role == Role.EXPERT for role in roles] == [index in line.body for index in ids]


def test_a_human_comment_line_offers_no_thought_in_comments(comment: LatentFormat, tokenizer: Tokenizer) -> None:
    document = encode_document("if x:\n    # why\n    y\n#\n\n\nz", "d", tokenizer, comment, COMMENT, "keep")
    assert [line.may_think for line in document.lines] == [True, False, True, False, True]
    assert [line.think_set > 0 for line in document.lines] == [True, False, True, False, True]


def test_expert_code_is_never_in_the_think_set(comment: LatentFormat, tokenizer: Tokenizer) -> None:
    offered = 0
    for code in functions():
        for line in encode_document(code, "d", tokenizer, comment, COMMENT).lines:
            offered += line.may_think
            if line.may_think:
                assert not comment.sets[line.think_set, line.body[0]]
                assert comment.sets[comment.act_set(line.think_set), line.body[0]]
    assert offered > 1000


def test_what_could_not_have_been_sampled_is_refused(comment: LatentFormat, tokenizer: Tokenizer) -> None:
    line, remark = encode_document("x = 1\n# y\n", "d", tokenizer, comment, COMMENT, "keep").lines
    thought = comment.thought("a", line, "", tokenizer)
    comment.check_thought(thought, line)
    with pytest.raises(ValueError, match="may not think"):
        comment.check_thought(thought, remark)
    with pytest.raises(ValueError, match="has 0 sampled tokens, not 1 to 5"):
        comment.check_thought((), line)
    with pytest.raises(ValueError, match="has 6 sampled tokens"):
        comment.check_thought((thought[0],) * 6, line)
    with pytest.raises(ValueError, match="does not start a thought"):
        comment.check_thought(line.body[:1], line)
    with pytest.raises(ValueError, match="may not be sampled"):
        comment.check_thought((thought[0], tokenizer.eos), line)
    with pytest.raises(ValueError, match="after its end"):
        comment.check_thought((thought[0], comment.forced_end[0], thought[0]), line)


def test_greatest_length_counts_thought_tokens(
    comment: LatentFormat, tokens: LatentFormat, tokenizer: Tokenizer
) -> None:
    text = "one two three four five six seven"
    for format, config, extra in ((comment, COMMENT, 0), (tokens, TOKENS, 1)):
        line = encode_document("x = 1\n", "d", tokenizer, format, config).lines[0]
        assert format.max_thought_ids == config.max_latent_tokens + extra
        thought = format.thought(text, line, "", tokenizer)
        assert len(thought) == format.max_thought_ids
        assert not format.ends_thought(thought[-1])
        format.check_thought(thought, line)


def test_missing_markers_are_named(tokenizer_folder: Path, tmp_path: Path) -> None:
    spec = json.loads((tokenizer_folder / "llama3" / "tokenizer.json").read_text("utf-8"))
    for name in ("<act>", "</think>"):
        index = spec["model"]["vocab"].pop(name)
        spec["model"]["vocab"][f"<|reserved_{index}|>"] = index
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in ("<act>", "</think>")]
    for index in (2, 4):
        reserved = {"id": index, "content": f"<|reserved_{index}|>", "special": True, "normalized": False}
        spec["added_tokens"].append(reserved | {"single_word": False, "lstrip": False, "rstrip": False})
    write_files(tmp_path, json.dumps(spec))
    tokenizer = HFTokenizer.load(tmp_path)
    assert list(tokenizer.special) == ["<think>"]
    with pytest.raises(UserError, match=r"text\.latent_format=tokens: the tokenizer has no <act>, </think>"):
        build_format(TOKENS, tokenizer)
    build_format(COMMENT, tokenizer)


def test_a_vocabulary_without_hash_is_refused_for_comments(tokenizer: Tokenizer) -> None:
    class NoHash:
        token_bytes = [token.replace(b"#", b"") for token in tokenizer.token_bytes]
        encode = tokenizer.encode

    with pytest.raises(
        UserError, match=r"text\.latent_format=comment: the tokenizer has no token that starts with '#'"
    ):
        CommentFormat(NoHash(), 5)  # type: ignore[arg-type]
