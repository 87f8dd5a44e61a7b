"""Exact solutions with option models: evaluation, policy iteration, value iteration.

All functions take stacked models: leading dimensions [...] of reward and kernel carry over to the result.
"""

import math

import numpy as np

from ra3_megatron.theory.mdp import Array
from ra3_megatron.theory.options import OptionModel

_TIES = 1e-12
"""Relative gain below which policy iteration keeps an action, so that rounding cannot make it cycle."""


def under_policy(model: OptionModel, policy: Array) -> tuple[Array, Array]:
    """R_pi, [..., S], and M_pi, [..., S, S], of a policy over abstractions, [..., S, Z]."""
    reward: Array = (policy * model.reward).sum(-1)
    kernel: Array = np.einsum("...sz,...szt->...st", policy, model.kernel)
    return reward, kernel


def policy_value(model: OptionModel, policy: Array) -> Array:
    """V^pi = (I - M_pi)^-1 R_pi, [..., S]."""
    reward, kernel = under_policy(model, policy)
    solution = np.linalg.solve(np.eye(kernel.shape[-1]) - kernel, reward[..., None])
    return solution[..., 0].astype(np.float64, copy=False)


def action_values(model: OptionModel, values: Array) -> Array:
    """Q(s, z) = R(s, z) + sum_s' M(s' | s, z) V(s'), [..., S, Z]."""
    return model.reward + np.einsum("...szt,...t->...sz", model.kernel, values)


def policy_iteration(model: OptionModel, policy: Array | None = None) -> tuple[Array, list[Array]]:
    """Howard's policy iteration from `policy` (uniform): the optimal policy, and the value of each policy on the way.

    The last value is V*. Values rise from entry to entry; stacked models run until the last of them is solved.
    """
    size = model.reward.shape[-1]
    policy = np.full(model.reward.shape, 1 / size) if policy is None else policy
    values: list[Array] = []
    while True:
        values.append(policy_value(model, policy))
        q = action_values(model, values[-1])
        greedy = np.eye(size)[q.argmax(-1)]
        gain = q.max(-1) - (policy * q).sum(-1)
        better = gain > _TIES * (1 + np.abs(q).max())
        if not better.any():
            return policy, values
        policy = np.where(better[..., None], greedy, policy)


def optimal_values(model: OptionModel) -> Array:
    """V*, [..., S]."""
    return policy_iteration(model)[1][-1]


def value_iteration(model: OptionModel, iterations: int) -> list[Array]:
    """V_0 = 0, V_{n+1} = max_z R + M V_n: the first `iterations` + 1 of them."""
    values = [np.zeros(model.reward.shape[:-1])]
    for _ in range(iterations):
        values.append(action_values(model, values[-1]).max(-1))
    return values


def iteration_bound(gbar: float, largest_reward: float, tolerance: float) -> float:
    """N >= log(R_max / (eps (1 - gbar))) / (1 - gbar), the paper's sufficient number of iterations.

    Since ||V_n - V*|| <= gbar^n ||V*||, ||V*|| <= R_max / (1 - gbar) and gbar <= exp(-(1 - gbar)), it holds for value
    iteration from 0 in the sup norm.
    """
    return max(0.0, math.log(largest_reward / (tolerance * (1 - gbar))) / (1 - gbar))
