"""One update of the policy from graded responses: GRPO and its relatives.

 1. A_i = reward_i minus a baseline, for the G responses to one problem (`advantages`).
 2. loss = - sum over tokens w_t [ min(r_t A_i, clip(r_t, 1 - e, 1 + e') A_i) + entropy bonus - KL ] / count,
    r_t = policy / behaviour at each sampled token, w_t from the loss of the recipe; prompts carry no gradient. With an
    importance cap r_t = policy / policy before the update (mcore/loss.py).

It is the train step of the E-step (`mcore/trainer.py`) with other weights in its streams.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ra3_megatron.config.run import RunConfig
from ra3_megatron.mcore.loss import PolicyLoss, Stat
from ra3_megatron.mcore.offload import on_device
from ra3_megatron.mcore.trainer import Trainer
from ra3_megatron.rlvr.advantages import advantages, recipe_of
from ra3_megatron.rlvr.batches import log_probs_of, policy_batches
from ra3_megatron.rlvr.responses import Response
from ra3_megatron.training.rows import Planner


class GRPO:
    """Updates the policy in `trainer`; `reference` is the frozen model of the KL term (None: there is no such term)."""

    def __init__(
        self, config: RunConfig, trainer: Trainer, reference: torch.nn.Module | None = None, allowed: int = 0
    ) -> None:
        """allowed: row of the table of token sets that responses were sampled from."""
        self.config = config.rlvr
        self.recipe = recipe_of(config.rlvr)
        self.temperature = config.rollout.temperature
        self.trainer = trainer
        self.runtime = trainer.runtime
        self.reference = reference
        self.allowed = allowed
        self.planner = Planner(config, config.rlvr, trainer.runtime)
        self.loss = PolicyLoss(self.config.clip_ratio, self.config.importance_cap, self.config.clip_ratio_high)

    def update(self, responses: Sequence[Response], rewards: Sequence[float]) -> dict[str, float]:
        """One update on responses that come in groups of G; metrics of it."""
        config, clock = self.config, self.trainer.clock
        grouped = torch.tensor(rewards, dtype=torch.float32).view(-1, config.group_size)
        earned = advantages(grouped, self.recipe).flatten().tolist()
        counted = [not (config.overlong == "mask" and response.cut) for response in responses]
        trained = [i for i, counts in enumerate(counted) if counts]
        learns = any(earned[i] != 0 for i in trained) or (
            bool(trained) and (config.entropy_coefficient > 0 or config.kl_coefficient > 0)
        )
        tokens = sum(responses[i].num_tokens for i in trained)
        metrics = {
            "tokens": float(tokens),
            "advantage_std": float(np.std([earned[i] for i in trained])) if trained else 0.0,
        }
        if not learns:
            rate = self.trainer.pass_over(config.updates_per_rollout)
            return {**metrics, "loss": 0.0, "grad_norm": 0.0, "learning_rate": rate, "updates": 0.0}
        kept = [responses[i] for i in trained]
        with clock.part("data"):
            plan = self.planner.plan(kept)
        reference = None
        if self.reference is not None:
            with clock.part("scoring"), on_device(self.reference):
                reference = log_probs_of(self.reference, kept, plan, self.runtime, self.temperature, self.allowed)
        with clock.part("data"):
            batches = policy_batches(
                kept,
                [earned[i] for i in trained],
                plan,
                self.runtime,
                self.recipe.loss,
                config.max_response_tokens,
                self.temperature,
                config.entropy_coefficient,
                config.kl_coefficient,
                reference,
                self.allowed,
            )
        results = self.trainer.passes(batches, self.loss, config.updates_per_rollout)
        first, result = results[0], results[-1]
        metrics |= {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "updates": float(len(results)),
            "entropy": first.mean(Stat.CHOICE_ENTROPY, Stat.CHOICES) or 0.0,
            "log_prob_mismatch": first.mean(Stat.MISMATCH, Stat.CHOICES) or 0.0,
            "log_prob_difference": first.mean(Stat.LOG_DIFFERENCE, Stat.CHOICES) or 0.0,
            "largest_log_prob_difference": first.stats[Stat.LARGEST_DIFFERENCE],
            "clip_fraction": result.mean(Stat.CLIPPED, Stat.CHOICES) or 0.0,
            "truncated_fraction": result.mean(Stat.TRUNCATED, Stat.CHOICES) or 0.0,
            "fill_rate": plan.fill_rate,
        }
        if reference is not None:
            metrics["kl"] = first.mean(Stat.KL, Stat.CHOICES) or 0.0
        return metrics
