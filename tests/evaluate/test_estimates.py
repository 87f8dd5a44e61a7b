"""pass@k against every draw, intervals against their coverage, the paired test against scipy."""

from __future__ import annotations

from itertools import combinations
from statistics import mean

import numpy as np
import pytest
from scipy import stats

from ra3_megatron.evaluate.estimates import difference, mcnemar, mean_pass_at_k, pass_at_k, wilson


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_with_a_right_sample(samples: int) -> None:
    for right in range(samples + 1):
        drawn_from = [True] * right + [False] * (samples - right)
        for k in range(1, samples + 1):
            share = mean(any(draw) for draw in combinations(drawn_from, k))
            assert pass_at_k(samples, right, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(("samples", "right", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_impossible_counts_are_refused(samples: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match=rf"pass@{k} of {right} right in {samples}"):
        pass_at_k(samples, right, k)


def test_the_interval_of_a_share_is_wilsons() -> None:
    for right, tasks in [(0, 10), (3, 10), (82, 164), (164, 164)]:
        wanted = stats.binomtest(right, tasks).proportion_ci(method="wilson")
        assert wilson(right, tasks) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
        found = mean_pass_at_k([(1, int(place < right)) for place in range(tasks)], 1)
        assert (found.value, found.low, found.high) == pytest.approx((right / tasks, wanted.low, wanted.high))


def test_the_interval_over_tasks_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    inside = 0
    for _ in range(60):
        counts = [(4, int(rng.binomial(4, rng.beta(1, 2)))) for _ in range(80)]
        found = mean_pass_at_k(counts, 1)
        inside += found.low <= 1 / 3 <= found.high
    assert 50 <= inside <= 60, "57 of 60 expected; a standard deviation is 1.7"


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(1, 9) == pytest.approx(2 * stats.binom.cdf(1, 10, 0.5))
    assert mcnemar(9, 1) == mcnemar(1, 9) and mcnemar(4, 4) == 1.0


def test_a_difference_is_paired() -> None:
    """Two models that differ on 6 of 100 tasks in one direction: far surer than two shares that are not paired."""
    a = [(1, int(place < 50)) for place in range(100)]
    b = [(1, int(place < 56)) for place in range(100)]
    found = difference(a, b, 1)
    assert found.value == pytest.approx(0.06) and (found.only_a, found.only_b) == (0, 6)
    assert found.p_value == pytest.approx(2 * 0.5**6)
    assert 0 < found.low < 0.06 < found.high < 0.12
    back = difference(b, a, 1)
    assert (back.value, back.only_a, back.only_b) == (-found.value, 6, 0)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low), abs=0.011)


def test_with_more_samples_there_is_no_mcnemar() -> None:
    found = difference([(2, 1), (2, 0)], [(2, 2), (2, 0)], 1)
    assert found.value == 0.25 and found.p_value is None and found.only_a is None
    with pytest.raises(ValueError, match=r"cannot be paired"):
        difference([(1, 1)], [], 1)
