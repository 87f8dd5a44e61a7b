"""The equations of objective.py against loops, brute force and numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ra3_megatron.em.objective import (
    Baseline,
    best_of_group,
    group_advantages,
    line_log_likelihood,
    line_rewards,
    normalized,
    prior_kl,
    prior_price,
    truncated_returns,
)

INF = float("inf")


def tensors(*shape: int, low: float = -5, high: float = 5) -> st.SearchStrategy[Tensor]:
    size = math.prod(shape)
    values = st.lists(st.floats(low, high, width=32), min_size=size, max_size=size)
    return values.map(lambda v: torch.tensor(v, dtype=torch.float64).view(shape))


def test_line_log_likelihood() -> None:
    log_probs = torch.tensor([-1.0, -3.0, -0.5, -2.0, -4.0, -6.0])
    lines = torch.tensor([0, 0, 1, 3, 3, 3])
    assert line_log_likelihood(log_probs, lines, 4, "sum").tolist() == [-4.0, -0.5, 0.0, -12.0]
    assert line_log_likelihood(log_probs, lines, 4, "mean").tolist() == [-2.0, -0.5, 0.0, -4.0]


def test_line_rewards() -> None:
    likelihood = torch.tensor([[-1.0, -2.0, -3.0], [-1.5, -2.5, -3.5]])
    think = torch.tensor([[False, True, True], [False, False, True]])
    malformed = torch.tensor([[False, False, True], [False, False, False]])
    rewards = line_rewards(likelihood, think, malformed, price=0.25, penalty=0.5)
    assert rewards.tolist() == [[-1.0, -2.25, -3.75], [-1.5, -2.5, -3.75]]


def test_an_infinite_price_leaves_lines_without_a_thought_alone() -> None:
    likelihood = torch.tensor([-1.0, -2.0])
    nothing = torch.tensor([False, False])
    assert line_rewards(likelihood, nothing, nothing, INF, 0.0).tolist() == [-1.0, -2.0]
    rewards = line_rewards(likelihood, torch.tensor([False, True]), nothing, INF, 0.0)
    assert rewards.tolist() == [-1.0, -INF]


@given(tensors(3, 6), st.integers(1, 9), st.floats(0, 1))
def test_truncated_returns_are_the_sum_over_the_horizon(rewards: Tensor, horizon: int, discount: float) -> None:
    found = truncated_returns(rewards, horizon, discount)
    for row in range(3):
        for t in range(6):
            expected = sum(discount**k * float(rewards[row, t + k]) for k in range(horizon) if t + k < 6)
            assert float(found[row, t]) == pytest.approx(expected, abs=1e-9)


def test_returns_by_hand() -> None:
    assert truncated_returns(torch.tensor([1.0, 2.0, 4.0]), 2, 0.5).tolist() == [2.0, 4.0, 4.0]
    assert truncated_returns(torch.tensor([1.0, 2.0, 4.0]), 1, 0.5).tolist() == [1.0, 2.0, 4.0]
    assert truncated_returns(torch.tensor([1.0, 2.0, 4.0]), 99, 1.0).tolist() == [7.0, 6.0, 4.0]


@given(tensors(4, 3))
def test_baselines(returns: Tensor) -> None:
    assert group_advantages(returns, "none") is returns
    centered, apart = group_advantages(returns, "group_mean"), group_advantages(returns, "leave_one_out")
    for g in range(4):
        others = returns[[h for h in range(4) if h != g]]
        torch.testing.assert_close(centered[g], returns[g] - returns.mean(0))
        torch.testing.assert_close(apart[g], returns[g] - others.mean(0))


@given(tensors(4, 3))
def test_rlp_and_the_group_mean_differ_by_a_constant_of_document_and_line(returns: Tensor) -> None:
    """So behind a group baseline the no-thought likelihood changes nothing: it is a baseline itself."""
    without = torch.tensor([0.5, -1.0, 2.0], dtype=returns.dtype)
    difference = group_advantages(returns, "no_thought", without) - group_advantages(returns, "group_mean")
    torch.testing.assert_close(difference, (returns.mean(0) - without).expand(4, 3))
    with pytest.raises(ValueError, match="without thoughts"):
        group_advantages(returns, "no_thought")


def test_best_of_group_shares_weight_1_among_the_best() -> None:
    returns = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0], [2.0, -1.0, 0.0], [3.0, 2.0, 0.0]])
    third = 1 / 3
    expected = [[0.0, third, 0.25], [0.5, third, 0.25], [0.0, 0.0, 0.25], [0.5, third, 0.25]]
    torch.testing.assert_close(best_of_group(returns), torch.tensor(expected))


def test_leave_one_out_is_a_baseline_of_the_others_alone() -> None:
    """What makes it unbiased: a transcript's own return enters its advantage with weight 1, and nothing else of it."""
    returns = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for baseline, own in (("leave_one_out", 1.0), ("group_mean", 0.8), ("none", 1.0)):
        (gradient,) = torch.autograd.grad(group_advantages(returns, baseline)[2].sum(), returns)  # type: ignore[arg-type]
        torch.testing.assert_close(gradient[2], torch.full((2,), own, dtype=torch.float64))


def test_normalized() -> None:
    advantages = torch.tensor([3.0, -4.0, 100.0])
    mask = torch.tensor([True, True, False])
    torch.testing.assert_close(normalized(advantages, mask), advantages / math.sqrt(12.5))
    assert normalized(torch.zeros(3), mask).tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(normalized(advantages, torch.zeros(3, dtype=torch.bool)), advantages)


# -- the prior (method.md, invariant 2) ---------------------------------------------------------------------------


@given(st.integers(2, 9), st.floats(-50, 50, width=32), st.sampled_from(["group_mean", "leave_one_out"]))
def test_transcripts_that_got_the_same_have_no_advantage(group: int, value: float, baseline: Baseline) -> None:
    advantages = group_advantages(torch.full((group, 1), value), baseline)
    assert advantages.dtype == torch.float32 and (advantages == 0).all()
    assert (normalized(advantages, torch.ones(group, 1, dtype=torch.bool)) == 0).all()


@given(tensors(5, low=-4, high=4), st.integers(2, 5), st.floats(0.0, 0.999))
def test_the_closed_form_of_the_kl_is_brute_force(logits: Tensor, latents: int, alpha: float) -> None:
    q = logits[:latents].softmax(-1)  # latent 0 is the one in force
    p = torch.full((latents,), (1 - alpha) / latents, dtype=torch.float64)
    p[0] += alpha
    brute = (q * (q / p).log()).sum()
    found = prior_kl(1 - q[0], q[1:] / q[1:].sum(), alpha)
    torch.testing.assert_close(found, brute, atol=1e-9, rtol=1e-9)


@given(tensors(4, low=-4, high=4), st.floats(0.0, 0.999))
def test_the_price_is_what_the_kl_charges_for_a_switch(logits: Tensor, alpha: float) -> None:
    """KL + H(q) is linear in rho, and its slope is c."""
    q = logits.softmax(-1)
    rho, choice = 1 - q[0], q[1:] / q[1:].sum()
    entropy = -(q * q.log()).sum()
    abar = alpha + (1 - alpha) / 4
    expected = rho * prior_price(alpha, 4) - math.log(abar)
    torch.testing.assert_close(prior_kl(rho, choice, alpha) + entropy, expected, atol=1e-9, rtol=1e-9)


def test_the_price_is_the_log_ratio_of_staying_and_one_other_latent() -> None:
    for alpha, latents in ((0.0, 2), (0.3, 5), (0.9, 100)):
        stay = alpha + (1 - alpha) / latents
        other = (1 - alpha) / latents
        assert prior_price(alpha, latents) == pytest.approx(math.log(stay / other), abs=1e-12)
    assert prior_price(0.0, 7) == pytest.approx(0.0, abs=1e-12)


def test_as_alpha_goes_to_one_thinking_gets_infinitely_dear_and_not_thinking_free() -> None:
    prices = [prior_price(1 - 10.0**-k, 10) for k in range(1, 12)]
    assert prices == sorted(prices) and prices[-1] > 20
    assert prior_price(1.0, 10) == INF
    choice = torch.full((9,), 1 / 9, dtype=torch.float64)
    never, seldom = torch.tensor([0.0, 0.01], dtype=torch.float64)
    assert float(prior_kl(never, choice, 1 - 1e-9)) == pytest.approx(0.0, abs=1e-8)
    assert float(prior_kl(never, choice, 1.0)) == 0.0
    assert float(prior_kl(seldom, choice, 1.0)) == INF
