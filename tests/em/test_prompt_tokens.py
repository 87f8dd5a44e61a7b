"""Tokens of a prompt are conditioned on, and neither trained on nor scored nor sampled."""

from typing import Any

import numpy as np
import pytest
import torch
from toy import FORMATS, LARGE, Documents, Toy

from ra3_megatron.config.layouts import ParallelConfig
from ra3_megatron.config.training import MStepConfig
from ra3_megatron.em.evaluation import evaluate
from ra3_megatron.em.latent_stats import blank_tokens
from ra3_megatron.em.mstep import MStep
from ra3_megatron.em.packing import training_batches
from ra3_megatron.em.policy import latent_policy
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import Trainer
from ra3_megatron.text.latents import code_text, raw
from ra3_megatron.text.transcript import Role, Transcript
from ra3_megatron.training.rows import plan_rows

PROMPT, CODE = "ab = c\nd(a)\n", "a = b\nab(c)\nd\n"


@pytest.fixture(scope="module", params=FORMATS)
def toy(request: pytest.FixtureRequest, runtime: Runtime) -> Toy:
    return Toy(runtime, request.param, LARGE, max_latent_tokens=2)


def document(toy: Toy, **changes: Any) -> Transcript:
    return raw(toy.document(CODE, "d", **changes), toy.latents, toy.tokenizer)


def test_a_prompt_has_no_weight_in_the_loss(toy: Toy) -> None:
    given, plain = document(toy, prompt=PROMPT), document(toy)
    plan = plan_rows([given.num_tokens], 64, 1, toy.runtime)
    (batch,) = training_batches([given], plan, toy.runtime)
    assert batch.ce_weight is not None and batch.kind is not None
    assert float(batch.ce_weight.sum()) == plain.num_tokens - 1, "as many as without a prompt"
    prompt = int(given.is_given.sum())
    assert not batch.ce_weight[0, : prompt - 1].any() and bool(batch.ce_weight[0, prompt - 1])
    assert not batch.kind[0, : prompt - 1].any()


@pytest.mark.parametrize("thought_weight", [1.0, 0.0])
def test_an_mstep_reports_markers_of_decisions_apart(toy: Toy, thought_weight: float) -> None:
    """A document without thoughts has no thought to measure, `<act>` or not; what `<act>` costs is trained on."""
    settings = MStepConfig(global_batch_size=2, micro_batch_size=1)
    config, plain = toy.config(mstep=settings), document(toy)
    trainer = Trainer(toy.model(seed=2), settings.optimizer, ParallelConfig(), toy.runtime, steps=10)
    metrics = MStep(config, settings, trainer, Documents([plain] * 9), thought_weight).step()
    assert "thought_ce" not in metrics
    if toy.latents.name == "comment":
        assert "decision_ce" not in metrics and metrics["loss"] == pytest.approx(metrics["code_ce"])
    else:
        code, markers = int(plain.is_code.sum()), plain.num_lines
        mean = (metrics["code_ce"] * code + metrics["decision_ce"] * markers) / (code + markers)
        assert metrics["loss"] == pytest.approx(mean, rel=1e-5)


def test_an_mstep_counts_the_tokens_of_prompts(toy: Toy) -> None:
    """They are read, if not trained on: the FLOPs of a phase are those of all its tokens."""
    settings = MStepConfig(global_batch_size=2, micro_batch_size=1)
    config, given = toy.config(mstep=settings), document(toy, prompt=PROMPT)
    trainer = Trainer(toy.model(seed=2), settings.optimizer, ParallelConfig(), toy.runtime, steps=10)
    step = MStep(config, settings, trainer, Documents([given] * 9))
    assert step.step()["tokens"] == len(step.last_documents) * given.num_tokens


def test_sampling_and_scoring_go_on_behind_the_prompt(toy: Toy) -> None:
    model = toy.model(seed=14, lean=2.0)
    config = toy.config(evaluation={"samples": 40})
    policy = latent_policy(model, config, toy.runtime, toy.latents, toy.tokenizer, 0)
    given = document(toy, prompt=PROMPT)
    found = evaluate(model, policy, [given], [(1,)], config, blank_tokens(toy.tokenizer))
    assert any(t.think.any() for t in found.transcripts)
    for transcript in found.transcripts:
        assert code_text(transcript, toy.tokenizer) == PROMPT + CODE
        assert np.array_equal(transcript.ids[transcript.is_given], given.ids[given.is_given])
        assert transcript.log_probs is not None
        with torch.no_grad():
            (logits,) = toy.full_logits(model, [transcript.ids])
            expected = float(sum(toy.latent_log_probs(transcript, logits)))
        assert float(transcript.log_probs.sum()) == pytest.approx(expected, abs=1e-4)
    lines = found.by_line(toy.tokenizer)[0].lines
    assert "".join(line.text for line in lines) == CODE
    (logits,) = toy.full_logits(model, [given.ids])
    exact = -toy.token_log_probs(given, logits)[torch.from_numpy(given.is_code)].mean()
    assert found.figures["raw_code_ce"] == pytest.approx(float(exact), abs=1e-5)
    assert (given.roles == Role.CONTEXT).sum() > 1
