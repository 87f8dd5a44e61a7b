"""The price of a new thought: brute force in the theory room against the functions that training uses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ra3_megatron.em.objective import prior_kl, prior_price
from ra3_megatron.theory import prior


@pytest.mark.parametrize("latents", [2, 3, 17])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.99])
def test_brute_force_agrees_with_the_objective(latents: int, alpha: float) -> None:
    rng = np.random.default_rng(latents)
    for _ in range(20):
        previous = int(rng.integers(latents))
        q = rng.dirichlet(np.full(latents, 0.3))
        switch = 1 - q[previous]
        choice = np.delete(q, previous) / switch
        closed = float(prior_kl(torch.tensor(switch), torch.tensor(choice), alpha))
        assert prior.kl_by_sum(q, prior.prior(alpha, latents, previous)) == pytest.approx(closed, abs=1e-10)
        assert prior.kl_by_price(q, alpha, previous) == pytest.approx(closed, abs=1e-10)
    assert prior.price(alpha, latents) == pytest.approx(prior_price(alpha, latents), abs=1e-10)


def test_the_prior_is_a_distribution_that_favours_the_latent_in_force() -> None:
    p = prior.prior(0.4, 5, 2)
    assert p.sum() == pytest.approx(1)
    assert p[2] == pytest.approx(0.4 + 0.6 / 5)
    assert np.delete(p, 2) == pytest.approx(0.12)


def test_the_price_rises_from_zero_without_end() -> None:
    prices = [prior.price(alpha, 8) for alpha in (0.0, 0.1, 0.5, 0.9, 1 - 1e-9)]
    assert prices[0] == pytest.approx(0)
    assert prices == sorted(prices)
    assert prices[-1] > 20


@pytest.mark.parametrize("latents", prior.LATENTS)
def test_alpha_of_a_price_is_the_inverse(latents: int) -> None:
    for c in (0.01, 0.05, 3.0):
        assert prior.price(prior.alpha_of_price(c, latents), latents) == pytest.approx(c, rel=1e-6)


def test_the_study_confirms_the_identity_and_a_wrong_price_would_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prior.study(seed=0, draws=5).verdicts[0].outcome == "confirmed"
    exact = prior.price
    monkeypatch.setattr(prior, "price", lambda alpha, latents: exact(alpha, latents) + 1e-6)
    assert prior.study(seed=0, draws=5).verdicts[0].outcome == "refuted"
