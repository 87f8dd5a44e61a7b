"""The policy gradient against the exact gradient of the expected return, by enumeration (method.md, invariant 4)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import FORMATS, SMALL, Toy

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.config.training import EStepConfig, OptimizerConfig
from ra3_megatron.em.estep import EStep
from ra3_megatron.em.latent_stats import blank_tokens
from ra3_megatron.em.objective import group_advantages, truncated_returns
from ra3_megatron.em.packing import policy_batches
from ra3_megatron.em.policy import latent_policy
from ra3_megatron.mcore.loss import Counts, PolicyLoss, stream_loss
from ra3_megatron.mcore.model import LanguageModel
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import Trainer
from ra3_megatron.text.latents import raw
from ra3_megatron.text.transcript import Transcript
from ra3_megatron.training.rows import plan_rows

LINES = 2
FROZEN = OptimizerConfig(learning_rate=1e-20, schedule="constant", warmup_fraction=0.0, weight_decay=0.0, clip_grad=0.0)
TABLE = SMALL[:3] + SMALL[5:8]


@dataclass
class Problem:
    """A document of two lines, q and pi, and the exact gradient of E_q[sum_t r_t] with respect to q's weights."""

    toy: Toy
    document: Transcript
    temperature: float
    every: list[Transcript]
    probabilities: Tensor
    returns: Tensor
    """[transcripts, lines]."""
    exact: Tensor

    def q(self) -> LanguageModel:
        return self.toy.model(seed=3, lean=1.0)


@pytest.fixture(scope="module", params=[(f, t) for f in FORMATS for t in (1.0, 0.7)], ids=lambda p: f"{p[0]}-{p[1]}")
def problem(request: pytest.FixtureRequest, runtime: Runtime) -> Problem:
    name, temperature = request.param
    toy = Toy(runtime, name, TABLE, max_latent_tokens=2 if name == "comment" else 1)
    document = toy.document("ab\n  b\n")
    every = list(toy.transcripts(document))
    assert 40 < len(every) < 2000 and len(document.lines) == LINES
    returns = truncated_returns(rewards_of(toy, every), LINES, 1.0)

    q = toy.model(seed=3, lean=1.0)
    logits = toy.full_logits(q, [t.ids for t in every])
    log_q = torch.stack([sum(toy.latent_log_probs(t, x, temperature)) for t, x in zip(every, logits, strict=True)])
    expected_return = (log_q.exp() * returns[:, 0]).sum()
    exact = flat(torch.autograd.grad(expected_return, list(q.parameters())))
    assert float(log_q.exp().sum()) == pytest.approx(1.0, abs=1e-6)
    return Problem(
        toy, raw(document, toy.latents, toy.tokenizer), temperature, every, log_q.detach().exp(), returns, exact
    )


def flat(gradients: Any) -> Tensor:
    return torch.cat([g.flatten().double() for g in gradients])


def make_estep(toy: Toy, q: LanguageModel, temperature: float) -> EStep:
    """H covers the document, no entropy bonus: J is the expected sum of rewards."""
    config = toy.config(
        estep=EStepConfig(
            group_size=2,
            horizon=LINES,
            baseline="leave_one_out",
            entropy_coefficient=0.0,
            latent_price=0.3,
            micro_batch_size=8,
        ),
        rollout={"temperature": temperature, "batch_size": 2000},
    )
    trainer = Trainer(q, FROZEN, ParallelConfig(), toy.runtime, steps=1000)
    policy = latent_policy(q, config, toy.runtime, toy.latents, toy.tokenizer)
    return EStep(config, policy, trainer, toy.model(seed=8), blank_tokens(toy.tokenizer))


def rewards_of(toy: Toy, transcripts: list[Transcript]) -> Tensor:
    """Rewards by the E-step's own pass of pi, [transcripts, lines]."""
    padded = transcripts + transcripts[: len(transcripts) % 2]
    found = make_estep(toy, toy.model(seed=3), 1.0).reward(padded).rewards[: len(transcripts)]
    return torch.from_numpy(np.stack(found)).double()


@pytest.mark.parametrize(("baseline", "factor"), [("leave_one_out", 1.0), ("group_mean", 0.5), ("none", 1.0)])
def test_the_mean_of_the_estimate_is_the_exact_gradient(problem: Problem, baseline: Any, factor: float) -> None:
    """Over all pairs of transcripts (G = 2) with their exact probabilities. The mean over the group as the baseline
    holds the transcript's own return, which shrinks the gradient by (G - 1) / G."""
    toy, count = problem.toy, len(problem.every)
    first, second = (
        index.flatten() for index in torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
    )
    pairs = torch.stack([problem.returns[first], problem.returns[second]])
    advantages = group_advantages(pairs.view(2, -1), baseline).view(pairs.shape)
    weight = (problem.probabilities[first] * problem.probabilities[second])[:, None] / 2
    expected = torch.zeros(count, LINES, dtype=torch.float64)
    expected.index_add_(0, first, weight * advantages[0]).index_add_(0, second, weight * advantages[1])

    q = problem.q()
    plan = plan_rows([t.num_tokens for t in problem.every], 64, 8, toy.runtime)
    shares = [row.numpy().astype(np.float32) for row in expected]
    batches = policy_batches(problem.every, shares, plan, toy.runtime, toy.latents, 0.0, problem.temperature)
    losses = [stream_loss(q(batch), batch, Counts(1, 1), PolicyLoss())[0] for batch in batches]
    found = -flat(torch.autograd.grad(torch.stack(losses).sum(), list(q.parameters())))
    assert float(problem.exact.norm()) > 0.01
    error = float((found - factor * problem.exact).norm() / problem.exact.norm())
    assert error < 2e-4


def test_sampled_updates_follow_the_exact_gradient(problem: Problem) -> None:
    """The whole E-step (sampling, rewards, advantages, loss, backward), 40 updates on 50 documents of G = 2."""
    q = problem.q()
    step = make_estep(problem.toy, q, problem.temperature)
    before = [p.detach().clone() for p in q.parameters()]
    estimates = []
    for update in range(40):
        step.step([problem.document] * 50, [(update, n) for n in range(50)])
        # the loss is a mean over decisions: one a line of each transcript
        estimates.append(-LINES * flat(p.main_grad for p in q.parameters()))
    assert max(float((p - b).abs().max()) for p, b in zip(q.parameters(), before, strict=True)) < 1e-15
    samples = torch.stack(estimates)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4, samples.shape[1], generator=generator, dtype=torch.float64)
    directions = torch.cat([problem.exact[None], directions])
    along = samples @ directions.T
    error = along.std(0) / len(samples) ** 0.5
    expected = directions @ problem.exact
    deviations = (along.mean(0) - expected) / error
    assert float(deviations.abs().max()) < 4
    assert float(expected[0] / error[0]) > 6, "the exact gradient stands out of the noise"
