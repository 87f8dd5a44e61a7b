"""pass@k, how sure it is, and how sure a difference of two models on the same tasks is.

Intervals are over tasks: what another draw of tasks of this kind would give. They do not cover what another training
run would give; for that, compare runs of several seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

RESAMPLES = 4000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks with its 95% interval."""

    value: float
    low: float
    high: float
    method: str
    """How the interval was made."""

    def row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """B minus A on the same tasks."""

    value: float
    low: float
    high: float
    """95% interval of a bootstrap over tasks."""
    only_a: int | None
    """Tasks that only A solves; None with more than one sample a task."""
    only_b: int | None
    p_value: float | None
    """McNemar's exact test on these two numbers, two-sided."""

    def row(self) -> dict[str, Any]:
        return asdict(self)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that k of `samples` samples, drawn without replacement, hold a right one: 1 - C(n-c, k) / C(n, k).

    ValueError unless 0 <= right <= samples and 1 <= k <= samples.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {right} right in {samples} samples")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def mean_pass_at_k(counts: Sequence[tuple[int, int]], k: int) -> Estimate:
    """Over tasks, from (samples, right samples) of each.

    Where each task is either solved or not (one sample a task), Wilson's interval of a share; otherwise a percentile
    bootstrap over tasks.
    """
    values = np.array([pass_at_k(n, c, k) for n, c in counts])
    mean = float(values.mean())
    if np.isin(values, (0.0, 1.0)).all():
        low, high = wilson(int(values.sum()), len(values))
        return Estimate(mean, low, high, "Wilson, over tasks")
    low, high = _bootstrap(values)
    return Estimate(mean, low, high, f"bootstrap over tasks, {RESAMPLES} resamples")


def wilson(right: int, tasks: int) -> tuple[float, float]:
    """95% interval of a share."""
    z = float(stats.norm.ppf(0.5 + LEVEL / 2))
    share = right / tasks
    centre = (share + z**2 / (2 * tasks)) / (1 + z**2 / tasks)
    half = z * math.sqrt(share * (1 - share) / tasks + z**2 / (4 * tasks**2)) / (1 + z**2 / tasks)
    low = 0.0 if right == 0 else centre - half
    high = 1.0 if right == tasks else centre + half
    return low, high


def difference(a: Sequence[tuple[int, int]], b: Sequence[tuple[int, int]], k: int) -> Difference:
    """pass@k of b minus that of a; (samples, right samples) of the same tasks in the same order."""
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} tasks cannot be paired")
    one, other = (np.array([pass_at_k(n, c, k) for n, c in counts]) for counts in (a, b))
    low, high = _bootstrap(other - one)
    only_a = only_b = p_value = None
    if all(n == 1 for n, _ in (*a, *b)):
        only_a, only_b = int(((one == 1) & (other == 0)).sum()), int(((one == 0) & (other == 1)).sum())
        p_value = mcnemar(only_a, only_b)
    return Difference(float((other - one).mean()), low, high, only_a, only_b, p_value)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p-value of the exact test: are tasks that one alone solves as often A's as B's?"""
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def _bootstrap(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Percentile interval of the mean, with the same resamples at every call."""
    rng = np.random.default_rng(0)
    means = np.array([values[rng.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)])
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
