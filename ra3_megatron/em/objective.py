"""The equations of RA3 (arXiv 2509.25810) as pure functions on tensors. No model, no tokens, no process groups.

Notation: a_t the expert's line, s_t everything before it, z_t its latent; G transcripts of one document, T lines.

    J(pi, q)  = E_{z~q} sum_t [ log pi(a_t | s_t, z_t) - KL(q(z_t | s_t, z_{t-1}) || p(z_t | s_t, z_{t-1})) ]
    prior     p = alpha * delta(z_{t-1}) + (1 - alpha) * Uniform
    KL        = rho * c - H(q) - log abar          with abar = alpha + (1 - alpha) / K, rho = q(new thought),
    price     c = log(abar / (1 - abar)) + log(K - 1)

so the prior amounts to a price c per new thought and an entropy bonus on q.
"""

from typing import Literal

import torch
from torch import Tensor

Likelihood = Literal["mean", "sum"]
Baseline = Literal["group_mean", "leave_one_out", "no_thought", "none"]


def line_log_likelihood(log_probs: Tensor, lines: Tensor, num_lines: int, likelihood: Likelihood) -> Tensor:
    """log pi(a_t | s_t, z_t) of each line.

    log_probs: [n] of the scored tokens; lines: [n] the line of each; returns [num_lines], per token (`mean`) or summed.
    """
    total = torch.zeros(num_lines, dtype=log_probs.dtype).index_add_(0, lines, log_probs)
    if likelihood == "sum":
        return total
    count = torch.zeros(num_lines, dtype=log_probs.dtype).index_add_(0, lines, torch.ones_like(log_probs))
    return total / count.clamp_min(1)


def line_rewards(log_likelihood: Tensor, think: Tensor, malformed: Tensor, price: float, penalty: float) -> Tensor:
    """r_t = log pi(a_t | s_t, z_t) - c * 1[z_t is a new thought] - penalty * 1[its format is bad].

    log_likelihood [..., T]; think and malformed: bool [..., T]. With c = inf a line that thinks is worth -inf.
    """
    # where, not a product: inf * 0 is not 0
    charged = torch.where(think, log_likelihood - price, log_likelihood)
    return torch.where(malformed, charged - penalty, charged)


def truncated_returns(rewards: Tensor, horizon: int, discount: float) -> Tensor:
    """R_t = sum_{k < H} gamma^k r_{t+k}; lines behind the end count nothing. [..., T] -> [..., T]."""
    total = torch.zeros_like(rewards)
    steps = rewards.shape[-1]
    for k in range(min(horizon, steps)):
        total[..., : steps - k] += discount**k * rewards[..., k:]
    return total


def group_advantages(returns: Tensor, baseline: Baseline, no_thought: Tensor | None = None) -> Tensor:
    """A_t = R_t minus the baseline: what the other transcripts of the same document got at the same line, or what the
    document gets without any thought (`no_thought`, [T], as in RLP, arXiv 2510.01265). [G, T] -> [G, T].

    Over transcripts that got the same, both means give exactly 0: what rounding left would be all that `normalized`
    sees where q has stopped thinking.
    """
    if baseline == "none":
        return returns
    if baseline == "no_thought":
        if no_thought is None:
            raise ValueError("baseline=no_thought needs the returns of the document without thoughts")
        return returns - no_thought
    exact = returns.double()  # G times an fp32 number is one of fp64
    centered = (exact - exact.mean(0, keepdim=True)).to(returns.dtype)
    if baseline == "leave_one_out":
        size = returns.shape[0]
        return centered * (size / (size - 1))
    return centered


def best_of_group(returns: Tensor) -> Tensor:
    """Rejection sampling: weight 1 for the transcripts of a document whose return at a line is the greatest (shared by
    those that are equal), 0 for the others, so that q imitates the best ones. [G, T] -> [G, T]."""
    best = returns == returns.amax(0, keepdim=True)
    return best.to(returns.dtype) / best.sum(0, keepdim=True)


def normalized(advantages: Tensor, mask: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Advantages divided by their root mean square over `mask`: their standard deviation, where the baseline centers
    them (a mean over a group does; `no_thought` and `none` do not)."""
    scale = advantages[mask].square().mean().sqrt() if mask.any() else torch.ones(())
    return advantages / (scale + epsilon)


def prior_price(alpha: float, latents: int) -> float:
    """c(alpha) = log(abar / (1 - abar)) + log(K - 1), the price of a new thought among K latents; inf for alpha = 1."""
    abar = torch.tensor(alpha + (1 - alpha) / latents, dtype=torch.float64)
    return float(torch.log(abar) - torch.log1p(-abar) + torch.log(torch.tensor(latents - 1.0, dtype=torch.float64)))


def prior_kl(switch: Tensor, choice: Tensor, alpha: float) -> Tensor:
    """KL(q || p) in closed form: rho * c - H(q) - log abar.

    switch: rho = q(z_t != z_{t-1}), [...]; choice: q given a switch over the K - 1 other latents, [..., K - 1].
    H(q) is the entropy of the whole distribution over K latents.
    """
    latents = choice.shape[-1] + 1
    abar = alpha + (1 - alpha) / latents
    entropy = _entropy(torch.stack([1 - switch, switch], dim=-1)) + switch * _entropy(choice)
    # where, not a product: at alpha = 1 the price is infinite, and never switching costs nothing
    paid = torch.where(switch > 0, switch * prior_price(alpha, latents), 0.0)
    return paid - entropy - torch.log(torch.tensor(abar, dtype=switch.dtype))


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)
