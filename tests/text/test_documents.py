"""Documents and transcripts: exact code back with any thoughts, same program, roles and decisions where they belong."""

import ast
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import AWKWARD, functions, modules, snippets
from trained import KINDS, NATURAL

from ra3_megatron.config.data import TextConfig
from ra3_megatron.text.cutting import Cutter, Thoughts
from ra3_megatron.text.latents import (
    Document,
    LatentFormat,
    build_format,
    code_text,
    compose,
    cut,
    encode_document,
    full_text,
    raw,
)
from ra3_megatron.text.segment import segment, strip_comment_lines
from ra3_megatron.text.tokenizer import Tokenizer
from ra3_megatron.text.transcript import Role, Transcript

CONFIGS = {
    "comment": TextConfig(max_latent_tokens=6),
    "statement": TextConfig(max_latent_tokens=6, granularity="statement"),
    "tokens": TextConfig(max_latent_tokens=6, latent_format="tokens"),
    "span": TextConfig(max_latent_tokens=6, latent_format="tokens", granularity="token", token_span=3),
}
GRANULARITIES: tuple[Literal["line", "statement"], ...] = ("line", "statement")
SPACE = " \t\n\r\x0b\x0c"


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> TextConfig:
    return CONFIGS[request.param]


def sample_thoughts(document: Document, format: LatentFormat, seed: int, rate: float) -> dict[int, list[int]]:
    """Thoughts as an untrained model would sample them: any token of the allowed sets."""
    random = np.random.default_rng(seed)
    thoughts = {}
    for index, line in enumerate(document.lines):
        if line.may_think and random.random() < rate:
            ids = [int(random.choice(np.flatnonzero(format.sets[line.think_set])))]
            while len(ids) < format.max_thought_ids and not format.ends_thought(ids[-1]):
                ends = random.random() < 0.2
                allowed = format.ends if ends else format.sets[format.thought_set]
                ids.append(int(random.choice(np.flatnonzero(allowed))))
            thoughts[index] = ids
    return thoughts


def infused(
    code: str, config: TextConfig, tokenizer: Tokenizer, seed: int = 0, rate: float = 0.7
) -> tuple[LatentFormat, Document, dict[int, list[int]], Transcript]:
    """Format, document, random thoughts and the transcript that holds them."""
    format = build_format(config, tokenizer)
    document = encode_document(code, "d", tokenizer, format, config)
    thoughts = sample_thoughts(document, format, seed, rate)
    return format, document, thoughts, compose(document, thoughts, format, tokenizer)


def test_code_comes_back_with_any_thoughts(config: TextConfig, tokenizer: Tokenizer) -> None:
    for seed, code in enumerate((*functions()[:60], *AWKWARD)):
        format, document, thoughts, transcript = infused(code, config, tokenizer, seed)
        assert code_text(transcript, tokenizer) == strip_comment_lines(code)
        assert code_text(raw(document, format, tokenizer), tokenizer) == strip_comment_lines(code)
        assert np.flatnonzero(transcript.think).tolist() == sorted(thoughts)


@pytest.mark.parametrize("name", ["comment", "statement"])
def test_comment_thoughts_leave_the_program_as_it_is(name: str, tokenizer: Tokenizer) -> None:
    thinking = 0
    for seed, code in enumerate((*functions()[:60], *AWKWARD)):
        _, _, thoughts, transcript = infused(code, CONFIGS[name], tokenizer, seed)
        text = full_text(transcript, tokenizer)
        assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(code))
        assert strip_comment_lines(text).strip(SPACE) == strip_comment_lines(code).strip(SPACE)
        thinking += len(thoughts)
    assert thinking > 200


@given(data=st.data())
def test_any_text_comes_back(data: st.DataObject, all_tokenizers: dict[str, Tokenizer]) -> None:
    pieces = st.sampled_from(
        ["x", " ", "  ", "\n", "\t", "\r", "\x0c", "#", "'", '"""', "(", "é", "▁", "<think>", "\\\n"]
    )
    code = data.draw(st.lists(pieces, max_size=20).map("".join) | st.text(st.characters(exclude_categories=["Cs"])))
    tokenizer = all_tokenizers[data.draw(st.sampled_from(KINDS))]
    config = CONFIGS[data.draw(st.sampled_from(sorted(CONFIGS)))]
    format = build_format(config, tokenizer)
    if not strip_comment_lines(code).strip(SPACE):
        with pytest.raises(ValueError, match="document d: no visible text"):
            encode_document(code, "d", tokenizer, format, config)
        return
    *_, transcript = infused(code, config, tokenizer, data.draw(st.integers(0, 1000)))
    assert code_text(transcript, tokenizer) == strip_comment_lines(code)


def test_layout_of_a_transcript(config: TextConfig, tokenizer: Tokenizer) -> None:
    for seed, code in enumerate((*functions()[:30], *AWKWARD)):
        format, document, thoughts, transcript = infused(code, config, tokenizer, seed)
        roles, lines, ids = transcript.roles, transcript.lines, transcript.ids
        assert (ids[0], roles[0], lines[0]) == (tokenizer.bos, Role.CONTEXT, -1)
        assert (ids[-1], roles[-1], lines[-1]) == (tokenizer.eos, Role.LAYOUT, len(document.lines) - 1)
        assert (roles[1:] != Role.CONTEXT).all()
        assert (np.diff(lines) >= 0).all()
        assert transcript.num_lines == len(document.lines)
        assert transcript.offered.tolist() == [line.may_think for line in document.lines]
        for index, line in enumerate(document.lines):
            here = lines == index
            expert = ids[here & (roles == Role.EXPERT)]
            assert expert.tolist() == list(line.body)
            if config.granularity != "token":
                assert tokenizer.token_bytes[expert[0]].strip(SPACE.encode())
                assert tokenizer.token_bytes[expert[-1]].strip(SPACE.encode())
            sampled = ids[here & np.isin(roles, (Role.THOUGHT, Role.DECISION))].tolist()
            if index in thoughts:
                assert sampled == thoughts[index]
                forced = ids[here & (roles == Role.FORCED)].tolist()
                end = [] if format.ends_thought(sampled[-1]) else list(format.forced_end)
                again = list(line.indent) if format.name == "comment" else []
                assert forced == end + again
            else:
                assert sampled == ([] if format.implicit_decision else [tokenizer.special["<act>"]])
                assert not (here & (roles == Role.FORCED)).any()


def test_decisions_are_read_where_the_line_becomes_visible(tokenizer: Tokenizer) -> None:
    config = CONFIGS["comment"]
    for seed, code in enumerate((*functions()[:30], *AWKWARD)):
        _, document, thoughts, transcript = infused(code, config, tokenizer, seed)
        for index, line in enumerate(document.lines):
            position = transcript.decision_positions[index]
            first = thoughts[index][0] if index in thoughts else line.body[0]
            assert transcript.ids[position] == first
            before = transcript.ids[:position]
            assert before[len(before) - len(line.indent) :].tolist() == list(line.indent)


def test_decisions_of_the_tokens_format_are_its_markers(tokenizer: Tokenizer) -> None:
    for code in functions()[:30]:
        _, _, thoughts, transcript = infused(code, CONFIGS["tokens"], tokenizer)
        markers = transcript.ids[transcript.decision_positions]
        assert [index == tokenizer.special["<think>"] for index in markers] == [
            row in thoughts for row in range(transcript.num_lines)
        ]
        assert (transcript.roles[transcript.decision_positions] == Role.DECISION).all()


def test_a_thought_starts_a_comment_line_at_the_indentation_of_its_line(tokenizer: Tokenizer) -> None:
    """Whatever the tokenizer merges: prefix + any token of the think set reads as indentation + "#…"."""
    config = CONFIGS["comment"]
    format = build_format(config, tokenizer)
    checked = 0
    for code in functions()[:40]:
        document = encode_document(code, "d", tokenizer, format, config)
        transcript = raw(document, format, tokenizer)
        actions = segment(strip_comment_lines(code), "line")
        for index, (line, action) in enumerate(zip(document.lines, actions, strict=True)):
            if not line.may_think:
                continue
            prefix = transcript.ids[: transcript.decision_positions[index]].tolist()
            indentation = action[: len(action) - len(action.lstrip(SPACE))]
            for first in np.flatnonzero(format.sets[line.think_set])[:5]:
                opened = tokenizer.decode([*prefix, int(first)]).removesuffix("\n").rpartition("\n")[2]
                assert opened.startswith(indentation + "#")
                checked += 1
            assert tokenizer.decode(prefix).rpartition("\n")[2] in indentation
    assert checked > 500


def test_thinking_is_offered_on_every_line_of_space_indented_code(tokenizer: Tokenizer) -> None:
    format = build_format(CONFIGS["comment"], tokenizer)
    for code in functions():
        lines = encode_document(code, "d", tokenizer, format, CONFIGS["comment"]).lines
        assert all(line.may_think for line in lines)


@pytest.mark.parametrize("kind", NATURAL)
def test_line_by_line_encoding_is_the_natural_one(kind: str, all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers[kind]
    for code in (*modules(), *snippets()):
        if "\r" in code:
            continue
        for granularity in GRANULARITIES:
            parts = [index for part in segment(code, granularity) for index in tokenizer.encode(part)]
            assert parts == tokenizer.encode(code)


def test_spans_are_the_encoding_of_lines_cut(tokenizer: Tokenizer) -> None:
    config = CONFIGS["span"]
    format = build_format(config, tokenizer)
    code = strip_comment_lines(functions()[0])
    document = encode_document(code, "d", tokenizer, format, config)
    spans = [list(line.body) for line in document.lines]
    for part in segment(code, "line"):
        ids = tokenizer.encode(part)
        for start in range(0, len(ids), 3):
            assert spans.pop(0) == ids[start : start + 3]
    assert not spans
    assert all(line.indent == line.tail == () for line in document.lines)


# --- Human comments ------------------------------------------------------------------------------------------------

COMMENTED = (
    "# top\n\n# one\n# two\nx = 1\n####\ny = (\n    # in\n    2)\n# lost\n\nif x:\n    # deep\n    z = 3\n# end\n"
)


def test_comments_become_thoughts_of_the_first_span_of_a_line(tokenizer: Tokenizer) -> None:
    config = CONFIGS["span"].model_copy(update={"max_latent_tokens": 40})
    format = build_format(config, tokenizer)
    spans = encode_document(COMMENTED, "d", tokenizer, format, config, "as_thoughts")
    lines = encode_document(
        COMMENTED, "d", tokenizer, format, CONFIGS["tokens"].model_copy(update={"max_latent_tokens": 40}), "as_thoughts"
    )
    assert list(spans.observed.values()) == list(lines.observed.values()) and len(lines.observed) == 3
    starts = [sum(len(line.ids) for line in lines.lines[:index]) for index in lines.observed]
    assert [sum(len(span.ids) for span in spans.lines[:index]) for index in spans.observed] == starts
    assert len(spans.lines) > len(lines.lines)


@pytest.mark.parametrize("name", ["comment", "tokens"])
def test_comments_become_observed_thoughts(name: str, tokenizer: Tokenizer) -> None:
    config = CONFIGS[name].model_copy(update={"max_latent_tokens": 40})
    format = build_format(config, tokenizer)
    document = encode_document(COMMENTED, "d", tokenizer, format, config, "as_thoughts")
    transcript = compose(document, document.observed, format, tokenizer)
    assert code_text(transcript, tokenizer) == "x = 1\ny = (\n    2)\n\nif x:\n    z = 3\n"
    assert sorted(document.observed) == [0, 2, 4]
    expected = {
        "comment": "# one two\nx = 1\ny = (\n    # in\n    2)\n\nif x:\n    # deep\n    z = 3\n",
        "tokens": "<think>one two</think>x = 1\n<act>y = (\n<think>in</think>    2)\n\n<act>if x:\n"
        "<think>deep</think>    z = 3\n",
    }
    text = full_text(transcript, tokenizer)
    markers = [tokenizer.bos, tokenizer.eos]
    assert text == expected[name]
    assert set(transcript.ids[[0, -1]]) == set(markers)


def test_observed_thoughts_of_real_code_are_natural(tokenizer: Tokenizer) -> None:
    """A comment line of the source and the observed thought in its place are the same text."""
    config = CONFIGS["comment"].model_copy(update={"max_latent_tokens": 200})
    format = build_format(config, tokenizer)
    seen = 0
    for code in functions():
        document = encode_document(code, "d", tokenizer, format, config, "as_thoughts")
        text = full_text(compose(document, document.observed, format, tokenizer), tokenizer)
        assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(code))
        for comment in re.findall(r"\n( *# [^\n#]+)\n *[^\s#]", text):
            seen += 1
            assert comment.split("#")[1].split()[0] in code
    assert seen > 20


def test_a_long_comment_is_cut_and_its_end_forced(tokenizer: Tokenizer) -> None:
    config = CONFIGS["comment"]
    format = build_format(config, tokenizer)
    code = "def f():\n    # a comment of very many words that no limit would let through\n    return 1\n"
    document = encode_document(code, "d", tokenizer, format, config, "as_thoughts")
    assert len(document.observed[1]) == config.max_latent_tokens
    transcript = compose(document, document.observed, format, tokenizer)
    assert re.fullmatch(r"def f\(\):\n    # a c.*\n    return 1\n", full_text(transcript, tokenizer))
    forced = transcript.ids[transcript.roles == Role.FORCED].tolist()
    assert forced == [*format.forced_end, *document.lines[1].indent]


def test_kept_comments_are_lines(tokenizer: Tokenizer) -> None:
    format = build_format(CONFIGS["tokens"], tokenizer)
    document = encode_document(COMMENTED, "d", tokenizer, format, CONFIGS["tokens"], "keep")
    assert len(document.lines) == len(segment(COMMENTED, "line")) == 13
    assert document.observed == {}
    assert code_text(raw(document, format, tokenizer), tokenizer) == COMMENTED


# --- compose, cut, drop --------------------------------------------------------------------------------------------


def test_a_thought_for_no_line_is_refused(tokenizer: Tokenizer) -> None:
    format = build_format(CONFIGS["comment"], tokenizer)
    document = encode_document("x\n", "name", tokenizer, format, CONFIGS["comment"])
    with pytest.raises(ValueError, match="document name: there is no line 1"):
        compose(document, {1: (5,)}, format, tokenizer)


def test_cut_keeps_whole_lines_within_the_limit(config: TextConfig, tokenizer: Tokenizer) -> None:
    format = build_format(config, tokenizer)
    code = functions()[3]
    document = encode_document(code, "d", tokenizer, format, config)
    whole = raw(document, format, tokenizer)
    assert cut(document, whole.num_tokens, format) is document
    for limit in range(whole.num_tokens):
        part = cut(document, limit, format)
        if part is None:
            assert limit < (whole.lines <= 0).sum()
            continue
        transcript = raw(part, format, tokenizer)
        assert transcript.num_tokens <= limit
        assert transcript.ids.tolist() == whole.ids[: transcript.num_tokens].tolist()
        assert not part.complete
        assert tokenizer.eos not in transcript.ids[1:]
        following = (whole.lines == len(part.lines)).sum()  # with eos, when it is the last line
        assert transcript.num_tokens + following > limit, "one more line would have fitted"


def test_cut_drops_the_observed_thoughts_of_lines_it_drops(tokenizer: Tokenizer) -> None:
    format = build_format(CONFIGS["comment"], tokenizer)
    document = encode_document(COMMENTED, "d", tokenizer, format, CONFIGS["comment"], "as_thoughts")
    part = cut(document, 1 + sum(len(line.ids) for line in document.lines[:3]), format)
    assert part is not None
    assert len(part.lines) == 3
    assert sorted(part.observed) == [0, 2]
    compose(part, part.observed, format, tokenizer)


def test_latents_are_dropped_from_generated_text(all_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = all_tokenizers["llama3"]
    sampled = tokenizer.encode("\n    # add\n    return a + b  # sum\n# next\n")
    assert without_thoughts(sampled, "comment", tokenizer) == "\n    return a + b  # sum\n"
    think, end, act = (tokenizer.special[name] for name in ("<think>", "</think>", "<act>"))
    a, x, y = (tokenizer.encode(text) for text in ("a\nb", "x\n", "# y\n"))
    assert without_thoughts([think, *a, end, *x, act, *y, think, *a], "tokens", tokenizer) == "x\n# y\n"


def without_thoughts(ids: Sequence[int], thoughts: Thoughts, tokenizer: Tokenizer) -> str:
    return Cutter(tokenizer, (), thoughts, code_prompt=False).cut("", ids).text


@pytest.mark.parametrize("name", ["comment", "tokens"])
def test_dropping_latents_gives_the_code_back(name: str, tokenizer: Tokenizer) -> None:
    config = CONFIGS[name]
    for code in map(strip_comment_lines, functions()[:30]):
        format = build_format(config, tokenizer)
        document = encode_document(code, "d", tokenizer, format, config)
        thoughts = {}
        for row, (line, action) in enumerate(zip(document.lines, segment(code, "line"), strict=True)):
            thoughts[row] = format.thought("why", line, action[: len(action) - len(action.lstrip(SPACE))], tokenizer)
        transcript = compose(document, thoughts, format, tokenizer)
        assert full_text(transcript, tokenizer).count("why") == code.count("why") + len(thoughts)
        cutter = Cutter(tokenizer, (), format.name, code_prompt=False, ends=frozenset({tokenizer.eos}))
        cut = cutter.cut("", transcript.ids.tolist()[1:])
        assert (cut.text, cut.thoughts) == (code, len(thoughts))
