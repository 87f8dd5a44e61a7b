"""Transcripts never outgrow the context; thoughts that were observed stay, and lines without a choice get none."""

import numpy as np
import pytest
from toy import FORMATS, LARGE, SMALL, Toy, choice_positions, log_probs_of

from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rollout.latent_sampler import Job, LatentSampler
from ra3_megatron.rollout.megatron_engine import MegatronEngine
from ra3_megatron.text.latents import Document, code_text, compose, cut, raw
from ra3_megatron.text.transcript import Role, Transcript

CODE = "a = b\n  ab(c):\n   b\n\nc\n  d(a)\n"


@pytest.fixture(scope="module", params=FORMATS)
def toy(request: pytest.FixtureRequest, runtime: Runtime) -> Toy:
    return Toy(runtime, request.param, LARGE, max_latent_tokens=3)


def sample(toy: Toy, document: Document, lean: float, max_tokens: int, count: int = 8) -> list[Transcript]:
    model = toy.model(seed=9, lean=lean)
    engine = MegatronEngine(model, toy.runtime, toy.latents, toy.tokenizer.vocab_size)
    sampler = LatentSampler(engine, toy.latents, toy.tokenizer, max_tokens, batch_size=4)
    return sampler.sample([Job(document, (1, n)) for n in range(count)])


def test_a_thought_is_offered_exactly_where_the_longest_one_fits(toy: Toy) -> None:
    document = toy.document(CODE)
    shortest = raw(document, toy.latents, toy.tokenizer).num_tokens
    longest = toy.latents.max_thought_ids + len(toy.latents.forced_end) + 1
    filled = 0
    for max_tokens in range(shortest, shortest + 5 * longest + 1):
        for transcript in sample(toy, document, 30.0, max_tokens):
            assert transcript.num_tokens <= max_tokens
            assert code_text(transcript, toy.tokenizer) == CODE
            total = shortest
            for index, line in enumerate(document.lines):
                room = total + toy.latents.max_thought_ids + len(toy.latents.forced_end) + len(line.indent)
                assert transcript.offered[index] == (room <= max_tokens)
                if transcript.think[index]:
                    assert transcript.offered[index]
                    part = compose(document, {index: toy.thought_ids(transcript, index)}, toy.latents, toy.tokenizer)
                    total += part.num_tokens - shortest
            assert total == transcript.num_tokens
            filled += total == max_tokens
    assert filled, "the longest thoughts fill the context to its last token"


def test_a_document_that_fills_the_context_is_left_alone(toy: Toy) -> None:
    document = toy.document(CODE)
    limit = raw(document, toy.latents, toy.tokenizer).num_tokens
    for transcript in sample(toy, document, 30.0, limit):
        assert not transcript.offered.any() and not transcript.think.any()
        assert transcript.log_probs is not None and not transcript.log_probs.any()
        assert len(choice_positions(transcript)) == 0
        assert transcript.ids.tolist() == raw(document, toy.latents, toy.tokenizer).ids.tolist()


def test_a_cut_document_has_no_end(toy: Toy) -> None:
    document = cut(toy.document(CODE), 20, toy.latents)
    assert document is not None and not document.complete
    for transcript in sample(toy, document, 1.0, 60):
        assert transcript.ids[-1] != toy.tokenizer.eos
        assert code_text(transcript, toy.tokenizer) == CODE[: len(code_text(transcript, toy.tokenizer))]


def test_observed_thoughts_stay_and_are_no_choices(toy: Toy) -> None:
    code = "a\n# bab\n  b = d\nc\n   # d\n   ab\nd\n"
    document = toy.document(code, human_comments="as_thoughts")
    assert sorted(document.observed) == [1, 3]
    seen = set()
    transcripts = sample(toy, document, 1.0, 64, count=100)
    exact = log_probs_of(toy, toy.model(seed=9, lean=1.0), transcripts)
    for transcript, log_q in zip(transcripts, exact, strict=True):
        assert transcript.log_probs is not None
        assert float(transcript.log_probs.sum()) == pytest.approx(float(log_q), abs=2e-5), "they were in the context"
        assert transcript.think[[1, 3]].all()
        assert transcript.offered.tolist() == [True, False, True, False, True]
        for line, ids in document.observed.items():
            assert toy.thought_ids(transcript, line) == list(ids)
            assert not transcript.log_probs[transcript.lines == line].any()
        assert not np.isin(transcript.lines[choice_positions(transcript)], (1, 3)).any()
        seen.add(tuple(transcript.think.tolist()))
    assert len(seen) == 8, "the other lines are decided freely"


def test_observed_thoughts_count_towards_the_context(toy: Toy) -> None:
    code = "a\n# bab\n  b = d\nc\n   # d\n   ab\nd\n"
    document = toy.document(code, human_comments="as_thoughts")
    shortest = compose(document, document.observed, toy.latents, toy.tokenizer).num_tokens
    for max_tokens in range(shortest, shortest + 12):
        for transcript in sample(toy, document, 30.0, max_tokens):
            assert transcript.num_tokens <= max_tokens


def test_lines_that_may_not_think_do_not(runtime: Runtime) -> None:
    """Behind a tab no token of this vocabulary starts a comment, and before a human comment none is offered."""
    toy = Toy(runtime, "comment", LARGE, max_latent_tokens=3)
    document = toy.document("a\n\tdd\n#a\nb\n", human_comments="keep")
    assert [line.may_think for line in document.lines] == [True, False, False, True]
    transcripts = sample(toy, document, 30.0, 64, count=20)
    assert any(t.think[3] for t in transcripts)
    for transcript in transcripts:
        assert transcript.offered.tolist() == [True, False, False, True]
        assert not transcript.think[1:3].any()
        assert transcript.log_probs is not None
        assert not transcript.log_probs[np.isin(transcript.lines, (1, 2))].any()


@pytest.mark.parametrize("name", FORMATS)
def test_choice_positions_are_the_sampled_tokens(runtime: Runtime, name: str) -> None:
    toy = Toy(runtime, name, SMALL, max_latent_tokens=2)
    for transcript in sample(toy, toy.document("a):\n   b\nba\n\n"), 1.0, 64, count=60):
        assert transcript.log_probs is not None
        assert np.flatnonzero(transcript.log_probs).tolist() == choice_positions(transcript).tolist()
        shown = transcript.roles[choice_positions(transcript)]
        acts = int((~transcript.think).sum())
        assert (shown == (Role.EXPERT if name == "comment" else Role.DECISION)).sum() >= acts
        assert not np.isin(shown, (Role.LAYOUT, Role.FORCED, Role.CONTEXT)).any()
