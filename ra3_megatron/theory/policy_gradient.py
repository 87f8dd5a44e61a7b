"""Exact policy gradients of a softmax policy over abstractions: plain and natural.

J(theta) = mu^T V^pi, pi(z | s) = softmax(theta(s, ·)). With d = mu^T (I - M_pi)^-1, the discounted number of decisions
in each state,

    dJ / dtheta(s, z) = d(s) pi(z | s) A^pi(s, z)          (Sutton et al. 2000, for the multi-step model)
    natural gradient  = A^pi(s, z)                         (Kakade 2001; Agarwal et al. 2021, lemma 15, up to scale)

No sampling: values, occupancies and gradients are solved for.
"""

from dataclasses import dataclass

import numpy as np

from ra3_megatron.theory.mdp import Array
from ra3_megatron.theory.options import OptionModel
from ra3_megatron.theory.planning import action_values, under_policy


@dataclass(frozen=True)
class Ascent:
    """A step rule: theta += eta_n * gradient, eta_n = step * growth^-n.

    step, growth: one number each, or one a stacked model, [B]. natural: the natural gradient.
    """

    step: Array | float
    natural: bool = False
    growth: Array | float = 1.0


def softmax(theta: Array) -> Array:
    """Softmax over the last dimension."""
    shifted = np.exp(theta - theta.max(-1, keepdims=True))
    policy: Array = shifted / shifted.sum(-1, keepdims=True)
    return policy


def objective(model: OptionModel, theta: Array, start: Array) -> Array:
    """J(theta), [...], for the start distribution mu, [S]."""
    reward, kernel = under_policy(model, softmax(theta))
    return np.linalg.solve(np.eye(kernel.shape[-1]) - kernel, reward[..., None])[..., 0] @ start


def policy_gradient(model: OptionModel, theta: Array, start: Array, natural: bool = False) -> tuple[Array, Array]:
    """The gradient at theta, [..., S, Z], and V^pi, [..., S]."""
    policy = softmax(theta)
    reward, kernel = under_policy(model, policy)
    inverse = np.linalg.inv(np.eye(kernel.shape[-1]) - kernel)
    values = np.einsum("...st,...t->...s", inverse, reward)
    advantage = action_values(model, values) - values[..., None]
    if natural:
        return advantage, values
    occupancy = np.einsum("s,...st->...t", start, inverse)
    return occupancy[..., None] * policy * advantage, values


def iterations_to_reach(model: OptionModel, best: Array, tolerance: Array, ascent: Ascent, limit: int) -> Array:
    """Updates from the uniform policy until max_s V*(s) - V^pi(s) <= eps, for each of B stacked models, [B].

    best: V*, [B, S]; tolerance: eps, [B]. mu is uniform. inf where `limit` updates are not enough.
    """
    batch, states, _ = model.reward.shape
    start = np.full(states, 1 / states)
    reached = np.full(batch, np.inf)
    running = np.arange(batch)
    theta = np.zeros(model.reward.shape)
    step, growth = np.broadcast_to(ascent.step, batch), np.broadcast_to(ascent.growth, batch)
    for update in range(limit + 1):
        gradient, values = policy_gradient(model, theta, start, ascent.natural)
        done = (best[running] - values).max(-1) <= tolerance[running]
        reached[running[done]] = update
        running, theta, gradient = running[~done], theta[~done], gradient[~done]
        if not running.size:
            break
        if done.any():
            model = OptionModel(model.reward[~done], model.kernel[~done])
        with np.errstate(over="ignore"):
            rate = step[running] * growth[running] ** float(-update)
        theta = theta + np.minimum(rate, 1e12)[:, None, None] * gradient
        theta -= theta.max(-1, keepdims=True)
    return reached
