"""Value iteration within its bound and faster with length; policy gradients against finite differences."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from ra3_megatron.theory import convergence
from ra3_megatron.theory.mdp import random_mdp
from ra3_megatron.theory.options import OptionModel, option_model, random_options
from ra3_megatron.theory.planning import (
    iteration_bound,
    optimal_values,
    policy_iteration,
    policy_value,
    value_iteration,
)
from ra3_megatron.theory.policy_gradient import (
    Ascent,
    iterations_to_reach,
    objective,
    policy_gradient,
    softmax,
)


def random_model(seed: int) -> OptionModel:
    rng = np.random.default_rng(seed)
    mdp = random_mdp(rng, 6, 3, 3, 0.9)
    return option_model(mdp, random_options(rng, mdp, 4))


@pytest.mark.parametrize("seed", range(10))
def test_value_iteration_contracts_by_gbar_and_keeps_its_bound(seed: int) -> None:
    model = random_model(seed)
    best = optimal_values(model)
    errors = [np.abs(values - best).max() for values in value_iteration(model, 150)]
    for n, error in enumerate(errors):
        assert error <= model.gbar**n * errors[0] + 1e-12
    for tolerance in (1.0, 0.1, 0.001):
        needed = next(n for n, error in enumerate(errors) if error <= tolerance)
        assert needed <= np.ceil(iteration_bound(model.gbar, model.largest_reward, tolerance))


def test_the_bound_by_hand() -> None:
    assert iteration_bound(0.5, 1.0, 0.02) == pytest.approx(2 * np.log(100))
    assert iteration_bound(0.5, 1.0, 10.0) == 0


def test_policy_iteration_improves_to_the_best_of_all_policies() -> None:
    model = random_model(0)
    policy, values = policy_iteration(model)
    assert all((after >= before - 1e-12).all() for before, after in pairwise(values))
    np.testing.assert_allclose(values[-1], value_iteration(model, 400)[-1], atol=1e-12)
    np.testing.assert_allclose(values[-1], policy_value(model, policy))


@pytest.mark.parametrize("tolerance", [0.1, 0.01, 0.001])
def test_value_iteration_needs_fewer_iterations_the_longer_the_routines(tolerance: float) -> None:
    problems = convergence.sweep("expert", seed=0, seeds=3)
    eps = problems.tolerance(tolerance)
    errors = np.stack([np.abs(v - problems.best).max(-1) for v in value_iteration(problems.models, 300)])
    needed = (errors <= eps).argmax(0).reshape(3, -1)
    assert (np.diff(needed, axis=-1) < 0).all()
    assert (needed[:, 0] > 5 * needed[:, -1]).all()


def test_stacked_models_are_solved_one_by_one() -> None:
    models = [random_model(seed) for seed in range(3)]
    stacked = OptionModel(np.stack([m.reward for m in models]), np.stack([m.kernel for m in models]))
    np.testing.assert_allclose(optimal_values(stacked), np.stack([optimal_values(m) for m in models]), rtol=1e-10)


def test_the_policy_gradient_is_the_derivative_of_the_objective() -> None:
    model, rng = random_model(1), np.random.default_rng(1)
    theta, start = rng.normal(size=(6, 4)), rng.dirichlet(np.ones(6))
    gradient, values = policy_gradient(model, theta, start)
    assert objective(model, theta, start) == pytest.approx(values @ start)
    numeric = np.zeros_like(theta)
    for index in np.ndindex(*theta.shape):
        shift = np.zeros_like(theta)
        shift[index] = 1e-6
        numeric[index] = (objective(model, theta + shift, start) - objective(model, theta - shift, start)) / 2e-6
    np.testing.assert_allclose(gradient, numeric, atol=1e-7)


def test_the_natural_gradient_is_the_fisher_preconditioned_one() -> None:
    """F x = gradient for x = advantage, with F = sum_s d(s) (diag(pi) - pi pi^T)."""
    model, rng = random_model(2), np.random.default_rng(2)
    theta, start = rng.normal(size=(6, 4)), np.full(6, 1 / 6)
    gradient, _ = policy_gradient(model, theta, start)
    natural, _ = policy_gradient(model, theta, start, natural=True)
    policy = softmax(theta)
    kernel = np.einsum("sz,szt->st", policy, model.kernel)
    occupancy = start @ np.linalg.inv(np.eye(6) - kernel)
    for state in range(6):
        fisher = occupancy[state] * (np.diag(policy[state]) - np.outer(policy[state], policy[state]))
        np.testing.assert_allclose(fisher @ natural[state], gradient[state], atol=1e-12)


@pytest.mark.parametrize("natural", [False, True])
def test_counted_updates_are_those_of_a_plain_loop(natural: bool) -> None:
    models = [random_model(seed) for seed in (3, 4)]
    stacked = OptionModel(np.stack([m.reward for m in models]), np.stack([m.kernel for m in models]))
    best, tolerance, steps = optimal_values(stacked), np.array([0.3, 0.1]), np.array([0.5, 1.0])
    counted = iterations_to_reach(stacked, best, tolerance, Ascent(steps, natural, growth=0.9), limit=3000)
    for index, model in enumerate(models):
        theta, updates = np.zeros((6, 4)), 0
        while (best[index] - policy_value(model, softmax(theta))).max() > tolerance[index]:
            gradient = policy_gradient(model, theta, np.full(6, 1 / 6), natural)[0]
            theta, updates = theta + steps[index] * 0.9**-updates * gradient, updates + 1
        assert counted[index] == updates > 0


def test_an_ascent_that_is_too_slow_is_not_counted() -> None:
    model = random_model(5)
    stacked = OptionModel(model.reward[None], model.kernel[None])
    best = optimal_values(stacked)
    assert iterations_to_reach(stacked, best, np.array([1e-6]), Ascent(1e-3), limit=10)[0] == np.inf


def test_the_fixed_step_policy_gradient_gains_nothing_from_length_where_value_iteration_does() -> None:
    """The main finding of the study, with a margin; what a broken sweep or a broken gradient would undo."""
    problems = convergence.sweep("expert", seed=1, seeds=3)
    eps = problems.tolerance(0.001)
    ascent = Ascent(convergence.FIXED_STEP * 10 / problems.scale)
    counted = iterations_to_reach(problems.models, problems.best, eps, ascent, 2000).reshape(3, -1)
    assert (counted[:, -1] > 0.6 * counted[:, 0]).all()


def test_the_study_tells_what_gains_from_length_and_what_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "FAMILIES", ("expert",))
    monkeypatch.setattr(convergence, "TOLERANCES", (0.01,))
    monkeypatch.setattr(convergence, "PG_STEPS", (30.0, 300.0))
    found = convergence.study(seed=0, seeds=3)
    algorithms = found.numbers["families"]["expert"]["by_tolerance"]["0.01"]["algorithms"]
    slopes = {name: entry["slope"]["value"] for name, entry in algorithms.items()}
    assert min(slopes["value_iteration"], slopes["natural_gbar"]) > 0.85
    assert max(slopes["natural_gamma"], slopes["policy_gradient"], slopes["policy_iteration"]) < 0.5
    best, one = (np.array(algorithms[name]["iterations"]) for name in ("policy_gradient_best", "policy_gradient"))
    assert (best <= one).all()
    outcomes = {verdict.claim: verdict.outcome for verdict in found.verdicts}
    assert outcomes["value and policy iteration never need more than the bound"] == "confirmed"
    assert outcomes["each doubling of the length leaves value iteration with no more iterations"] == "confirmed"
    assert outcomes["expert: value iteration gains from length as the bound does"] == "confirmed"
    assert outcomes["expert: policy gradient, one step size gains from length as the bound does"] == "refuted"
