"""Demonstrations that eliminate sets of abstractions: against enumeration, exact probabilities and the union bound."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from ra3_megatron.theory import pruning
from ra3_megatron.theory.elimination import (
    GridTasks,
    SuitedTasks,
    demonstrations_to_prune,
    masks,
    subsets,
    sufficient_demonstrations,
)


def test_subsets_and_masks_by_enumeration() -> None:
    sets = subsets(6, 3)
    assert [tuple(row) for row in sets] == list(combinations(range(6), 3))
    assert [int(mask) for mask in masks(sets)] == [sum(1 << z for z in row) for row in sets]
    assert int(masks(np.array([[63, 0]]))[0]) == (1 << 63) + 1


def test_shares_of_failing_sets_against_draws() -> None:
    family = SuitedTasks(8, 3, luck=0.3)
    drawn = family.draw(np.random.default_rng(0), 20000)
    for members, kept in enumerate([(3, 4, 5), (0, 3, 4), (0, 1, 3), (0, 1, 2)]):
        share = float(((masks(np.array([kept]))[0] & drawn) == 0).mean())
        assert share == pytest.approx(family.share(members), abs=0.012)
    assert family.share(3) == 0


def test_the_suboptimal_sets_are_those_with_share_at_least_sigma() -> None:
    family = SuitedTasks(9, 3, luck=0.2)
    for sigma in (0.1, family.share(2), 0.3, 0.45):
        expected = {
            sum(1 << z for z in row)
            for row in combinations(range(9), 3)
            if family.share(sum(z < 3 for z in row)) >= sigma - 1e-12 and row != (0, 1, 2)
        }
        assert {int(mask) for mask in family.suboptimal(sigma)} == expected


def test_with_sigma_makes_all_but_the_best_set_suboptimal() -> None:
    family = SuitedTasks.with_sigma(12, 3, 0.1)
    assert family.share(0) == pytest.approx(0.1)
    assert len(family.suboptimal(0.1)) == math.comb(12, 3) - 1
    n = np.array([5])
    members = [sum(z < 3 for z in row) for row in combinations(range(12), 3)]
    expected = sum((1 - family.share(m)) ** 5 for m in members if m < 3)
    assert family.union_bound(0.1, n)[0] == pytest.approx(expected)


def test_one_suboptimal_set_dies_geometrically() -> None:
    """|Z| = 2, |Z_eps| = 1: the other abstraction survives n demonstrations with probability (1 - sigma)^n exactly."""
    family = SuitedTasks.with_sigma(2, 1, 0.25)
    rng = np.random.default_rng(0)
    times = np.array([demonstrations_to_prune(rng, family, family.suboptimal(0.25)) for _ in range(4000)])
    n = np.arange(1, 12)
    np.testing.assert_allclose(pruning.failure_probability(times, n), 0.75**n, atol=0.03)


def test_routines_that_nobody_else_replaces_are_collected_like_coupons() -> None:
    """Without luck every member of Z_eps must have been demonstrated: 3 (1 + 1/2 + 1/3) = 5.5 on average."""
    family = SuitedTasks(10, 3, luck=0.0)
    rng = np.random.default_rng(1)
    times = [demonstrations_to_prune(rng, family, family.suboptimal(1 / 3)) for _ in range(3000)]
    assert np.mean(times) == pytest.approx(5.5, abs=0.2)


def test_the_sufficient_number_by_hand() -> None:
    assert sufficient_demonstrations(32, 3, 0.1, 0.05) == pytest.approx(10 * (3 * math.log(32) + math.log(20)))


@pytest.fixture(scope="module")
def grid() -> GridTasks:
    return GridTasks.random(np.random.default_rng(0), side=3, abstractions=7, size=2)


def test_some_set_of_the_grid_tasks_is_good_on_all_of_them(grid: GridTasks) -> None:
    assert grid.errors.shape == (math.comb(7, 2), 9)
    assert grid.errors.min() > -1e-10
    assert (grid.shares() == 0).any()
    assert (grid.shares() > 0).any()


def test_a_larger_set_has_no_larger_pruning_error(grid: GridTasks) -> None:
    larger = GridTasks.random(np.random.default_rng(0), side=3, abstractions=7, size=3)
    pairs = {tuple(row): error for row, error in zip(subsets(7, 2), grid.errors, strict=True)}
    for row, error in zip(subsets(7, 3), larger.errors, strict=True):
        assert (error <= pairs[tuple(row[:2])] + 1e-10).all()


def test_grid_tasks_keep_the_union_bound(grid: GridTasks) -> None:
    times = grid.demonstrations_to_prune(np.random.default_rng(1), 0.2, 2000)
    n = np.arange(times.max() + 1)
    failed = pruning.failure_probability(times, n)
    assert (failed <= grid.union_bound(0.2, n) + 0.04).all()
    assert failed[1] > 0.2


def test_study_settings_keep_the_bound_and_their_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    small = [pruning.Setting(number, 2, 0.1) for number in (6, 12, 24)]
    sizes = [pruning.Setting(12, size, 0.1) for size in (1, 2, 3)]
    sigmas = [pruning.Setting(12, 2, sigma) for sigma in (0.1, 0.2)]
    unlucky = [pruning.Setting(number, 3, 1 / 3, lucky=False) for number in (6, 12, 24)]
    monkeypatch.setattr(pruning, "BASE", small[0])
    for name, value in (("BY_ABSTRACTIONS", small), ("BY_SIZE", sizes), ("BY_SIGMA", sigmas), ("UNLUCKY", unlucky)):
        monkeypatch.setattr(pruning, name, value)
    monkeypatch.setattr(pruning, "SETTINGS", list(dict.fromkeys([*small, *sizes, *sigmas, *unlucky])))
    monkeypatch.setattr("ra3_megatron.theory.statistics.RESAMPLES", 100)
    found = pruning.study(seed=0, repeats=400)
    outcomes = {verdict.claim: verdict.outcome for verdict in found.verdicts}
    assert outcomes["failure probability is at most the union bound"] == "confirmed"
    assert outcomes["that many demonstrations are also needed, in every family of tasks"] == "refuted"
    assert outcomes["demonstrations grow as 1/sigma"] == "confirmed"
    needed = found.numbers["by_log_abstractions"]["needed"]
    assert needed == sorted(needed)
    assert found.numbers["by_log_abstractions"]["sufficient"][0] > needed[0]
