"""What is scored of a transcript and how: method.md, Objective. Log-probabilities are compared with plain softmaxes."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from toy import FORMATS, LARGE, SMALL, Toy

from ra3_megatron.em.latent_stats import blank_tokens
from ra3_megatron.em.scoring import line_log_likelihoods, malformed_thoughts, token_log_probs
from ra3_megatron.mcore.model import LanguageModel
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.text.latents import compose, raw
from ra3_megatron.text.segment import WHITESPACE
from ra3_megatron.text.transcript import Role, Transcript
from ra3_megatron.training.rows import plan_rows

CODE = "a):\n   b\nba\n\n"


@pytest.fixture(scope="module", params=FORMATS)
def toy(request: pytest.FixtureRequest, runtime: Runtime) -> Toy:
    return Toy(runtime, request.param, SMALL, max_latent_tokens=2 if request.param == "comment" else 1)


@pytest.fixture(scope="module")
def every(toy: Toy) -> list[Transcript]:
    return list(toy.transcripts(toy.document(CODE)))


def score(toy: Toy, model: LanguageModel, items: Sequence[Transcript], everything: bool = False) -> list[np.ndarray]:
    plan = plan_rows([t.num_tokens for t in items], 64, 16, toy.runtime)
    return token_log_probs(model, items, plan, toy.runtime, toy.latents, everything)


def by_hand(toy: Toy, model: LanguageModel, items: Sequence[Transcript]) -> list[np.ndarray]:
    with torch.no_grad():
        logits = toy.full_logits(model, [t.ids for t in items])
        return [toy.token_log_probs(t, x).numpy() for t, x in zip(items, logits, strict=True)]


@pytest.mark.parametrize("everything", [False, True])
def test_scores_are_what_full_passes_say(toy: Toy, every: list[Transcript], everything: bool) -> None:
    """In both branches the first visible token is renormalised over the tokens that start no thought."""
    model = toy.model(seed=12, lean=2.0)
    some = every[::7]
    for transcript, found, expected in zip(
        some, score(toy, model, some, everything), by_hand(toy, model, some), strict=True
    ):
        counted = np.ones(transcript.num_tokens, bool) if everything else transcript.roles == Role.EXPERT
        np.testing.assert_allclose(found, np.where(counted, expected, 0), atol=1e-5)
    think = np.stack([t.think for t in some])
    assert think.any(0).all() and (~think).any(0).all(), "both branches were there on every line"


def test_a_human_comment_is_scored_as_any_line(runtime: Runtime) -> None:
    toy = Toy(runtime, "comment", LARGE, max_latent_tokens=2)
    model = toy.model(seed=12, lean=2.0)
    document = toy.document("b\n# ab\n  #a\n", human_comments="keep")
    transcript = raw(document, toy.latents, toy.tokenizer)
    found, expected = score(toy, model, [transcript])[0], by_hand(toy, model, [transcript])[0]
    np.testing.assert_allclose(found, np.where(transcript.roles == Role.EXPERT, expected, 0), atol=1e-5)


def test_layout_is_never_scored(runtime: Runtime) -> None:
    """Scored tokens show something, and all that shows something is scored: line breaks and indentation never are."""
    for name in FORMATS:
        toy = Toy(runtime, name, LARGE, max_latent_tokens=2)
        model = toy.model(seed=1)
        document = toy.document("a = b\n  ab(c):\n   b\n\n \tc\n  \n    d(a)\n")
        thoughts = {line: toy.thoughts_of(document, line)[3] for line in (1, 2)}
        for transcript in (
            raw(document, toy.latents, toy.tokenizer),
            compose(document, thoughts, toy.latents, toy.tokenizer),
        ):
            scored = np.flatnonzero(score(toy, model, [transcript])[0])
            table = toy.tokenizer.token_bytes
            visible = [bool(table[token].strip(WHITESPACE.encode())) for token in transcript.ids]
            assert scored.tolist() == np.flatnonzero(visible & transcript.is_code).tolist()


def test_a_thought_changes_no_scored_token(toy: Toy, every: list[Transcript]) -> None:
    """A thought cannot move the indentation, or anything else, into or out of what is scored."""
    plain = every[0]
    assert not plain.think.any()
    for transcript in every:
        scored = transcript.roles == Role.EXPERT
        assert transcript.ids[scored].tolist() == plain.ids[plain.roles == Role.EXPERT].tolist()
        assert transcript.lines[scored].tolist() == plain.lines[plain.roles == Role.EXPERT].tolist()


@pytest.mark.parametrize("likelihood", ["mean", "sum"])
def test_thinking_is_worth_nothing_to_a_model_that_ignores_its_context(
    toy: Toy, every: list[Transcript], likelihood: str
) -> None:
    """Its lines are as likely behind a thought as without one, so that no branch is paid twice for the decision."""
    model = toy.model(seed=12, lean=2.0)
    with torch.no_grad():
        model.embedding.word_embeddings.weight[:] = model.embedding.word_embeddings.weight[5].clone()
    values = [
        line_log_likelihoods(t, s, likelihood)  # type: ignore[arg-type]
        for t, s in zip(every[::5], score(toy, model, every[::5]), strict=True)
    ]
    np.testing.assert_allclose(values, np.broadcast_to(values[0], (len(values), 3)), atol=1e-5)
    assert (values[0] < -0.5).all()


def test_line_log_likelihoods_count_expert_tokens_alone(toy: Toy, every: list[Transcript]) -> None:
    transcript = every[-1]
    assert transcript.think.all()
    log_probs = np.full(transcript.num_tokens, 99.0, dtype=np.float32)
    log_probs[transcript.roles == Role.EXPERT] = [-1, -3, -2, -4, -6]
    assert line_log_likelihoods(transcript, log_probs, "sum").tolist() == [-4.0, -2.0, -10.0]
    assert line_log_likelihoods(transcript, log_probs, "mean").tolist() == [-2.0, -2.0, -5.0]


# -- malformed thoughts -------------------------------------------------------------------------------------------


def malformed(toy: Toy, thoughts: dict[int, Sequence[int]]) -> list[bool]:
    document = toy.document("  a = b\n   b\nc\n")
    transcript = compose(document, thoughts, toy.latents, toy.tokenizer)
    return list(malformed_thoughts(transcript, blank_tokens(toy.tokenizer).empty))


def test_malformed_comments(runtime: Runtime) -> None:
    toy = Toy(runtime, "comment", LARGE, max_latent_tokens=3)
    one = {token: n for n, token in enumerate(toy.tokenizer.token_bytes)}
    sharp, spaced, end, a, said = one[b"#"], one[b" #"], one[b"\n"], one[b"a"], one[b"#b\n"]
    assert malformed(toy, {}) == [False, False, False]
    assert malformed(toy, {0: [sharp, a, end], 1: [spaced, a, end], 2: [said]}) == [False, False, False]
    assert malformed(toy, {0: [sharp, end], 1: [spaced, sharp, end], 2: [sharp, one[b"  "], end]}) == [True] * 3
    assert malformed(toy, {0: [sharp, a, a]}) == [True, False, False], "cut"
    assert malformed(toy, {1: [spaced, a, a]}) == [False, True, False], "cut"
    assert malformed(toy, {2: [sharp, a, one[b"c\n"]]}) == [False, False, False], "as long as can be, but ended"


def test_malformed_blocks(runtime: Runtime) -> None:
    toy = Toy(runtime, "tokens", LARGE, max_latent_tokens=2)
    special, one = toy.tokenizer.special, {token: n for n, token in enumerate(toy.tokenizer.token_bytes)}
    think, end, a = special["<think>"], special["</think>"], one[b"a"]
    assert malformed(toy, {}) == [False, False, False]
    assert malformed(toy, {0: [think, a, end], 1: [think, one[b"#a"], end]}) == [False] * 3
    assert malformed(toy, {0: [think, end], 1: [think, one[b" "], end]}) == [True, True, False]
    assert malformed(toy, {0: [think, a, a], 2: [think, a, one[b"d"]]}) == [True, False, True], "cut"
