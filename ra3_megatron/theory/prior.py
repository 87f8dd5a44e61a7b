"""The prior over latents as a price and an entropy bonus, by brute force over finite sets of latents.

    p = alpha * delta(z_{t-1}) + (1 - alpha) * Uniform over K latents                      (arXiv 2509.25810)
    KL(q || p) = rho * c - H(q) - log abar,   abar = alpha + (1 - alpha) / K,   rho = q(z_t != z_{t-1})
    c = log(abar / (1 - abar)) + log(K - 1)

The left side is a sum over all K latents here. Nothing is shared with the implementation that trains.
"""

import numpy as np

from ra3_megatron.theory.findings import Done, Study, nothing, verdict
from ra3_megatron.theory.mdp import Array

LATENTS = (2, 8, 64, 1024, 32768)
PUBLISHED_PRICES = (0.01, 0.03, 0.05, 0.2)
"""Prices that the paper sweeps over; 0.05 is its default."""
_EXACT = 1e-10


def prior(alpha: float, latents: int, previous: int) -> Array:
    """p(z_t | z_{t-1} = previous), [K]."""
    probabilities = np.full(latents, (1 - alpha) / latents)
    probabilities[previous] += alpha
    return probabilities


def kl_by_sum(q: Array, p: Array) -> float:
    """sum_z q(z) log(q(z) / p(z)), with 0 log 0 = 0."""
    inside = q > 0
    return float((q[inside] * (np.log(q[inside]) - np.log(p[inside]))).sum())


def kl_by_price(q: Array, alpha: float, previous: int) -> float:
    """rho * c - H(q) - log abar."""
    inside = q > 0
    entropy = -float((q[inside] * np.log(q[inside])).sum())
    switch = float(np.delete(q, previous).sum())
    stay = alpha + (1 - alpha) / len(q)
    return switch * price(alpha, len(q)) - entropy - float(np.log(stay))


def price(alpha: float, latents: int) -> float:
    """c(alpha): log of how much likelier the latent in force is than any one other."""
    return float(np.log(alpha + (1 - alpha) / latents) - np.log((1 - alpha) / latents))


def alpha_of_price(c: float, latents: int) -> float:
    """The alpha at which a new thought costs c: (e^c - 1) / (e^c - 1 + K)."""
    return float(np.expm1(c) / (np.expm1(c) + latents))


def study(seed: int, draws: int, done: Done = nothing) -> Study:
    """Both sides for `draws` random (q, alpha, previous latent) of each K, and the curves c(alpha). One unit a K."""
    rng = np.random.default_rng([seed, 5])
    largest = 0.0
    for latents in LATENTS:
        for _ in range(draws):
            alpha, previous = float(rng.uniform(0, 0.999)), int(rng.integers(latents))
            q = rng.dirichlet(np.full(latents, rng.choice([0.05, 1.0, 20.0])))
            left, right = kl_by_sum(q, prior(alpha, latents, previous)), kl_by_price(q, alpha, previous)
            largest = max(largest, abs(left - right) / (1 + abs(left)))
        done()
    odds = np.logspace(-7, 6, 105)
    alphas = np.union1d(np.linspace(0, 0.99, 100), odds / (1 + odds))
    numbers = {
        "draws": draws * len(LATENTS),
        "largest_difference": largest,
        "alpha": alphas.tolist(),
        "price": {str(latents): [price(float(a), latents) for a in alphas] for latents in LATENTS},
        "alpha_of_published_price": {
            str(latents): {str(c): alpha_of_price(c, latents) for c in PUBLISHED_PRICES} for latents in LATENTS
        },
    }
    claim = "KL(q||p) = rho c - H(q) - log abar"
    evidence = f"largest relative difference {largest:.1e} over {numbers['draws']} random q"
    return Study("The prior is a price for each new thought", numbers, [verdict(claim, largest < _EXACT, evidence)])
