"""Finite Markov decision processes, small enough to be solved exactly: random sparse ones and gridworlds."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
"""Primitive actions of a gridworld, as steps in (row, column): north, east, south, west."""


@dataclass(frozen=True)
class MDP:
    """P(s' | s, a), r(s, a) and gamma.

    transition: [A, S, S], rows sum to 1. reward: [S, A]. discount: 0 <= gamma < 1.
    Raises ValueError when a shape, a row or the discount is wrong.
    """

    transition: Array
    reward: Array
    discount: float

    def __post_init__(self) -> None:
        actions, states, successors = self.transition.shape
        if states != successors or self.reward.shape != (states, actions):
            raise ValueError(f"transition {self.transition.shape} does not go with reward {self.reward.shape}")
        if (self.transition < 0).any() or not np.allclose(self.transition.sum(-1), 1):
            raise ValueError("each row of transition must be a distribution")
        if not 0 <= self.discount < 1:
            raise ValueError(f"discount {self.discount}: must be at least 0 and below 1")

    @property
    def states(self) -> int:
        """S."""
        return self.reward.shape[0]

    @property
    def actions(self) -> int:
        """A."""
        return self.reward.shape[1]


def random_mdp(rng: np.random.Generator, states: int, actions: int, branching: int, discount: float) -> MDP:
    """A random sparse MDP (Garnet): each (s, a) leads to `branching` states with Dirichlet(1) probabilities.

    Rewards are uniform on [0, 1].
    """
    transition = np.zeros((actions, states, states))
    for action in range(actions):
        for state in range(states):
            successors = rng.choice(states, branching, replace=False)
            transition[action, state, successors] = rng.dirichlet(np.ones(branching))
    return MDP(transition, rng.random((states, actions)), discount)


def gridworld(size: int, goal: int, slip: float, discount: float) -> MDP:
    """A square grid with four moves; a move against the wall stays, and with probability `slip` a random one is made.

    Entering `goal` (a cell, numbered row by row) pays 1; the goal is never left and pays nothing more.
    """
    cells = size * size
    intended = np.zeros((len(MOVES), cells, cells))
    for cell in range(cells):
        row, column = divmod(cell, size)
        for action, (down, right) in enumerate(MOVES):
            target = min(max(row + down, 0), size - 1) * size + min(max(column + right, 0), size - 1)
            intended[action, cell, target] = 1
    transition = (1 - slip) * intended + slip * intended.mean(0)
    transition[:, goal] = 0
    transition[:, goal, goal] = 1
    reward = transition[:, :, goal].T.copy()
    reward[goal] = 0
    return MDP(transition, reward, discount)
