"""J(pi, q) never exceeds the log-likelihood, and reaches it at the posterior (method.md, invariant 5).

The toy: T lines, K latents, a start latent, the prior of the method, and likelihoods log pi(a_t | z_0 … z_t) from a
table that depends on the whole history of latents. All K^T histories are enumerated.
"""

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ra3_megatron.em.objective import line_rewards, prior_kl, prior_price, truncated_returns

LATENTS, LINES, START = 3, 3, 0
Table = dict[tuple[int, ...], Tensor]
"""History of latents -> [LATENTS] values for the next one."""


def table(generator: torch.Generator, scale: float) -> Table:
    histories = [h for t in range(LINES) for h in product(range(LATENTS), repeat=t)]
    return {h: scale * torch.randn(LATENTS, generator=generator, dtype=torch.float64) for h in histories}


def prior(alpha: float, previous: int) -> Tensor:
    p = torch.full((LATENTS,), (1 - alpha) / LATENTS, dtype=torch.float64)
    p[previous] += alpha
    return p


def log_likelihood(log_pi: Table, alpha: float, history: tuple[int, ...] = ()) -> Tensor:
    """log sum over latents of the joint probability of the remaining lines."""
    if len(history) == LINES:
        return torch.zeros((), dtype=torch.float64)
    step = prior(alpha, (START, *history)[-1]).log() + log_pi[history]
    rest = torch.stack([log_likelihood(log_pi, alpha, (*history, z)) for z in range(LATENTS)])
    return (step + rest).logsumexp(-1)


def posterior(log_pi: Table, alpha: float) -> Table:
    """q(z_t | z_0 … z_{t-1}) given all lines."""
    found = {}
    for history, values in log_pi.items():
        rest = torch.stack([log_likelihood(log_pi, alpha, (*history, z)) for z in range(LATENTS)])
        found[history] = (prior(alpha, (START, *history)[-1]).log() + values + rest).softmax(-1)
    return found


def objective_value(log_pi: Table, q: Table, alpha: float) -> float:
    """J(pi, q) by its definition, with the closed form of the KL."""
    total = 0.0
    for latents in product(range(LATENTS), repeat=LINES):
        probability, value = 1.0, 0.0
        for t, z in enumerate(latents):
            history, previous = latents[:t], (START, *latents)[t]
            switch = 1 - q[history][previous]
            others = q[history][[k for k in range(LATENTS) if k != previous]]
            value += float(log_pi[history][z] - prior_kl(switch, others / others.sum(), alpha))
            probability *= float(q[history][z])
        total += probability * value
    return total


@given(st.integers(0, 10_000), st.floats(0.0, 0.95), st.floats(0.1, 4.0))
def test_the_bound_holds_and_is_tight_at_the_posterior(seed: int, alpha: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_pi = {h: values.log_softmax(-1) for h, values in table(generator, scale).items()}
    q = {h: values.softmax(-1) for h, values in table(generator, scale).items()}
    exact = float(log_likelihood(log_pi, alpha))
    assert objective_value(log_pi, q, alpha) <= exact + 1e-9
    best = posterior(log_pi, alpha)
    assert objective_value(log_pi, best, alpha) == pytest.approx(exact, abs=1e-9)
    nearby = {h: 0.9 * values + 0.1 / LATENTS for h, values in best.items()}
    assert objective_value(log_pi, nearby, alpha) < exact


@given(st.integers(0, 10_000), st.floats(0.05, 0.95))
def test_rewards_at_the_price_of_the_prior_add_up_to_the_objective(seed: int, alpha: float) -> None:
    """E_q[sum_t r_t] + E_q[sum_t H(q_t)] + T log abar = J: what the E-step maximises is the bound."""
    generator = torch.Generator().manual_seed(seed)
    log_pi, q = table(generator, 1.0), {h: v.softmax(-1) for h, v in table(generator, 1.0).items()}
    price, abar = prior_price(alpha, LATENTS), alpha + (1 - alpha) / LATENTS
    total = 0.0
    for latents in product(range(LATENTS), repeat=LINES):
        likelihood = torch.stack([log_pi[latents[:t]][z] for t, z in enumerate(latents)])
        think = torch.tensor([z != previous for z, previous in zip(latents, (START, *latents), strict=False)])
        rewards = line_rewards(likelihood, think, torch.zeros(LINES, dtype=torch.bool), price, 0.0)
        chosen = [q[latents[:t]] for t in range(LINES)]
        entropy = -sum(float((p * p.log()).sum()) for p in chosen)
        probability = math.prod(float(p[z]) for p, z in zip(chosen, latents, strict=True))
        whole = float(truncated_returns(rewards, LINES, 1.0)[0])
        total += probability * (whole + entropy + LINES * math.log(abar))
    assert total == pytest.approx(objective_value(log_pi, q, alpha), abs=1e-9)
