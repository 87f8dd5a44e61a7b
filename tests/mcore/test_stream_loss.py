"""The loss by hand: both streams, clipping, truncated importance weights, entropy bonus, metrics."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ra3_megatron.mcore.batch import Events, Kind, TokenBatch
from ra3_megatron.mcore.loss import Counts, PolicyLoss, Stat, local_counts, stream_loss

RATIOS = [0.5, 0.9, 1.0, 1.3, 2.0]
ADVANTAGES = [1.0, -2.0]
COUNTS = Counts(ce=8.0, decisions=4.0)


def blank(rows: int, length: int) -> TokenBatch:
    """Tokens that nothing is asked of."""
    zeros = torch.zeros(rows, length, dtype=torch.long)
    return TokenBatch(ids=zeros, positions=zeros, segments=zeros, targets=zeros)


def choices(ratios: list[float], advantages: list[float]) -> tuple[TokenBatch, Tensor]:
    """A row of choices for every pair of ratio and advantage, and model outputs that give these ratios.

    The last column of each row is no choice, whatever its advantage says.
    """
    shape = (len(advantages), len(ratios) + 1)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[:, -1] = False
    decision = mask.clone()
    decision[:, 1::2] = False
    log_prob = torch.linspace(-3, -1, mask.numel()).view(shape)
    batch = replace(
        blank(*shape),
        choices=Events(mask),
        advantage=torch.tensor(advantages)[:, None].repeat(1, shape[1]),
        behaviour=log_prob - torch.tensor([*ratios, 7.0]).log(),
        decision=decision,
    )
    out = torch.stack([torch.full(shape, -50.0), log_prob, torch.full(shape, 0.7), torch.zeros(shape)])
    return batch, out.requires_grad_()


def gradient(batch: TokenBatch, out: Tensor, policy: PolicyLoss) -> tuple[float, Tensor, Tensor]:
    loss, stats = stream_loss(out, batch, COUNTS, policy)
    (grad,) = torch.autograd.grad(loss, out)
    return float(loss.detach()), grad, stats


def table(function: object) -> Tensor:
    """function(ratio, advantage) for every pair, [advantages, ratios]."""
    return torch.tensor([[function(r, a) for r in RATIOS] for a in ADVANTAGES])  # type: ignore[operator]


def test_on_policy_gradient_is_advantage_times_the_gradient_of_log_q() -> None:
    batch, out = choices(RATIOS, ADVANTAGES)
    loss, grad, stats = gradient(batch, out, PolicyLoss())
    torch.testing.assert_close(grad[1, :, :-1], table(lambda r, a: -a / 4))
    assert torch.equal(grad[1, :, -1], torch.zeros(2)) and not grad[0].any() and not grad[2].any()
    mask = batch.choices.mask if batch.choices else None
    assert mask is not None and batch.advantage is not None
    assert loss == pytest.approx(float(-(batch.advantage * out[1].detach())[mask].sum() / 4))
    assert stats[Stat.LOSS] == pytest.approx(loss)
    without = replace(batch, behaviour=None)
    assert torch.equal(gradient(without, out, PolicyLoss())[1], grad)


def test_ppo_clip() -> None:
    """min(r A, clip(r) A): no gradient once the ratio has moved far enough in the advantage's direction."""
    batch, out = choices(RATIOS, ADVANTAGES)
    loss, grad, stats = gradient(batch, out, PolicyLoss(clip_ratio=0.2))

    def stopped(r: float, a: float) -> bool:
        return (a > 0 and r > 1.2) or (a < 0 and r < 0.8)

    torch.testing.assert_close(grad[1, :, :-1], table(lambda r, a: 0.0 if stopped(r, a) else -a * r / 4))
    expected = table(lambda r, a: -min(r * a, min(max(r, 0.8), 1.2) * a) / 4)
    assert loss == pytest.approx(float(expected.sum()), rel=1e-5)
    assert stats[Stat.CLIPPED] == 3  # ratios 1.3 and 2.0 of the first row, 0.5 of the second


def test_importance_weights_are_truncated_and_carry_no_gradient() -> None:
    batch, out = choices(RATIOS, ADVANTAGES)
    _, plain, _ = gradient(batch, out, PolicyLoss())
    _, weighted, stats = gradient(batch, out, PolicyLoss(importance_cap=1.5))
    torch.testing.assert_close(weighted[1, :, :-1], plain[1, :, :-1] * table(lambda r, a: min(r, 1.5)))
    assert stats[Stat.TRUNCATED] == 2  # ratio 2.0 of both rows


def test_with_a_cap_the_clip_is_about_what_was_learned_since_and_the_weight_about_what_was_before() -> None:
    """q / q_old is clipped, q_old / q_behaviour is truncated."""
    batch, out = choices(RATIOS, ADVANTAGES)
    policy = PolicyLoss(clip_ratio=0.2, importance_cap=1.5)
    _, first, stats = gradient(batch, out, policy)
    torch.testing.assert_close(first[1, :, :-1], table(lambda r, a: -a * min(r, 1.5) / 4))
    assert stats[Stat.CLIPPED] == 0 and stats[Stat.TRUNCATED] == 2, "nothing was learned yet"
    for moved in (0.7, 1.1, 1.5):
        old = out[1].detach() - math.log(moved)
        _, later, stats = gradient(replace(batch, proximal=old), out, policy)

        def expected(r: float, a: float, moved: float = moved) -> float:
            stopped = (a > 0 and moved > 1.2) or (a < 0 and moved < 0.8)
            return 0.0 if stopped else -a * moved * min(r / moved, 1.5) / 4

        torch.testing.assert_close(later[1, :, :-1], table(expected))
        assert stats[Stat.CLIPPED] == (5 if moved != 1.1 else 0)


@pytest.mark.parametrize("policy", [PolicyLoss(importance_cap=1e3), PolicyLoss(0.9, 1e3), PolicyLoss(0.9)])
def test_the_mean_gradient_over_an_engines_samples_is_that_of_the_policy(policy: PolicyLoss) -> None:
    """By enumeration of six outcomes, which an engine samples a little differently."""
    logits = torch.linspace(-1, 1, 6, dtype=torch.float32).requires_grad_()
    behaviour = (logits.detach() + torch.tensor([0.1, -0.1, 0.05, 0.0, -0.05, 0.1])).log_softmax(0)
    earned = torch.tensor([1.0, -0.5, 2.0, 0.0, -1.0, 0.3])
    (exact,) = torch.autograd.grad((logits.softmax(0) * earned).sum(), logits)
    mask = torch.ones(1, 6, dtype=torch.bool)
    batch = replace(
        blank(1, 6),
        choices=Events(mask),
        advantage=(earned * behaviour.exp())[None],  # what each outcome adds to the mean
        behaviour=behaviour[None],
        decision=mask,
    )
    log_q = logits.log_softmax(0)[None]
    out = torch.stack([torch.zeros(1, 6), log_q, torch.zeros(1, 6), torch.zeros(1, 6)])
    loss, _ = stream_loss(out, batch, Counts(ce=0.0, decisions=1.0), policy)
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(-found, exact, atol=1e-6, rtol=1e-5)


def test_entropy_bonus_raises_the_entropy_of_choices() -> None:
    batch, out = choices(RATIOS, ADVANTAGES)
    weight = torch.full_like(out[0], 0.3).detach()
    loss, grad, _ = gradient(replace(batch, entropy_weight=weight), out, PolicyLoss())
    plain, plain_grad, _ = gradient(batch, out, PolicyLoss())
    assert torch.equal(grad[1], plain_grad[1])
    torch.testing.assert_close(grad[2, :, :-1], torch.full((2, 5), -0.3 / 4))
    assert torch.equal(grad[2, :, -1], torch.zeros(2))
    assert loss - plain == pytest.approx(-0.3 * 0.7 * 10 / 4, rel=1e-5)


def test_cross_entropy_stream_and_its_split_into_code_and_thoughts() -> None:
    batch = replace(
        blank(1, 6),
        ce_weight=torch.tensor([[1.0, 0.5, 0.5, 0.0, 1.0, 0.5]]),
        kind=torch.tensor([[Kind.CODE, Kind.THOUGHT, Kind.THOUGHT, Kind.THOUGHT, Kind.DECISION, Kind.FORCED]]),
    )
    out = torch.zeros(4, 1, 6)
    out[0, 0] = torch.tensor([-1.0, -2.0, -3.0, -100.0, -4.0, -6.0])
    out.requires_grad_()
    loss, grad, stats = gradient(batch, out, PolicyLoss())
    assert loss == pytest.approx((1 + 0.5 * 2 + 0.5 * 3 + 4 + 0.5 * 6) / 8)
    torch.testing.assert_close(grad[0, 0], torch.tensor([-1.0, -0.5, -0.5, 0.0, -1.0, -0.5]) / 8)
    found = [float(stats[s]) for s in (Stat.CODE_NLL, Stat.CODE_TOKENS, Stat.THOUGHT_NLL, Stat.THOUGHT_TOKENS)]
    assert found == [1, 1, 5, 2]
    assert [float(stats[s]) for s in (Stat.DECISION_NLL, Stat.DECISION_TOKENS)] == [4, 1]


def test_statistics_of_choices() -> None:
    batch, out = choices(RATIOS, ADVANTAGES)
    _, _, stats = gradient(batch, out, PolicyLoss())
    assert stats[Stat.CHOICES] == 10 and stats[Stat.DECISIONS] == 6
    assert stats[Stat.MISMATCH] == pytest.approx(2 * sum(abs(r - 1) for r in RATIOS), rel=1e-4)
    assert stats[Stat.CHOICE_ENTROPY] == pytest.approx(7.0) and stats[Stat.DECISION_ENTROPY] == pytest.approx(4.2)


def test_ratios_outside_choices_are_harmless() -> None:
    """Positions that are no choice hold 0 in the model's output and may hold anything in the batch."""
    batch, out = choices(RATIOS, ADVANTAGES)
    assert batch.behaviour is not None and batch.advantage is not None
    batch.behaviour[:, -1], batch.advantage[:, -1] = -math.inf, 1e30
    for policy in (PolicyLoss(), PolicyLoss(0.2), PolicyLoss(importance_cap=2.0), PolicyLoss(0.2, 2.0)):
        loss, grad, stats = gradient(batch, out, policy)
        assert math.isfinite(loss) and bool(stats.isfinite().all())
        assert torch.equal(grad[1, :, -1], torch.zeros(2))


def test_counts_are_the_weights_and_the_decisions() -> None:
    batch, _ = choices(RATIOS, ADVANTAGES)
    counted = local_counts([replace(batch, ce_weight=torch.full((2, 6), 0.25)), replace(batch, decision=None)])
    assert counted.tolist() == [3.0, 6.0]


def test_a_batch_without_weights_has_no_loss() -> None:
    batch, out = choices(RATIOS, ADVANTAGES)
    assert batch.choices is not None and batch.decision is not None
    nothing = replace(
        batch,
        ce_weight=torch.zeros(2, 6),
        choices=Events(torch.zeros(2, 6, dtype=torch.bool)),
        decision=torch.zeros_like(batch.decision),
    )
    loss, stats = stream_loss(out, nothing, Counts(ce=0.0, decisions=0.0), PolicyLoss(clip_ratio=0.2))
    assert float(loss.detach()) == 0 and bool(stats.isfinite().all())
