"""Action abstractions: temporally extended actions (options) and their exact multi-step models.

Sutton, Precup and Singh (1999). An abstraction z, started in s, runs for tau >= 1 primitive steps and ends in s_tau:

    R(s, z)      = E[sum_{t < tau} gamma^t r_t | s, z]
    M(s' | s, z) = E[gamma^tau 1(s_tau = s') | s, z],     whose rows sum to E[gamma^tau | s, z] <= gamma
    gbar         = sup_{s, z} E[gamma^tau | s, z]          (arXiv 2509.25810)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ra3_megatron.theory.mdp import MDP, Array


@dataclass(frozen=True)
class Option:
    """One abstraction: how it acts and when it ends. It may start in every state.

    policies: [L, S, A], pi_z(a | s) of the first, second, … step; the last entry stays in force.
    termination: [S], the probability of ending on arrival in a state.
    length: the most primitive steps it runs (None: until it terminates by chance).
    """

    policies: Array
    termination: Array
    length: int | None = None

    def __post_init__(self) -> None:
        if self.length is None and not (self.termination > 0).all():
            raise ValueError("an option without a length must be able to end in every state")
        if self.length is not None and self.length < 1:
            raise ValueError(f"length {self.length}: an option runs for at least one step")


@dataclass(frozen=True)
class OptionModel:
    """The multi-step model of a set of abstractions; leading dimensions [...] stack models.

    reward: R(s, z), [..., S, Z]. kernel: M(s' | s, z), [..., S, Z, S].
    """

    reward: Array
    kernel: Array

    @property
    def gbar(self) -> float:
        """sup_{s, z} E[gamma^tau | s, z]."""
        return float(self.kernel.sum(-1).max())

    @property
    def largest_reward(self) -> float:
        """R_max = max_{s, z} |R(s, z)|."""
        return float(np.abs(self.reward).max())

    def subset(self, kept: Sequence[int]) -> "OptionModel":
        """The model with only the abstractions `kept`."""
        return OptionModel(self.reward[..., kept], self.kernel[..., kept, :])


def option_model(mdp: MDP, options: Sequence[Option]) -> OptionModel:
    """The exact multi-step model of `options` in `mdp`."""
    parts = [_multi_step(mdp, option) for option in options]
    return OptionModel(np.stack([reward for reward, _ in parts], -1), np.stack([kernel for _, kernel in parts], -2))


def expected_duration(mdp: MDP, option: Option) -> Array:
    """E[tau | s, z] in primitive steps, [S]: what the option collects at one a step without discount."""
    unit = MDP(mdp.transition, np.ones_like(mdp.reward), 0.0)
    return _multi_step(unit, option, discount=1.0)[0]


def _multi_step(mdp: MDP, option: Option, discount: float | None = None) -> tuple[Array, Array]:
    """R(·, z), [S], and M(· | ·, z), [S, S]."""
    gamma = mdp.discount if discount is None else discount
    reward, kernel = np.zeros(mdp.states), np.zeros((mdp.states, mdp.states))
    alive = np.eye(mdp.states)  # gamma^t Pr(s_t, still running | s)
    prefix = len(option.policies) - 1 if option.length is None else option.length
    for step in range(prefix):
        policy = option.policies[min(step, len(option.policies) - 1)]
        reward += alive @ (policy * mdp.reward).sum(-1)
        arrived = gamma * alive @ _under(mdp, policy)
        ends = np.ones(mdp.states) if step + 1 == option.length else option.termination
        kernel += arrived * ends
        alive = arrived * (1 - ends)
    if option.length is None:
        policy = option.policies[-1]
        move = gamma * _under(mdp, policy)
        running = np.linalg.inv(np.eye(mdp.states) - move * (1 - option.termination))
        reward += alive @ running @ (policy * mdp.reward).sum(-1)
        kernel += alive @ running @ (move * option.termination)
    return reward, kernel


def _under(mdp: MDP, policy: Array) -> Array:
    """P_pi(s' | s), [S, S], of a policy [S, A]."""
    return np.einsum("sa,ast->st", policy, mdp.transition)


def primitive_options(mdp: MDP) -> list[Option]:
    """Each primitive action as an abstraction of one step."""
    return action_repeats(mdp, 1)


def action_repeats(mdp: MDP, length: int) -> list[Option]:
    """One routine a primitive action: repeat it `length` times, wherever that leads."""
    never = np.zeros(mdp.states)
    return [Option(_always(mdp, action)[None], never, length) for action in range(mdp.actions)]


def expert_routines(mdp: MDP, expert: Array, length: int) -> list[Option]:
    """One routine a primitive action: take it once, then follow the policy `expert`, [S, A], for `length` - 1 steps.

    With an optimal expert, V*(s) and all Q*(s, z) are those of the primitive actions, for every length: only
    gbar = gamma^length changes.
    """
    never = np.zeros(mdp.states)
    return [Option(np.stack([_always(mdp, action), expert]), never, length) for action in range(mdp.actions)]


def random_options(rng: np.random.Generator, mdp: MDP, number: int) -> list[Option]:
    """Abstractions with random deterministic policies and terminations uniform on [0.1, 0.9]."""
    eye = np.eye(mdp.actions)
    return [
        Option(eye[rng.integers(mdp.actions, size=mdp.states)][None], rng.uniform(0.1, 0.9, mdp.states))
        for _ in range(number)
    ]


def _always(mdp: MDP, action: int) -> Array:
    return np.tile(np.eye(mdp.actions)[action], (mdp.states, 1))
