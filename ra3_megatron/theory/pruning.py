"""How many demonstrations prune all (eps, sigma)-suboptimal sets: Monte Carlo against the union bound.

`elimination.py` defines the model. In each setting T, the number of demonstrations after which every suboptimal set is
eliminated, is sampled; Pr(failure after n) = Pr(T > n).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ra3_megatron.theory.elimination import (
    GridTasks,
    SuitedTasks,
    demonstrations_to_prune,
    sufficient_demonstrations,
)
from ra3_megatron.theory.findings import Done, Outcome, Study, Verdict, nothing, verdict
from ra3_megatron.theory.mdp import Array
from ra3_megatron.theory.statistics import Estimate, bootstrap, slope

DELTA = 0.1
"""Failure probability at which settings are compared."""
TAIL = (0.9, 0.99)
"""Quantiles of T between which the slope of log Pr(failure) is fitted: failure probabilities from 10% to 1%."""
TOLERANCE = 0.2
"""A fitted slope agrees with the predicted one when its whole interval is within this share of it."""
GRID_SIGMAS = (0.1, 0.3, 0.5)
GRID_SIDE, GRID_ABSTRACTIONS, GRID_SIZE = 4, 14, 3


@dataclass(frozen=True)
class Setting:
    """|Z|, |Z_eps| and sigma; `lucky`: other abstractions suit a task by chance, else they never do."""

    abstractions: int
    size: int
    sigma: float
    lucky: bool = True

    def family(self) -> SuitedTasks:
        """The family of tasks."""
        if self.lucky:
            return SuitedTasks.with_sigma(self.abstractions, self.size, self.sigma)
        return SuitedTasks(self.abstractions, self.size, 0.0)


BASE = Setting(32, 3, 0.1)
BY_SIZE = [Setting(32, size, 0.1) for size in (1, 2, 3, 4, 5)]
BY_ABSTRACTIONS = [Setting(number, 3, 0.1) for number in (8, 16, 32, 64)]
BY_SIGMA = [Setting(32, 3, sigma) for sigma in (0.025, 0.05, 0.1, 0.2)]
UNLUCKY = [Setting(number, 3, 1 / 3, lucky=False) for number in (8, 16, 32, 64)]
SETTINGS = list(dict.fromkeys([*BY_SIZE, *BY_ABSTRACTIONS, *BY_SIGMA, *UNLUCKY]))
UNITS = len(SETTINGS) + 1


@dataclass(frozen=True)
class Sample:
    """T of one setting, [repeats], and its suboptimal sets by the union bound."""

    setting: Setting
    times: NDArray[np.int64]

    @property
    def sigma(self) -> float:
        """Smallest Pr(Delta > eps) that counts as suboptimal."""
        return self.setting.sigma

    def failure(self, n: NDArray[np.int64]) -> Array:
        """Share of the trials in which n demonstrations were not enough, [len(n)]."""
        return failure_probability(self.times, n)

    def bound(self, n: NDArray[np.int64]) -> Array:
        """The union bound, at most 1."""
        return np.minimum(1, self.setting.family().union_bound(self.sigma, n))

    def tail(self) -> NDArray[np.int64]:
        """The n at which the slope is fitted."""
        low, high = np.quantile(self.times, TAIL)
        return np.arange(int(low), int(high) + 1)


def failure_probability(times: NDArray[np.int64], n: NDArray[np.int64]) -> Array:
    """Pr(T > n) by counting, [len(n)]."""
    ordered = np.sort(times)
    share: Array = 1 - np.searchsorted(ordered, n, side="right") / len(ordered)
    return share


def study(seed: int, repeats: int, done: Done = nothing) -> Study:
    """All settings with `repeats` trials each. `UNITS` units."""
    samples = {}
    for index, setting in enumerate(SETTINGS):
        samples[setting] = _sample(np.random.default_rng([seed, 3, index]), setting, repeats)
        done()
    rng = np.random.default_rng([seed, 3, 1000])
    tails = {setting: _tail_slope(sample, rng) for setting, sample in samples.items() if setting.lucky}
    grid, grid_verdict = _grid(np.random.default_rng([seed, 3, 2000]), repeats)
    done()
    numbers: dict[str, Any] = {
        "delta": DELTA,
        "repeats": repeats,
        "settings": [_setting_json(sample, tails.get(setting)) for setting, sample in samples.items()],
        "by_size": _growth([samples[s] for s in BY_SIZE], [s.size for s in BY_SIZE], rng),
        "by_log_abstractions": _growth([samples[s] for s in BY_ABSTRACTIONS], _log_abstractions(BY_ABSTRACTIONS), rng),
        "by_inverse_sigma": _growth([samples[s] for s in BY_SIGMA], [1 / s.sigma for s in BY_SIGMA], rng),
        "unlucky_by_log_abstractions": _growth([samples[s] for s in UNLUCKY], _log_abstractions(UNLUCKY), rng),
        "grid": grid,
    }
    verdicts = [
        _bound_verdict(list(samples.values())),
        _sufficient_verdict(list(samples.values())),
        _tail_verdict(tails),
        _growth_verdict("demonstrations grow with |Z_eps| as the union bound does", numbers["by_size"]),
        _growth_verdict("demonstrations grow with log|Z| as the union bound does", numbers["by_log_abstractions"]),
        _growth_verdict("demonstrations grow as 1/sigma", numbers["by_inverse_sigma"]),
        _needed_verdict(numbers["unlucky_by_log_abstractions"]),
        grid_verdict,
    ]
    return Study("Demonstrations prune suboptimal sets of abstractions", numbers, verdicts)


def _sample(rng: np.random.Generator, setting: Setting, repeats: int) -> Sample:
    family = setting.family()
    bad = family.suboptimal(setting.sigma)
    return Sample(setting, np.array([demonstrations_to_prune(rng, family, bad) for _ in range(repeats)]))


def _tail_slope(sample: Sample, rng: np.random.Generator) -> tuple[Estimate, float]:
    """Slope of log Pr(failure) on sigma n with its interval, and that of the union bound on the same n."""
    n = sample.tail()
    x: Array = sample.sigma * n.astype(np.float64)

    def fitted(drawn: list[Array]) -> float:
        share = failure_probability(drawn[0].astype(np.int64), n)
        log_share: Array = np.log(np.maximum(share, 0.5 / len(sample.times)))
        return slope(x, log_share)

    bound: Array = np.log(sample.bound(n))
    return bootstrap(fitted, [sample.times.astype(np.float64)], rng), slope(x, bound)


def _needed(times: Array) -> float:
    """Demonstrations after which at most a share DELTA of the trials fails."""
    return float(np.quantile(times, 1 - DELTA, method="higher"))


def _predicted(setting: Setting) -> float:
    """The n at which the union bound falls to DELTA."""
    low, high = 0.0, 1e6
    family = setting.family()
    while high - low > 1e-3:
        middle = (low + high) / 2
        inside = family.union_bound(setting.sigma, np.array([middle]))[0] <= DELTA
        low, high = (low, middle) if inside else (middle, high)
    return high


def _growth(samples: list[Sample], x: list[float] | list[int], rng: np.random.Generator) -> dict[str, Any]:
    """Slope of the demonstrations needed on x: measured with its interval, and by the union bound."""
    axis = np.array(x, dtype=np.float64)
    times = [sample.times.astype(np.float64) for sample in samples]
    measured = bootstrap(lambda drawn: slope(axis, np.array([_needed(t) for t in drawn])), times, rng)
    predicted = [_predicted(sample.setting) for sample in samples]
    return {
        "x": axis.tolist(),
        "needed": [_needed(t) for t in times],
        "predicted": predicted,
        "sufficient": [
            sufficient_demonstrations(s.setting.abstractions, s.setting.size, s.sigma, DELTA) for s in samples
        ],
        "slope": measured.json(),
        "predicted_slope": slope(axis, np.array(predicted)),
    }


def _log_abstractions(settings: list[Setting]) -> list[float]:
    return [float(np.log(setting.abstractions)) for setting in settings]


def _setting_json(sample: Sample, tail: tuple[Estimate, float] | None) -> dict[str, Any]:
    n = np.unique(np.linspace(0, sample.times.max(), 60).astype(np.int64))
    setting = sample.setting
    found = {
        "abstractions": setting.abstractions,
        "size": setting.size,
        "sigma": setting.sigma,
        "lucky": setting.lucky,
        "needed": _needed(sample.times.astype(np.float64)),
        "n": n.tolist(),
        "failure": sample.failure(n).tolist(),
        "bound": sample.bound(n).tolist(),
    }
    if tail is not None:
        found["tail_slope"], found["predicted_tail_slope"] = tail[0].json(), tail[1]
    return found


def _band(repeats: int) -> float:
    """95% band around an empirical distribution (Dvoretzky, Kiefer and Wolfowitz)."""
    return float(np.sqrt(np.log(2 / 0.05) / (2 * repeats)))


def _bound_verdict(samples: list[Sample]) -> Verdict:
    excess = []
    for sample in samples:
        n = np.arange(sample.times.max() + 1)
        excess.append(float((sample.failure(n) - sample.bound(n)).max()))
    band = _band(len(samples[0].times))
    evidence = f"largest excess {max(excess):.3f} in {len(samples)} settings; 95% band of the simulation {band:.3f}"
    return verdict("failure probability is at most the union bound", max(excess) <= band, evidence)


def _sufficient_verdict(samples: list[Sample]) -> Verdict:
    shares = []
    for sample in samples:
        setting = sample.setting
        enough = sufficient_demonstrations(setting.abstractions, setting.size, setting.sigma, DELTA)
        shares.append(float(sample.failure(np.array([int(np.ceil(enough))]))[0]))
    claim = "n = (|Z_eps| log|Z| + log(1/delta)) / sigma demonstrations fail with probability at most delta"
    evidence = f"delta {DELTA}: largest failure probability {max(shares):.3f} in {len(samples)} settings"
    return verdict(claim, max(shares) <= DELTA, evidence)


def _agreement(measured: Estimate, predicted: float) -> Outcome:
    low, high = sorted((predicted * (1 - TOLERANCE), predicted * (1 + TOLERANCE)))
    if low <= measured.low and measured.high <= high:
        return "confirmed"
    return "refuted" if measured.high < low or measured.low > high else "undecided"


def _tail_verdict(tails: dict[Setting, tuple[Estimate, float]]) -> Verdict:
    outcomes = [_agreement(*tail) for tail in tails.values()]
    outcome: Outcome = "refuted" if "refuted" in outcomes else "undecided" if "undecided" in outcomes else "confirmed"
    values = [tail[0].value for tail in tails.values()]
    base, predicted = tails[BASE]
    evidence = (
        f"slope {min(values):.2f} to {max(values):.2f} in {len(tails)} settings; "
        f"|Z| = {BASE.abstractions}, |Z_eps| = {BASE.size}, sigma = {BASE.sigma}: {base}, predicted {predicted:.2f}"
    )
    return Verdict("log failure probability falls linearly in sigma n, as the union bound does", outcome, evidence)


def _growth_verdict(claim: str, growth: dict[str, Any]) -> Verdict:
    measured = Estimate(**growth["slope"])
    evidence = f"slope of n at delta = {DELTA}: {measured}, predicted {growth['predicted_slope']:.2f}"
    return Verdict(claim, _agreement(measured, growth["predicted_slope"]), evidence)


def _needed_verdict(growth: dict[str, Any]) -> Verdict:
    measured = Estimate(**growth["slope"])
    per_log = 3 / UNLUCKY[0].sigma
    claim = "that many demonstrations are also needed, in every family of tasks"
    evidence = f"where no other abstraction ever suits a task, n grows by {measured} per log|Z|, not by {per_log:.0f}"
    return Verdict(claim, "refuted" if measured.high < per_log / 2 else "undecided", evidence)


def _grid(rng: np.random.Generator, repeats: int) -> tuple[dict[str, Any], Verdict]:
    family = GridTasks.random(rng, GRID_SIDE, GRID_ABSTRACTIONS, GRID_SIZE)
    share = family.shares()
    curves, excess = [], []
    for sigma in GRID_SIGMAS:
        times = family.demonstrations_to_prune(rng, sigma, repeats)
        n = np.arange(times.max() + 1)
        failed, bound = failure_probability(times, n), np.minimum(1, family.union_bound(sigma, n))
        excess.append(float((failed - bound).max()))
        curves.append(
            {
                "sigma": sigma,
                "suboptimal_sets": int((share >= sigma).sum()),
                "needed": _needed(times.astype(np.float64)),
                "sufficient": sufficient_demonstrations(GRID_ABSTRACTIONS, GRID_SIZE, sigma, DELTA),
                "n": n.tolist(),
                "failure": failed.tolist(),
                "bound": bound.tolist(),
            }
        )
    numbers = {
        "tasks": len(family.tasks),
        "abstractions": GRID_ABSTRACTIONS,
        "size": GRID_SIZE,
        "epsilon": family.epsilon,
        "sets": len(share),
        "curves": curves,
    }
    evidence = f"largest excess {max(excess):.3f}; 95% band {_band(repeats):.3f}; " + "; ".join(
        f"sigma {c['sigma']}: n = {c['needed']:.0f} needed, {c['sufficient']:.0f} by the bound" for c in curves
    )
    claim = "the same bound holds for gridworld tasks, with every set solved exactly"
    return numbers, verdict(claim, max(excess) <= _band(repeats), evidence)
