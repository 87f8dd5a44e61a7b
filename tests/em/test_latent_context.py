"""Without `text.keep_latents` every token is read behind the expert's lines and the latent in force, nothing else."""

import numpy as np
import pytest
import torch
from toy import FORMATS, LARGE, Documents, Toy

from ra3_megatron.em.latent_context import Contexts, InForceOnly, contexts_of
from ra3_megatron.em.packing import policy_batches, training_batches
from ra3_megatron.em.scoring import token_log_probs
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import forward
from ra3_megatron.rollout.latent_sampler import Job, LatentSampler
from ra3_megatron.rollout.megatron_engine import MegatronEngine
from ra3_megatron.text.latents import compose, full_text
from ra3_megatron.text.transcript import Role, Transcript
from ra3_megatron.training.rows import plan_rows

CODES = ("a = b\n  ab(c):\n   b\n\nc\n\tdd\n", "b\n", "  a\n# bab\n  b = d\nc\n   # d\n   ab\nd\n")


@pytest.fixture(scope="module", params=FORMATS)
def toy(request: pytest.FixtureRequest, runtime: Runtime) -> Toy:
    return Toy(runtime, request.param, LARGE, max_latent_tokens=3)


def sampled(toy: Toy, method: str = "jump_ahead", naive_cache: bool = True) -> tuple[object, list[Transcript]]:
    """A model, and transcripts that it sampled with the thought in force alone; some have a human's thoughts."""
    model = toy.model(seed=21, lean=1.0)
    engine = MegatronEngine(model, toy.runtime, toy.latents, toy.tokenizer.vocab_size, 0.8)
    documents = [toy.document(code, str(d), human_comments="as_thoughts") for d, code in enumerate(CODES)]
    jobs = [Job(document, (d, g)) for d, document in enumerate(documents) for g in range(12)]
    sampler = LatentSampler(engine, toy.latents, toy.tokenizer, 64, 8, method, naive_cache, keep_latents=False)  # type: ignore[arg-type]
    transcripts = sampler.sample(jobs)
    think = np.concatenate([t.think[t.offered] for t in transcripts])
    assert 0.1 < think.mean() < 0.95
    assert max(int(t.think.sum()) for t in transcripts) > 2
    return model, transcripts


def read(toy: Toy, transcripts: list[Transcript]) -> Contexts:
    return contexts_of(transcripts, False, toy.latents, toy.tokenizer)


def test_sequences_of_an_example(runtime: Runtime) -> None:
    toy = Toy(runtime, "comment", LARGE, max_latent_tokens=3)
    document = toy.document("a\n  b\n  c\nd\n")
    thoughts = {1: document_thought(toy, "  # a\n", "  "), 3: document_thought(toy, "#b\n", "")}
    transcript = compose(document, thoughts, toy.latents, toy.tokenizer)
    sequences = read(toy, [transcript]).sequences
    assert [full_text(s, toy.tokenizer) for s in sequences] == [
        "a\n  # a\n  ",
        "a\n  # a\n  b\n  c\n#b\n",
        "a\n  b\n  c\n#b\nd\n",
    ]
    own = [s.ids[s.roles != Role.CONTEXT].tolist() for s in sequences]
    assert [toy.tokenizer.decode(ids) for ids in own] == ["a\n  # a\n  ", "b\n  c\n#b\n", "d\n"]


def document_thought(toy: Toy, text: str, indentation: str) -> list[int]:
    return toy.tokenizer.encode(text)[len(toy.tokenizer.encode(indentation)) if indentation else 0 :]


def test_every_token_is_read_once(toy: Toy) -> None:
    _, transcripts = sampled(toy)
    contexts = read(toy, transcripts)
    numbers = [np.arange(1, t.num_tokens + 1) for t in transcripts]
    split = contexts.split(numbers)
    assert sorted(np.concatenate(split)[np.concatenate(split) > 0]) == sorted(np.concatenate(numbers))
    for joined, expected in zip(contexts.join(split), numbers, strict=True):
        np.testing.assert_array_equal(joined, expected)
    for sequence, roles in zip(
        contexts.sequences, contexts.split([t.roles for t in transcripts], Role.CONTEXT), strict=True
    ):
        np.testing.assert_array_equal(sequence.roles, roles)
        assert sequence.num_tokens <= max(t.num_tokens for t in transcripts)
    assert len(contexts.sequences) == sum(int(t.think.sum()) + 1 for t in transcripts)


def test_without_thoughts_nothing_changes(toy: Toy) -> None:
    plain = [compose(toy.document(code), {}, toy.latents, toy.tokenizer) for code in CODES]
    assert read(toy, plain).sequences == plain
    store = InForceOnly(Documents(plain), toy.latents, toy.tokenizer)
    assert list(store.lengths) == Documents(plain).lengths and [store[n] for n in range(len(store))] == plain


def test_scores_are_those_behind_the_latent_in_force(toy: Toy) -> None:
    """Against plain forward passes over documents that hold the latent in force alone (and the one that follows)."""
    model, transcripts = sampled(toy)
    contexts = read(toy, transcripts)
    plan = plan_rows([s.num_tokens for s in contexts.sequences], 128, 2, toy.runtime)
    found = token_log_probs(model, transcripts, plan, toy.runtime, toy.latents, everything=True, contexts=contexts)  # type: ignore[arg-type]
    compared = 0
    for transcript, values in zip(transcripts, found, strict=True):
        document = toy.document(CODES[int(transcript.document)], human_comments="as_thoughts")
        thoughts = {int(t): toy.thought_ids(transcript, int(t)) for t in np.flatnonzero(transcript.think)}
        for line in range(transcript.num_lines):
            before = [t for t in thoughts if t <= line]
            in_force = {t: thoughts[t] for t in before[-1:]}
            compared += compare(toy, model, transcript, values, document, in_force, line, [Role.EXPERT])
            if line in thoughts:  # chosen while the one before it was in force
                choosing = {t: thoughts[t] for t in before[-2:]}
                roles = [Role.DECISION, Role.THOUGHT, Role.FORCED]
                compared += compare(toy, model, transcript, values, document, choosing, line, roles)
    assert compared > 400


def compare(
    toy: Toy,
    model: object,
    transcript: Transcript,
    values: np.ndarray,
    document: object,
    thoughts: dict[int, list[int]],
    line: int,
    roles: list[Role],
) -> int:
    """Tokens of `line` with these roles, whose log-probabilities are those in a document with these thoughts."""
    alone = compose(document, thoughts, toy.latents, toy.tokenizer)  # type: ignore[arg-type]
    with torch.no_grad():
        (logits,) = toy.full_logits(model, [alone.ids])  # type: ignore[arg-type]
    expected = toy.token_log_probs(alone, logits).numpy()
    there = np.isin(alone.roles, roles) & (alone.lines == line)
    here = np.isin(transcript.roles, roles) & (transcript.lines == line)
    np.testing.assert_array_equal(alone.ids[there], transcript.ids[here])
    np.testing.assert_allclose(values[here], expected[there], atol=2e-5)
    return int(here.sum())


def test_the_trainer_agrees_with_the_sampler(toy: Toy) -> None:
    model, transcripts = sampled(toy)
    contexts = read(toy, transcripts)
    plan = plan_rows([s.num_tokens for s in contexts.sequences], 128, 2, toy.runtime)
    advantages = [np.ones(t.num_lines, np.float32) for t in transcripts]
    batches = policy_batches(transcripts, advantages, plan, toy.runtime, toy.latents, 0.0, 0.8, contexts)
    total = 0
    for batch, out in zip(batches, forward(model, batches, toy.runtime), strict=True):  # type: ignore[arg-type]
        assert batch.choices is not None and batch.behaviour is not None
        mask = batch.choices.mask
        np.testing.assert_allclose(out[1][mask], batch.behaviour[mask], atol=2e-5)
        total += int(mask.sum())
    assert total == sum(int((t.log_probs != 0).sum()) for t in transcripts)


def test_with_all_latents_in_the_context_they_would_not_agree(toy: Toy) -> None:
    model, transcripts = sampled(toy)
    plan = plan_rows([t.num_tokens for t in transcripts], 128, 2, toy.runtime)
    advantages = [np.ones(t.num_lines, np.float32) for t in transcripts]
    batches = policy_batches(transcripts, advantages, plan, toy.runtime, toy.latents, 0.0, 0.8)
    worst = 0.0
    for batch, out in zip(batches, forward(model, batches, toy.runtime), strict=True):  # type: ignore[arg-type]
        assert batch.choices is not None and batch.behaviour is not None
        mask = batch.choices.mask
        worst = max(worst, float((out[1][mask] - batch.behaviour[mask]).abs().max()))
    assert worst > 1e-3


def test_jump_ahead_is_naive(toy: Toy) -> None:
    _, expected = sampled(toy, "naive", naive_cache=False)
    for method in ("naive", "jump_ahead"):
        _, found = sampled(toy, method)
        for one, other in zip(found, expected, strict=True):
            assert one == other
            assert one.log_probs is not None and other.log_probs is not None
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=2e-5)


def test_training_reads_every_token_once(toy: Toy) -> None:
    _, transcripts = sampled(toy)
    store = InForceOnly(Documents(transcripts), toy.latents, toy.tokenizer)
    sequences = [store[n] for n in range(len(store))]
    assert sequences == read(toy, transcripts).sequences
    assert list(store.lengths) == [s.num_tokens for s in sequences]
    plan = plan_rows(store.lengths.tolist(), 128, 2, toy.runtime)
    batches = training_batches(sequences, plan, toy.runtime, thought_weight=0.5)
    weight = sum(float(batch.ce_weight.sum()) for batch in batches if batch.ce_weight is not None)
    latent = sum(int(np.isin(t.roles, (Role.THOUGHT, Role.FORCED)).sum()) for t in transcripts)
    others = sum(int((~t.is_given).sum()) for t in transcripts) - latent
    assert latent and weight == pytest.approx(others + 0.5 * latent)
