"""Regret = pruning error + RL error: exact, with both parts what they are said to be."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from ra3_megatron.theory import regret
from ra3_megatron.theory.mdp import random_mdp
from ra3_megatron.theory.options import OptionModel, option_model, primitive_options, random_options
from ra3_megatron.theory.planning import optimal_values, policy_iteration, policy_value


def random_model(seed: int) -> OptionModel:
    rng = np.random.default_rng(seed)
    mdp = random_mdp(rng, 8, 2, 3, 0.95)
    return option_model(mdp, [*primitive_options(mdp), *random_options(rng, mdp, 4)])


@pytest.mark.parametrize("seed", range(8))
def test_the_identity_holds_in_every_state(seed: int) -> None:
    model, rng = random_model(seed), np.random.default_rng(seed)
    size = int(rng.integers(1, 6))
    kept = rng.choice(6, size, replace=False).tolist()
    policy = rng.dirichlet(np.full(size, 0.5), 8)
    errors = regret.decompose(model, kept, policy)
    assert errors.residual < 1e-10
    pruned = model.subset(kept)
    np.testing.assert_allclose(errors.pruning, optimal_values(model) - optimal_values(pruned), atol=1e-10)
    np.testing.assert_allclose(errors.rl, optimal_values(pruned) - policy_value(pruned, policy), atol=1e-10)
    assert errors.pruning.min() > -1e-10
    assert errors.rl.min() > -1e-10


def test_keeping_all_prunes_nothing_and_the_best_policy_loses_nothing() -> None:
    model = random_model(0)
    policy = np.full((8, 6), 1 / 6)
    assert np.abs(regret.decompose(model, range(6), policy).pruning).max() < 1e-10
    kept = [0, 3]
    best = policy_iteration(model.subset(kept))[0]
    errors = regret.decompose(model, kept, best)
    assert np.abs(errors.rl).max() < 1e-10
    assert errors.pruning.max() > 1e-3


def test_pruning_error_rises_as_abstractions_go() -> None:
    model = random_model(1)
    best = [optimal_values(model.subset(range(size))) for size in range(1, 7)]
    assert all((larger >= smaller - 1e-10).all() for smaller, larger in pairwise(best))


def test_a_wrong_model_breaks_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """The three errors come by separate routes: the identity is not true by construction."""
    model = random_model(2)
    policy = np.full((8, 2), 0.5)
    exact = regret.action_values
    monkeypatch.setattr(regret, "action_values", lambda m, v: exact(m, v) + 1e-6)
    assert regret.decompose(model, [0, 1], policy).residual > 1e-8


def test_the_study_confirms_the_identity() -> None:
    found = regret.study(seed=3, mdps=2)
    assert [verdict.outcome for verdict in found.verdicts] == ["confirmed"]
    assert found.numbers["pruning_error"][-1] == pytest.approx(0, abs=1e-12)
    assert found.numbers["rl_error"][0] == pytest.approx(0, abs=1e-12)
