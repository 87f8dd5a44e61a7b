"""Regret = pruning error + RL error, checked as an identity on random MDPs with random abstractions.

For a set Z of abstractions, a subset Zhat of it and a policy pi on Zhat (arXiv 2509.25810, the decomposition behind its
two theorems), in every state:

    V*_Z - V^pi  =  (V*_Z - V*_Zhat)  +  (V*_Zhat - V^pi)
      regret          pruning error        RL error

As differences of values this cannot fail, so the three are computed by separate routes. The regret is the difference of
two values; each error is a sum of advantages along the trajectories of its policy (Kakade and Langford 2002):

    pruning error = (I - M_phat)^-1 (V*_Z    - Q*_Z(·, phat)),    phat optimal on Zhat
    RL error      = (I - M_pi)^-1   (V*_Zhat - Q*_Zhat(·, pi))

They agree only if multi-step models, optimal values, subsets and evaluation are all right.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ra3_megatron.theory.findings import Done, Study, nothing, verdict
from ra3_megatron.theory.mdp import Array, random_mdp
from ra3_megatron.theory.options import OptionModel, option_model, primitive_options, random_options
from ra3_megatron.theory.planning import action_values, optimal_values, policy_iteration, policy_value, under_policy
from ra3_megatron.theory.policy_gradient import policy_gradient, softmax

STATES, ACTIONS, BRANCHING, DISCOUNT = 12, 3, 3, 0.95
ABSTRACTIONS = 10
POLICIES = 3
"""Random policies for each subset."""
UPDATES = 10
"""Natural-gradient updates of the policy whose errors are drawn: a fixed budget of RL."""
_STEP = 0.1
_EXACT = 1e-10


@dataclass(frozen=True)
class Errors:
    """Regret of a policy and its two parts in every state, [S]."""

    regret: Array
    pruning: Array
    rl: Array

    @property
    def residual(self) -> float:
        """max_s |regret - pruning - rl|."""
        return float(np.abs(self.regret - self.pruning - self.rl).max())


def decompose(model: OptionModel, kept: Sequence[int], policy: Array) -> Errors:
    """The three errors of `policy`, [S, |kept|], on the abstractions `kept` of `model`."""
    pruned = model.subset(kept)
    best_policy, values = policy_iteration(pruned)
    best, best_pruned = optimal_values(model), values[-1]
    extended = np.zeros_like(model.reward)
    extended[:, kept] = best_policy
    return Errors(
        regret=best - policy_value(pruned, policy),
        pruning=_advantage_sum(model, extended, best),
        rl=_advantage_sum(pruned, policy, best_pruned),
    )


def _advantage_sum(model: OptionModel, policy: Array, best: Array) -> Array:
    """(I - M_pi)^-1 (V* - Q*(·, pi)), [S]."""
    loss = best - (policy * action_values(model, best)).sum(-1)
    kernel = under_policy(model, policy)[1]
    return np.linalg.solve(np.eye(len(best)) - kernel, loss)


def study(seed: int, mdps: int, done: Done = nothing) -> Study:
    """The identity for random subsets of every size with random policies, and both errors after a fixed budget of RL.

    One unit an MDP.
    """
    rng = np.random.default_rng([seed, 2])
    residuals: list[float] = []
    lowest = np.inf
    shares = np.zeros((mdps, ABSTRACTIONS, 2))  # pruning and RL error, mean over states, of max V*
    for index in range(mdps):
        mdp = random_mdp(rng, STATES, ACTIONS, BRANCHING, DISCOUNT)
        options = primitive_options(mdp) + random_options(rng, mdp, ABSTRACTIONS - ACTIONS)
        model = option_model(mdp, options)
        scale = optimal_values(model).max()
        for size in range(1, ABSTRACTIONS + 1):
            kept = rng.choice(ABSTRACTIONS, size, replace=False).tolist()
            for policy in rng.dirichlet(np.full(size, 0.5), (POLICIES, STATES)):
                errors = decompose(model, kept, policy)
                residuals.append(errors.residual)
                lowest = min(lowest, errors.pruning.min(), errors.rl.min())
            errors = decompose(model, kept, _after_updates(model.subset(kept)))
            residuals.append(errors.residual)
            shares[index, size - 1] = errors.pruning.mean() / scale, errors.rl.mean() / scale
        done()
    largest = max(residuals)
    numbers = {
        "checked": len(residuals),
        "largest_residual": largest,
        "smallest_error": float(lowest),
        "residuals": residuals,
        "sizes": list(range(1, ABSTRACTIONS + 1)),
        "pruning_error": shares[..., 0].mean(0).tolist(),
        "rl_error": shares[..., 1].mean(0).tolist(),
        "updates": UPDATES,
    }
    evidence = f"largest residual {largest:.1e}: {len(residuals)} policies, {mdps} MDPs; no error below {lowest:.0e}"
    claim = "regret = pruning error + RL error"
    return Study("Regret is pruning error plus RL error", numbers, [verdict(claim, largest < _EXACT, evidence)])


def _after_updates(model: OptionModel) -> Array:
    """The policy after a fixed number of natural-gradient updates from uniform."""
    theta = np.zeros(model.reward.shape)
    start = np.full(len(theta), 1 / len(theta))
    for _ in range(UPDATES):
        theta = theta + _STEP * policy_gradient(model, theta, start, natural=True)[0]
    return softmax(theta)
