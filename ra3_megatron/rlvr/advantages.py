"""From rewards to advantages and weights: pure functions of tensors.

P problems of a batch, G responses to each. Sources: GRPO (arXiv 2402.03300), DAPO (arXiv 2503.14476), Dr. GRPO
(arXiv 2503.20783), RLOO (arXiv 2402.14740), REINFORCE with a baseline (Williams, 1992).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ra3_megatron.config.rlvr import RlvrConfig

Baseline = Literal["group_mean", "leave_one_out", "batch_mean", "none"]
Loss = Literal["token", "sequence", "constant"]

GROUP = ("group_mean", "leave_one_out")
"""Baselines over the responses to one problem."""

EPSILON = 1e-6
"""Added to a standard deviation before it divides."""


@dataclass(frozen=True)
class Recipe:
    """What an algorithm comes to."""

    baseline: Baseline
    normalize_std: bool
    loss: Loss


RECIPES: dict[str, Recipe] = {
    "grpo": Recipe("group_mean", True, "token"),
    "dr_grpo": Recipe("group_mean", False, "constant"),
    "rloo": Recipe("leave_one_out", False, "constant"),
    "reinforce": Recipe("batch_mean", False, "token"),
}


def recipe_of(config: RlvrConfig) -> Recipe:
    """The algorithm's recipe with the keys that were set."""
    recipe = RECIPES[config.algorithm]
    return Recipe(
        baseline=config.baseline or recipe.baseline,
        normalize_std=recipe.normalize_std if config.normalize_std is None else config.normalize_std,
        loss=config.loss or recipe.loss,
    )


def advantages(rewards: Tensor, recipe: Recipe) -> Tensor:
    """A of each response, fp32 [P, G], from rewards [P, G].

    The standard deviation is that of the rewards that the baseline is over: the group's, or the batch's (their number,
    not one less, in the denominator). Where it is 0, nothing is divided.
    """
    group = rewards.shape[1]
    mean = rewards.mean(1, keepdim=True)
    if recipe.baseline == "group_mean":
        centred = rewards - mean
    elif recipe.baseline == "leave_one_out":
        centred = (rewards - mean) * (group / (group - 1))
    elif recipe.baseline == "batch_mean":
        centred = rewards - rewards.mean()
    else:
        centred = rewards.clone()
    if recipe.normalize_std:
        of_group = recipe.baseline in GROUP
        deviation = rewards.std(1, keepdim=True, correction=0) if of_group else rewards.std(correction=0)
        centred = torch.where(deviation > 0, centred / (deviation + EPSILON), centred)
    return centred


def informative(rewards: Tensor) -> Tensor:
    """Groups whose rewards differ, bool [P]: the others have no gradient under a group's baseline."""
    return (rewards != rewards[:, :1]).any(1)


def token_weight(loss: Loss, tokens: int, max_tokens: int) -> float:
    """Weight of each token of a response of `tokens` tokens, in a sum that is divided by the number of tokens (`token`)
    or of responses (the others) of the batch."""
    if loss == "token":
        return 1.0
    return 1.0 / (tokens if loss == "sequence" else max_tokens)
