"""How expert demonstrations eliminate sets of abstractions: the model behind the pruning study.

A task M is drawn i.i.d. from p(M). For a set Z' of abstractions, Delta(M, Z') = V*_{M,Z} - V*_{M,Z'} is its pruning
error. Z' is (eps, sigma)-suboptimal if Pr_M(Delta(M, Z') > eps) >= sigma. Z_eps is the smallest set with
Delta(M, Z_eps) <= eps on every task.

Our reading, where only the statement of the theorem was at hand and not its definitions or proof: one demonstration is
an optimal solution of one drawn task, and it *eliminates every set that has no solution within eps of it*,
Delta(M, Z') > eps. The learner compares sets of |Z_eps| abstractions and keeps those that no demonstration has
eliminated. It *fails* after n demonstrations if an (eps, sigma)-suboptimal set of that size is still there. So the
learner can tell which sets reach the value that was demonstrated; one that sees only actions has less to go by, and
nothing is claimed about it.

Union bound: a suboptimal set survives n tasks with probability at most (1 - sigma)^n, so

    Pr(failure) <= sum_{Z'} (1 - sigma(Z'))^n <= |Z|^|Z_eps| exp(-sigma n)      sigma(Z') = Pr(Delta(M, Z') > eps)

and n = (|Z_eps| log|Z| + log(1/delta)) / sigma are enough: the order |Z_eps| log(|Z|/delta) / sigma of the theorem.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations

import numpy as np
from numpy.typing import NDArray

from ra3_megatron.theory.mdp import MDP, Array, gridworld
from ra3_megatron.theory.options import OptionModel, action_repeats, option_model, random_options
from ra3_megatron.theory.planning import optimal_values

Masks = NDArray[np.uint64]
"""Sets of abstractions: bit z is set if z is in the set."""

_BITS = 64
_BATCH = 64
"""Demonstrations that are drawn at once."""


def subsets(abstractions: int, size: int) -> NDArray[np.int64]:
    """All sets of `size` abstractions in lexicographic order, [N, size]."""
    flat = chain.from_iterable(combinations(range(abstractions), size))
    number = math.comb(abstractions, size)
    return np.fromiter(flat, dtype=np.int64, count=number * size).reshape(number, size)


def masks(sets: NDArray[np.int64]) -> Masks:
    """[N, size] -> [N]."""
    bits = np.left_shift(np.uint64(1), sets.astype(np.uint64))
    combined: Masks = np.bitwise_or.reduce(bits, axis=-1)
    return combined


def sufficient_demonstrations(abstractions: int, size: int, sigma: float, delta: float) -> float:
    """(|Z_eps| log|Z| + log(1/delta)) / sigma."""
    return (size * math.log(abstractions) + math.log(1 / delta)) / sigma


@dataclass(frozen=True)
class SuitedTasks:
    """Tasks of one decision: an abstraction suits a task, and solves it (value 1), or does not (value 0).

    Exactly one of the abstractions 0 … size - 1, uniformly drawn, suits a task: together they are Z_eps (any eps < 1).
    Each other one suits it with probability `luck`, independently of all else.
    """

    abstractions: int
    size: int
    luck: float

    def __post_init__(self) -> None:
        if not 0 < self.size < self.abstractions <= _BITS:
            raise ValueError(f"{self.size} of {self.abstractions} abstractions: at most {_BITS}, and not all of them")

    @classmethod
    def with_sigma(cls, abstractions: int, size: int, sigma: float) -> "SuitedTasks":
        """The family in which a set without any member of Z_eps fails on a share sigma of the tasks."""
        return cls(abstractions, size, 1 - sigma ** (1 / size))

    def share(self, members: int) -> float:
        """Pr(Delta > eps) of a set of `size` with `members` members of Z_eps."""
        return (1 - members / self.size) * (1 - self.luck) ** (self.size - members)

    def sets_with(self, members: int) -> int:
        """How many sets of `size` have `members` members of Z_eps."""
        return math.comb(self.size, members) * math.comb(self.abstractions - self.size, self.size - members)

    def union_bound(self, sigma: float, n: NDArray[np.int64]) -> Array:
        """sum over the (eps, sigma)-suboptimal sets of (1 - sigma(Z'))^n."""
        total = np.zeros(len(n))
        for members in range(self.size):
            if self._suboptimal(members, sigma):
                total += self.sets_with(members) * (1 - self.share(members)) ** n
        return total

    def suboptimal(self, sigma: float) -> Masks:
        """All (eps, sigma)-suboptimal sets of `size`."""
        sets = subsets(self.abstractions, self.size)
        members = (sets < self.size).sum(-1)
        bad = np.array([self._suboptimal(m, sigma) for m in range(self.size + 1)])
        return masks(sets[bad[members]])

    def draw(self, rng: np.random.Generator, tasks: int) -> Masks:
        """The abstractions that suit each of `tasks` tasks, [tasks]."""
        suited = rng.random((tasks, self.abstractions)) < self.luck
        suited[:, : self.size] = False
        suited[np.arange(tasks), rng.integers(self.size, size=tasks)] = True
        bits = np.left_shift(np.uint64(1), np.arange(self.abstractions, dtype=np.uint64))
        drawn: Masks = np.where(suited, bits, np.uint64(0)).sum(-1, dtype=np.uint64)
        return drawn

    def _suboptimal(self, members: int, sigma: float) -> bool:
        return self.share(members) >= sigma * (1 - 1e-9)


def demonstrations_to_prune(rng: np.random.Generator, family: SuitedTasks, bad: Masks) -> int:
    """Demonstrations until every set of `bad` is eliminated."""
    count = 0
    while True:
        for suited in family.draw(rng, _BATCH):
            count += 1
            bad = bad[(bad & suited) != 0]
            if not bad.size:
                return count


@dataclass(frozen=True)
class GridTasks:
    """Tasks of many decisions: reach a goal in a gridworld, every cell being a goal equally often.

    The library Z is the same for all tasks. Values are means over starting cells, divided by that of V*_Z.
    """

    tasks: tuple[MDP, ...]
    errors: Array
    """Delta(M, Z') of every set of `size` on every task, [sets, tasks]."""
    size: int

    @classmethod
    def random(cls, rng: np.random.Generator, side: int, abstractions: int, size: int) -> "GridTasks":
        """A library of two-step repeats of each move and random options; all sets of `size` are solved exactly."""
        tasks = tuple(gridworld(side, goal, slip=0.1, discount=0.9) for goal in range(side * side))
        library = action_repeats(tasks[0], 2)
        library += random_options(rng, tasks[0], abstractions - len(library))
        sets = subsets(abstractions, size)
        errors = []
        for task in tasks:
            model = option_model(task, library)
            best = optimal_values(model).mean()
            stacked = OptionModel(
                model.reward[:, sets].transpose(1, 0, 2), model.kernel[:, sets, :].transpose(1, 0, 2, 3)
            )
            errors.append((best - optimal_values(stacked).mean(-1)) / best)
        return cls(tasks, np.array(errors).T, size)

    @cached_property
    def epsilon(self) -> float:
        """The smallest eps for which a set of `size` is good on every task."""
        return float(self.errors.max(-1).min())

    @cached_property
    def eliminates(self) -> NDArray[np.bool_]:
        """Delta(M, Z') > eps, [sets, tasks]."""
        return self.errors > self.epsilon + 1e-9

    def shares(self) -> Array:
        """Pr(Delta(M, Z') > eps) of each set, [sets]."""
        share: Array = self.eliminates.mean(-1)
        return share

    def demonstrations_to_prune(self, rng: np.random.Generator, sigma: float, repeats: int) -> NDArray[np.int64]:
        """Demonstrations until every (eps, sigma)-suboptimal set is eliminated, in `repeats` independent trials."""
        bad = np.unique(self.eliminates[self.shares() >= sigma], axis=0)
        tasks = self.eliminates.shape[1]
        first = np.stack([_first_draws(rng, tasks) for _ in range(repeats)])  # [repeats, tasks]
        eliminated = np.stack([first[:, row].min(-1) for row in bad], -1)
        slowest: NDArray[np.int64] = eliminated.max(-1)
        return slowest

    def union_bound(self, sigma: float, n: NDArray[np.int64]) -> Array:
        """sum over the (eps, sigma)-suboptimal sets of (1 - sigma(Z'))^n."""
        share = self.shares()
        total: Array = ((1 - share[share >= sigma])[:, None] ** n).sum(0)
        return total


def _first_draws(rng: np.random.Generator, tasks: int) -> NDArray[np.int64]:
    """When each of `tasks` equally likely tasks is drawn first, counted from 1, [tasks]."""
    first = np.zeros(tasks, dtype=np.int64)
    count = 0
    while (first == 0).any():
        for task in rng.integers(tasks, size=_BATCH):
            count += 1
            first[task] = first[task] or count
    return first
