"""Advantages of GRPO, Dr. GRPO, RLOO and REINFORCE against values by hand, and what each algorithm stands for."""

import pytest
import torch

from ra3_megatron.config.rlvr import RlvrConfig
from ra3_megatron.rlvr.advantages import EPSILON, Recipe, advantages, informative, recipe_of, token_weight

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])


def test_group_mean_and_standard_deviation() -> None:
    found = advantages(REWARDS, Recipe("group_mean", True, "token"))
    deviation = (3 / 16) ** 0.5
    assert found[0].tolist() == pytest.approx([0.75 / (deviation + EPSILON), *[-0.25 / (deviation + EPSILON)] * 3])
    assert found[1].tolist() == [0.0] * 4
    assert found[2].tolist() == pytest.approx([-1.0, -1.0, 1.0, 1.0], abs=1e-5)


def test_leave_one_out() -> None:
    found = advantages(REWARDS, Recipe("leave_one_out", False, "sequence"))
    assert found[0].tolist() == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    others = [(REWARDS[2].sum() - r) / 3 for r in REWARDS[2]]
    assert found[2].tolist() == pytest.approx([float(r - o) for r, o in zip(REWARDS[2], others, strict=True)])


def test_batch_mean_and_none() -> None:
    found = advantages(REWARDS, Recipe("batch_mean", False, "token"))
    assert found.mean().item() == pytest.approx(0, abs=1e-7) and found[1].tolist() == pytest.approx([5 / 12] * 4)
    assert torch.equal(advantages(REWARDS, Recipe("none", False, "token")), REWARDS)


def test_deviations_are_of_what_the_baseline_is_over() -> None:
    found = advantages(REWARDS, Recipe("batch_mean", True, "token"))
    plain = advantages(REWARDS, Recipe("batch_mean", False, "token"))
    torch.testing.assert_close(found, plain / (REWARDS.std(correction=0) + EPSILON))


def test_rewards_that_do_not_deviate_are_not_divided() -> None:
    same = torch.full((2, 3), 0.5)
    assert torch.equal(advantages(same, Recipe("none", True, "token")), same)


def test_what_has_a_gradient_is_not_left_out() -> None:
    for keys in ({"algorithm": "reinforce"}, {"baseline": "none"}):
        with pytest.raises(ValueError, match="which have a gradient with baseline="):
            RlvrConfig(dynamic_sampling=True, **keys)  # type: ignore[arg-type]
    RlvrConfig(dynamic_sampling=True, algorithm="reinforce", baseline="group_mean")


def test_groups_that_tell_something() -> None:
    assert informative(REWARDS).tolist() == [True, False, True]


def test_what_the_algorithms_stand_for() -> None:
    assert recipe_of(RlvrConfig()) == Recipe("group_mean", True, "token")
    assert recipe_of(RlvrConfig(algorithm="dr_grpo")) == Recipe("group_mean", False, "constant")
    assert recipe_of(RlvrConfig(algorithm="rloo")) == Recipe("leave_one_out", False, "constant")
    assert recipe_of(RlvrConfig(algorithm="reinforce")) == Recipe("batch_mean", False, "token")
    own = RlvrConfig(algorithm="dr_grpo", normalize_std=True, loss="token", baseline="none")
    assert recipe_of(own) == Recipe("none", True, "token")


@pytest.mark.parametrize(("loss", "expected"), [("token", 1.0), ("sequence", 1 / 5), ("constant", 1 / 20)])
def test_weight_of_a_token(loss: str, expected: float) -> None:
    assert token_weight(loss, 5, 20) == expected  # type: ignore[arg-type]
