"""Multi-step models of options against simulation, against a flat chain over (state, option), and their invariants."""

from __future__ import annotations

import numpy as np
import pytest

from ra3_megatron.theory.mdp import MDP, Array, gridworld, random_mdp
from ra3_megatron.theory.options import (
    Option,
    action_repeats,
    expected_duration,
    expert_routines,
    option_model,
    primitive_options,
    random_options,
)
from ra3_megatron.theory.planning import action_values, optimal_values, policy_iteration, policy_value


def small(seed: int = 0, states: int = 5, discount: float = 0.9) -> MDP:
    return random_mdp(np.random.default_rng(seed), states, 3, 2, discount)


def simulate(mdp: MDP, option: Option, start: int, runs: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Discounted reward, [runs], and gamma^tau at the state in which the option ended, [runs, S]."""
    rewards, ends = np.zeros(runs), np.zeros((runs, mdp.states))
    for run in range(runs):
        state, discount, step = start, 1.0, 0
        while True:
            policy = option.policies[min(step, len(option.policies) - 1), state]
            action = rng.choice(mdp.actions, p=policy)
            rewards[run] += discount * mdp.reward[state, action]
            state = int(rng.choice(mdp.states, p=mdp.transition[action, state]))
            discount, step = discount * mdp.discount, step + 1
            if step == option.length or rng.random() < option.termination[state]:
                ends[run, state] = discount
                break
    return rewards, ends


@pytest.mark.parametrize("length", [None, 1, 3])
def test_the_model_agrees_with_simulation(length: int | None) -> None:
    mdp = small()
    rng = np.random.default_rng(1)
    policies = rng.dirichlet(np.ones(mdp.actions), (2, mdp.states))
    option = Option(policies, rng.uniform(0.2, 0.6, mdp.states), length)
    model = option_model(mdp, [option])
    rewards, ends = simulate(mdp, option, 2, 3000, rng)
    error = rewards.std() / np.sqrt(len(rewards))
    assert abs(rewards.mean() - model.reward[2, 0]) < 4 * error
    errors = ends.std(0) / np.sqrt(len(ends)) + 1e-12
    assert (np.abs(ends.mean(0) - model.kernel[2, 0]) < 4.5 * errors).all()


def test_values_are_those_of_the_chain_over_states_and_options() -> None:
    """Executing options step by step, with the running option as part of the state, gives the same values."""
    mdp = small()
    rng = np.random.default_rng(2)
    options = random_options(rng, mdp, 3)
    policy = rng.dirichlet(np.ones(3), mdp.states)
    size, number = mdp.states, len(options)
    chain, reward = np.zeros((size, number, size, number)), np.zeros((size, number))
    for z, option in enumerate(options):
        move = np.einsum("sa,ast->st", option.policies[0], mdp.transition)
        reward[:, z] = (option.policies[0] * mdp.reward).sum(-1)
        chain[:, z] = (move * option.termination)[:, :, None] * policy
        chain[:, z, :, z] += move * (1 - option.termination)
    flat = chain.reshape(size * number, size * number)
    running = np.linalg.solve(np.eye(size * number) - mdp.discount * flat, reward.ravel()).reshape(size, number)
    expected = (policy * running).sum(-1)
    np.testing.assert_allclose(policy_value(option_model(mdp, options), policy), expected, rtol=1e-12)


def test_one_step_options_are_the_primitive_actions() -> None:
    mdp = small()
    model = option_model(mdp, primitive_options(mdp))
    np.testing.assert_allclose(model.reward, mdp.reward)
    np.testing.assert_allclose(model.kernel, mdp.discount * mdp.transition.transpose(1, 0, 2))
    assert model.gbar == pytest.approx(mdp.discount)


@pytest.mark.parametrize("length", [1, 2, 8])
def test_gbar_and_duration_of_fixed_lengths(length: int) -> None:
    mdp = small()
    assert option_model(mdp, action_repeats(mdp, length)).gbar == pytest.approx(mdp.discount**length)
    np.testing.assert_allclose(expected_duration(mdp, action_repeats(mdp, length)[0]), length)


def test_gbar_and_duration_of_geometric_lengths() -> None:
    mdp = small()
    stop = 0.25
    option = Option(np.full((1, mdp.states, mdp.actions), 1 / mdp.actions), np.full(mdp.states, stop))
    expected = stop * mdp.discount / (1 - mdp.discount * (1 - stop))
    np.testing.assert_allclose(option_model(mdp, [option]).kernel.sum(-1), expected)
    np.testing.assert_allclose(expected_duration(mdp, option), 1 / stop)


def test_gbar_is_the_largest_mean_discount() -> None:
    mdp = small()
    options = [*action_repeats(mdp, 4), *random_options(np.random.default_rng(0), mdp, 3)]
    model = option_model(mdp, options)
    assert model.gbar == max(option_model(mdp, [option]).gbar for option in options) <= mdp.discount + 1e-12


def test_expert_routines_change_nothing_but_gbar() -> None:
    mdp = small()
    primitive = option_model(mdp, primitive_options(mdp))
    expert, values = policy_iteration(primitive)
    for length in (1, 2, 5):
        model = option_model(mdp, expert_routines(mdp, expert, length))
        np.testing.assert_allclose(optimal_values(model), values[-1], rtol=1e-10)
        np.testing.assert_allclose(action_values(model, values[-1]), action_values(primitive, values[-1]), rtol=1e-10)
        assert model.gbar == pytest.approx(mdp.discount**length)


def test_the_gridworld_pays_once_at_its_goal() -> None:
    mdp = gridworld(3, goal=8, slip=0.0, discount=0.9)
    values = optimal_values(option_model(mdp, primitive_options(mdp)))
    distance = np.array([4, 3, 2, 3, 2, 1, 2, 1])
    np.testing.assert_allclose(values[:8], 0.9 ** (distance - 1))
    assert values[8] == 0


def test_wrong_shapes_and_distributions_are_refused() -> None:
    mdp = small()
    with pytest.raises(ValueError, match="distribution"):
        MDP(mdp.transition * 0.5, mdp.reward, 0.9)
    with pytest.raises(ValueError, match="discount"):
        MDP(mdp.transition, mdp.reward, 1.0)
    with pytest.raises(ValueError, match="does not go with"):
        MDP(mdp.transition, mdp.reward.T, 0.9)
    with pytest.raises(ValueError, match="able to end"):
        Option(np.ones((1, 5, 1)), np.zeros(5))
