"""All studies with their sizes: full, within minutes on one core, or quick, within seconds."""

from collections.abc import Callable
from dataclasses import dataclass

from ra3_megatron.theory import convergence, prior, pruning, regret
from ra3_megatron.theory.findings import Done, Study


@dataclass(frozen=True)
class Size:
    """How much each study computes."""

    regret_mdps: int
    pruning_repeats: int
    convergence_seeds: int
    prior_draws: int


FULL = Size(regret_mdps=100, pruning_repeats=8000, convergence_seeds=24, prior_draws=400)
QUICK = Size(regret_mdps=5, pruning_repeats=100, convergence_seeds=2, prior_draws=20)


@dataclass(frozen=True)
class Plan:
    """One study to run: its name, its units of work, and how to run it."""

    name: str
    units: int
    run: Callable[[Done], Study]


def plans(seed: int, size: Size) -> list[Plan]:
    """The studies in the order of the report. The same seed and size give the same numbers."""
    return [
        Plan("regret", size.regret_mdps, lambda done: regret.study(seed, size.regret_mdps, done)),
        Plan("pruning", pruning.UNITS, lambda done: pruning.study(seed, size.pruning_repeats, done)),
        Plan("convergence", convergence.UNITS, lambda done: convergence.study(seed, size.convergence_seeds, done)),
        Plan("prior", len(prior.LATENTS), lambda done: prior.study(seed, size.prior_draws, done)),
    ]
