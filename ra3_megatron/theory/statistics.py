"""Slopes of straight lines and bootstrap intervals."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from ra3_megatron.theory.mdp import Array

RESAMPLES = 500


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def json(self) -> dict[str, float]:
        """For theory.json."""
        return asdict(self)


def slope(x: Array, y: Array) -> float:
    """Least-squares slope of y on x."""
    centered = x - x.mean()
    return float(centered @ (y - y.mean()) / (centered @ centered))


def bootstrap(
    figure: Callable[[list[Array]], float],
    samples: list[Array],
    rng: np.random.Generator,
) -> Estimate:
    """`figure` of the samples with its 95% percentile interval; each sample is resampled by itself along axis 0."""
    drawn = [
        figure([sample[rng.integers(len(sample), size=len(sample))] for sample in samples]) for _ in range(RESAMPLES)
    ]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Estimate(figure(samples), float(low), float(high))
