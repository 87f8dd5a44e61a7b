"""Held-out measurement of one model: as pi, and as the policy that samples the latents.

Every arm is measured on the same documents with the same random streams. Figures:

    code_ce      -log pi(code token | everything before it, thoughts included), nats per token of the expert's document
    raw_code_ce  the same on the documents without thoughts: what next-token prediction is judged by
    thought_ce   -log pi(thought token), nats per sampled token
    reward       mean r_t of a line, as in the E-step
    elbo         mean over lines of  log pi(a_t | s_t, z_t) (summed over the line) - c * 1[new thought], nats per line:
                 the objective with the fixed price of the paper's implementation, without the entropy of q

A line's first visible token is renormalised over the tokens that start no thought in both cases (method.md, Objective).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ra3_megatron.config.run import RunConfig
from ra3_megatron.em import objective
from ra3_megatron.em.latent_stats import BlankTokens, latent_stats
from ra3_megatron.em.packing import Planner
from ra3_megatron.em.policy import LatentPolicy
from ra3_megatron.em.scoring import line_log_likelihoods, malformed_thoughts, token_log_probs
from ra3_megatron.text.transcript import Role, Transcript


@dataclass(frozen=True)
class Evaluation:
    """Held-out figures of one model, and the transcripts behind them."""

    figures: dict[str, float | None]
    transcripts: list[Transcript]
    log_likelihoods: list[npt.NDArray[np.float32]]
    rewards: list[npt.NDArray[np.float32]]


def evaluate(
    model: torch.nn.Module,
    policy: LatentPolicy,
    documents: Sequence[Transcript],
    keys: Sequence[Sequence[int]],
    config: RunConfig,
    blank: BlankTokens,
) -> Evaluation:
    """Measure `model` on held-out documents (transcripts without sampled thoughts). Collective."""
    transcripts = policy.sample(documents, keys, config.evaluation.samples)
    runtime, latents = policy.runtime, policy.latents
    planner = Planner(config, config.estep, runtime)

    def score(items: Sequence[Transcript]) -> list[npt.NDArray[np.float32]]:
        return token_log_probs(model, items, planner.plan(items), runtime, latents, everything=True)

    raw, scored = score(documents), score(transcripts)
    settings = config.estep
    likelihoods, rewards, bounds = [], [], []
    for transcript, log_probs in zip(transcripts, scored, strict=True):
        likelihood = line_log_likelihoods(transcript, log_probs, settings.likelihood)
        malformed = malformed_thoughts(transcript, blank.empty)
        likelihoods.append(likelihood)
        rewards.append(_reward(likelihood, transcript.think, malformed, settings.latent_price, settings.format_penalty))
        total = line_log_likelihoods(transcript, log_probs, "sum")
        bounds.append(_reward(total, transcript.think, malformed, settings.latent_price, 0.0))
    stats = latent_stats(transcripts, blank)
    figures = {
        "code_ce": _mean_nll(transcripts, scored, [t.is_code for t in transcripts]),
        "raw_code_ce": _mean_nll(documents, raw, [t.is_code for t in documents]),
        "thought_ce": _mean_nll(transcripts, scored, [t.roles == Role.THOUGHT for t in transcripts]),
        "think_rate": stats.think_rate,
        "mean_thought_tokens": stats.mean_thought_tokens,
        "reward": float(np.concatenate(rewards).mean()),
        "elbo": float(np.concatenate(bounds).mean()),
    }
    return Evaluation(figures, transcripts, likelihoods, rewards)


def _reward(
    likelihood: npt.NDArray[np.float32],
    think: npt.NDArray[np.bool_],
    malformed: npt.NDArray[np.bool_],
    price: float,
    penalty: float,
) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = objective.line_rewards(
        torch.from_numpy(likelihood), torch.from_numpy(think), torch.from_numpy(malformed), price, penalty
    ).numpy()
    return values


def _mean_nll(
    transcripts: Sequence[Transcript],
    log_probs: Sequence[npt.NDArray[np.float32]],
    masks: Sequence[npt.NDArray[np.bool_]],
) -> float | None:
    total = count = 0.0
    for transcript, values, mask in zip(transcripts, log_probs, masks, strict=True):
        counted = mask & (transcript.roles != Role.CONTEXT)
        total -= float(values[counted].sum(dtype=np.float64))
        count += int(counted.sum())
    return total / count if count else None
