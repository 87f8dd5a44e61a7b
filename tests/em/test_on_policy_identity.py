"""The trainer's log-probabilities of the sampled choices are the sampler's: on-policy, every ratio is 1."""

import numpy as np
import pytest
from toy import FORMATS, LARGE, Toy, choice_positions

from ra3_megatron.em.packing import choices_of, policy_batches
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import forward
from ra3_megatron.rollout.latent_sampler import Job, LatentSampler
from ra3_megatron.rollout.megatron_engine import MegatronEngine
from ra3_megatron.training.rows import plan_rows

CODES = ("a = b\n  ab(c):\n   b\n\nc\n\tdd\n", "b\n", "  a\n# bab\n  b = d\nc\n   # d\n   ab\nd\n")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("name", "span"), [*((name, None) for name in FORMATS), ("tokens", 1), ("tokens", 2)], ids=str)
def test_the_trainer_agrees_with_the_sampler(runtime: Runtime, name: str, span: int | None, temperature: float) -> None:
    toy = Toy(runtime, name, LARGE, max_latent_tokens=3)
    if span is not None:  # some spans are white space only, or start with it
        toy.text = toy.text.model_copy(update={"granularity": "token", "token_span": span})
    model = toy.model(seed=21, lean=1.0)
    engine = MegatronEngine(model, runtime, toy.latents, toy.tokenizer.vocab_size, temperature)
    documents = [toy.document(code, human_comments="as_thoughts") for code in CODES]
    jobs = [Job(document, (d, g)) for d, document in enumerate(documents) for g in range(12)]
    transcripts = LatentSampler(engine, toy.latents, toy.tokenizer, 128, 8).sample(jobs)
    think = np.concatenate([t.think[t.offered] for t in transcripts])
    assert 0.1 < think.mean() < 0.95

    plan = plan_rows([t.num_tokens for t in transcripts], 128, 2, runtime)
    advantages = [np.ones(t.num_lines, np.float32) for t in transcripts]
    batches = policy_batches(transcripts, advantages, plan, runtime, toy.latents, 0.0, temperature)
    total = 0
    for batch, out in zip(batches, forward(model, batches, runtime), strict=True):
        assert batch.choices is not None and batch.behaviour is not None
        mask = batch.choices.mask
        np.testing.assert_allclose(out[1][mask], batch.behaviour[mask], atol=1e-5)
        assert not batch.behaviour[~mask].any()
        total += int(mask.sum())
    assert total == sum(len(choice_positions(t)) for t in transcripts)
    for transcript in transcripts:
        assert (
            np.flatnonzero(choices_of(transcript, toy.latents).mask).tolist() == choice_positions(transcript).tolist()
        )
