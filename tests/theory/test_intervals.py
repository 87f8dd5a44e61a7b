"""Slopes and bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest

from ra3_megatron.theory.statistics import bootstrap, slope


def test_the_slope_of_a_line() -> None:
    x = np.array([0.0, 1.0, 4.0])
    assert slope(x, 3 - 2 * x) == pytest.approx(-2)


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation() -> None:
    rng = np.random.default_rng(0)
    sample = rng.normal(5, 2, 400)
    found = bootstrap(lambda drawn: float(drawn[0].mean()), [sample], rng)
    assert found.value == sample.mean()
    assert found.high - found.low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.15)
    assert found.low < found.value < found.high


def test_samples_are_resampled_by_themselves() -> None:
    rng = np.random.default_rng(0)
    found = bootstrap(lambda drawn: float(drawn[1].mean() - drawn[0].mean()), [np.zeros(5), np.ones(9)], rng)
    assert (found.value, found.low, found.high) == (1, 1, 1)
