"""The E-step: train the latent policy q by policy gradient against the frozen model pi.

One update (method.md, E-step):
 1. q samples G transcripts of each document: at every line boundary the decision, and the thought when it thinks;
    then the expert's line is teacher-forced.
 2. One forward pass of pi over the finished transcripts gives r_t = log pi(a_t | s_t, z_t) - c * 1[new thought].
 3. R_t = sum_{k<H} gamma^k r_{t+k}, and A_t = R_t minus the mean over the G transcripts of the same document and line.
 4. One step on - sum_t A_t log q(z_t | s_t), decisions and thoughts only: expert tokens carry no gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ra3_megatron.config.run import RunConfig
from ra3_megatron.corpus.indexed import to_document
from ra3_megatron.em import objective
from ra3_megatron.em.distinct import Distinct, distinct
from ra3_megatron.em.latent_context import Contexts, contexts_of
from ra3_megatron.em.latent_stats import BlankTokens, latent_stats
from ra3_megatron.em.packing import policy_batches
from ra3_megatron.em.policy import LatentPolicy
from ra3_megatron.em.scoring import line_log_likelihoods, malformed_thoughts, token_log_probs
from ra3_megatron.mcore.loss import PolicyLoss, Stat
from ra3_megatron.mcore.offload import on_device
from ra3_megatron.mcore.trainer import Trainer
from ra3_megatron.text.latents import raw
from ra3_megatron.text.transcript import Transcript
from ra3_megatron.training.rows import Planner

Lines = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rollouts:
    """The transcripts of one update, document by document, and what they earned: [lines] of each transcript."""

    transcripts: list[Transcript]
    log_likelihoods: list[Lines]
    rewards: list[Lines]
    advantages: list[Lines]


class EStep:
    """Updates q (in `trainer`) with rewards from the frozen `scorer`."""

    def __init__(
        self, config: RunConfig, policy: LatentPolicy, trainer: Trainer, scorer: torch.nn.Module, blank: BlankTokens
    ) -> None:
        self.config = config.estep
        self.temperature = config.rollout.temperature
        self.keep_latents = config.text.keep_latents
        self.policy = policy
        self.latents = policy.latents
        self.trainer = trainer
        self.scorer = scorer
        self.blank = blank
        self.runtime = trainer.runtime
        self.planner = Planner(config, config.estep, trainer.runtime)
        self.loss = PolicyLoss(self.config.clip_ratio, self.config.importance_cap)

    def step(self, documents: Sequence[Transcript], keys: Sequence[Sequence[int]]) -> tuple[dict[str, float], Rollouts]:
        """One update on these documents, from sampling on; metrics of it and the rollouts behind them."""
        self.trainer.synchronize()  # what samples reads the weights of the last update
        self.policy.publish(self.policy.weight_version + 1)
        return self.update(self.policy.sample(documents, keys, self.config.group_size))

    def update(self, transcripts: list[Transcript]) -> tuple[dict[str, float], Rollouts]:
        """One update on these transcripts, which come in groups of G; metrics of it, and what they earned."""
        different = self._distinct(transcripts)
        with self.trainer.clock.part("scoring"):
            rollouts = self.reward(transcripts, different)
        with self.trainer.clock.part("data"):
            contexts = self._contexts(different.transcripts)
            plan = self.planner.plan(contexts.sequences)
            batches = policy_batches(
                different.transcripts,
                different.summed(rollouts.advantages),
                plan,
                self.runtime,
                self.latents,
                self.config.entropy_coefficient,
                self.temperature,
                contexts,
                different.copies,
            )
        results = self.trainer.passes(batches, self.loss, self.config.updates_per_rollout)
        first, result = results[0], results[-1]
        metrics = {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "decision_entropy": first.mean(Stat.DECISION_ENTROPY, Stat.DECISIONS) or 0.0,
            "log_prob_mismatch": first.mean(Stat.MISMATCH, Stat.CHOICES) or 0.0,
            "log_prob_difference": first.mean(Stat.LOG_DIFFERENCE, Stat.CHOICES) or 0.0,
            "largest_log_prob_difference": first.stats[Stat.LARGEST_DIFFERENCE],
            "truncated_fraction": result.mean(Stat.TRUNCATED, Stat.CHOICES) or 0.0,
            "clip_fraction": result.mean(Stat.CLIPPED, Stat.CHOICES) or 0.0,
            "tokens": plan.tokens,  # equal transcripts count once, as they cost
            "fill_rate": plan.fill_rate,
            "distinct_transcripts": len(different.transcripts) / len(transcripts),
        }
        return metrics | self._describe(rollouts), rollouts

    def reward(self, transcripts: list[Transcript], different: Distinct | None = None) -> Rollouts:
        """Rewards and advantages of transcripts that come in groups of G. different: the distinct ones among them."""
        different = different or self._distinct(transcripts)
        contexts = self._contexts(different.transcripts)
        plan = self.planner.plan(contexts.sequences)
        with on_device(self.scorer):
            found = token_log_probs(
                self.scorer, different.transcripts, plan, self.runtime, self.latents, contexts=contexts
            )
        scores = [found[place] for place in different.which]
        plain = self.config.baseline == "no_thought" and self.config.estimator == "policy_gradient"
        without = self._without_thoughts(transcripts) if plain else None
        likelihoods, rewards, advantages = [], [], []
        for start in range(0, len(transcripts), self.config.group_size):
            group = transcripts[start : start + self.config.group_size]
            values = [
                line_log_likelihoods(t, s, self.config.likelihood)
                for t, s in zip(group, scores[start : start + self.config.group_size], strict=True)
            ]
            log_likelihood = torch.from_numpy(np.stack(values))
            think = torch.from_numpy(np.stack([t.think for t in group]))
            malformed = torch.from_numpy(np.stack([malformed_thoughts(t, self.blank.empty) for t in group]))
            reward = objective.line_rewards(
                log_likelihood, think, malformed, self.config.latent_price, self.config.format_penalty
            )
            likelihoods += list(log_likelihood.numpy())
            rewards += list(reward.numpy())
            advantages += list(self._advantages(reward, without[start // self.config.group_size] if without else None))
        if self.config.normalize_advantages:
            offered = torch.from_numpy(np.concatenate([t.offered for t in transcripts]))
            flat = objective.normalized(torch.cat(advantages), offered)
            advantages = list(flat.split([len(a) for a in advantages]))
        return Rollouts(transcripts, likelihoods, rewards, [a.numpy().astype(np.float32) for a in advantages])

    def _distinct(self, transcripts: Sequence[Transcript]) -> Distinct:
        """Those that an update scores and trains on."""
        return distinct(transcripts, None if self.config.clip_ratio is None else self.config.group_size)

    def _advantages(self, rewards: torch.Tensor, no_thought: torch.Tensor | None) -> torch.Tensor:
        """[G, T] of one document; no_thought: rewards of the document without thoughts, [T]."""
        horizon, discount = self.config.horizon, self.config.discount
        returns = objective.truncated_returns(rewards, horizon, discount)
        if self.config.estimator == "rejection_sampling":
            return objective.best_of_group(returns)
        plain = None if no_thought is None else objective.truncated_returns(no_thought, horizon, discount)
        return objective.group_advantages(returns, self.config.baseline, plain)

    def _without_thoughts(self, transcripts: Sequence[Transcript]) -> list[torch.Tensor]:
        """log pi of each line of each document (one a group) without thoughts, [lines]."""
        tokenizer = self.policy.tokenizer
        documents = [
            raw(to_document(t, self.latents, tokenizer), self.latents, tokenizer)
            for t in transcripts[:: self.config.group_size]
        ]
        with on_device(self.scorer):
            scores = token_log_probs(self.scorer, documents, self.planner.plan(documents), self.runtime, self.latents)
        return [
            torch.from_numpy(line_log_likelihoods(document, values, self.config.likelihood))
            for document, values in zip(documents, scores, strict=True)
        ]

    def _contexts(self, transcripts: Sequence[Transcript]) -> Contexts:
        """The sequences as which q and pi read these transcripts."""
        return contexts_of(transcripts, self.keep_latents, self.latents, self.policy.tokenizer)

    def _describe(self, rollouts: Rollouts) -> dict[str, float]:
        offered = np.concatenate([t.offered for t in rollouts.transcripts])
        advantages = np.concatenate(rollouts.advantages)[offered]
        return {
            "reward": float(np.concatenate(rollouts.rewards).mean()),
            "log_likelihood": float(np.concatenate(rollouts.log_likelihoods).mean()),
            "advantage_std": float(advantages.std()) if len(advantages) else 0.0,
            **latent_stats(rollouts.transcripts, self.blank).metrics(),
        }
