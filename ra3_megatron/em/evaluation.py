"""Held-out measurement of one model: as pi, and as the policy that samples the latents.

Every arm is measured on the same documents with the same random streams. Figures:

    code_ce      -log pi(code token | everything before it, thoughts included), nats per token of the expert's document
    raw_code_ce  the same on the documents without any thought: what next-token prediction is judged by
    code_accuracy, raw_code_accuracy
                 share of these code tokens that greedy decoding would write
    thought_ce   -log pi(thought token), nats per sampled token
    reward       mean r_t of a line, as in the E-step
    elbo         mean over lines of  log pi(a_t | s_t, z_t) (summed over the line) - c * 1[new thought], nats per line:
                 the objective with the fixed price of the paper's implementation, without the entropy of q

Comments of held-out documents that stand for thoughts (`corpus.human_comments=as_thoughts`) are left out, so that all
thoughts are the policy's own; with `evaluation.observed_thoughts` they stay, and q decides at the other lines only.

A line's first visible token is renormalised over the tokens that start no thought in both cases (method.md, What is
scored).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ra3_megatron.config.run import RunConfig
from ra3_megatron.corpus.indexed import to_document
from ra3_megatron.em import objective
from ra3_megatron.em.latent_context import contexts_of
from ra3_megatron.em.latent_stats import BlankTokens, latent_stats
from ra3_megatron.em.policy import LatentPolicy
from ra3_megatron.em.scoring import TokenScores, line_log_likelihoods, malformed_thoughts, token_scores
from ra3_megatron.report.held_out import DocumentFigures, LineFigures
from ra3_megatron.text.latents import raw
from ra3_megatron.text.tokenizer import Tokenizer
from ra3_megatron.text.transcript import Role, Transcript
from ra3_megatron.training.rows import Planner


@dataclass(frozen=True)
class Evaluation:
    """Held-out figures of one model, and what is behind them."""

    figures: dict[str, float | None]
    transcripts: list[Transcript]
    log_likelihoods: list[npt.NDArray[np.float32]]
    rewards: list[npt.NDArray[np.float32]]
    scores: list[TokenScores]
    """Of each transcript."""
    documents: Sequence[Transcript]
    """Without thoughts."""
    raw_scores: list[TokenScores]
    """Of each document."""

    def by_line(self, tokenizer: Tokenizer) -> list[DocumentFigures]:
        """The figures of each transcript, line by line."""
        samples = len(self.transcripts) // len(self.documents)
        return [
            DocumentFigures(
                document=transcript.document,
                sample=number % samples,
                lines=_line_figures(
                    transcript,
                    self.scores[number],
                    self.documents[number // samples],
                    self.raw_scores[number // samples],
                    tokenizer,
                ),
            )
            for number, transcript in enumerate(self.transcripts)
        ]


def evaluate(
    model: torch.nn.Module,
    policy: LatentPolicy,
    documents: Sequence[Transcript],
    keys: Sequence[Sequence[int]],
    config: RunConfig,
    blank: BlankTokens,
) -> Evaluation:
    """Measure `model` on held-out documents (transcripts without sampled thoughts). Collective."""
    runtime, latents = policy.runtime, policy.latents
    plain = [_without_thoughts(document, policy) for document in documents]
    observed = config.evaluation.observed_thoughts
    transcripts = policy.sample(documents if observed else plain, keys, config.evaluation.samples)
    planner = Planner(config, config.estep, runtime)

    def score(items: Sequence[Transcript]) -> list[TokenScores]:
        contexts = contexts_of(items, config.text.keep_latents, latents, policy.tokenizer)
        plan = planner.plan(contexts.sequences)
        return token_scores(model, items, plan, runtime, latents, everything=True, contexts=contexts)

    raw_scored, scored = score(plain), score(transcripts)
    settings = config.estep
    likelihoods, rewards, bounds = [], [], []
    for transcript, log_probs in zip(transcripts, [s.log_probs for s in scored], strict=True):
        likelihood = line_log_likelihoods(transcript, log_probs, settings.likelihood)
        malformed = malformed_thoughts(transcript, blank.empty)
        likelihoods.append(likelihood)
        rewards.append(_reward(likelihood, transcript.think, malformed, settings.latent_price, settings.format_penalty))
        total = line_log_likelihoods(transcript, log_probs, "sum")
        bounds.append(_reward(total, transcript.think, malformed, settings.latent_price, 0.0))
    stats = latent_stats(transcripts, blank)
    figures = {
        "code_ce": _mean(transcripts, [-s.log_probs for s in scored], [t.is_code for t in transcripts]),
        "raw_code_ce": _mean(plain, [-s.log_probs for s in raw_scored], [t.is_code for t in plain]),
        "code_accuracy": _mean(transcripts, [s.greedy for s in scored], [t.is_code for t in transcripts]),
        "raw_code_accuracy": _mean(plain, [s.greedy for s in raw_scored], [t.is_code for t in plain]),
        "thought_ce": _mean(
            transcripts, [-s.log_probs for s in scored], [t.roles == Role.THOUGHT for t in transcripts]
        ),
        "think_rate": stats.think_rate,
        "mean_thought_tokens": stats.mean_thought_tokens,
        "reward": float(np.concatenate(rewards).mean()),
        "elbo": float(np.concatenate(bounds).mean()),
    }
    return Evaluation(figures, transcripts, likelihoods, rewards, scored, plain, raw_scored)


def _without_thoughts(document: Transcript, policy: LatentPolicy) -> Transcript:
    """The document without the comments that stand for thoughts."""
    if not document.think.any():
        return document
    return raw(to_document(document, policy.latents, policy.tokenizer), policy.latents, policy.tokenizer)


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


def _mean(
    transcripts: Sequence[Transcript],
    values: Sequence[npt.NDArray[Any]],
    masks: Sequence[npt.NDArray[np.bool_]],
) -> float | None:
    """Mean over the tokens of `masks` that are no context; None without any."""
    total = count = 0.0
    for transcript, value, mask in zip(transcripts, values, masks, strict=True):
        counted = mask & (transcript.roles != Role.CONTEXT)
        total += float(value[counted].sum(dtype=np.float64))
        count += int(counted.sum())
    return total / count if count else None


def _line_figures(
    transcript: Transcript, scores: TokenScores, document: Transcript, raw: TokenScores, tokenizer: Tokenizer
) -> list[LineFigures]:
    lines = []
    for line in range(transcript.num_lines):
        here, there = transcript.lines == line, document.lines == line
        visible, raw_visible = here & (transcript.roles == Role.EXPERT), there & (document.roles == Role.EXPERT)
        layout, raw_layout = here & (transcript.roles == Role.LAYOUT), there & (document.roles == Role.LAYOUT)
        thought = transcript.thought_slice(line)
        lines.append(
            LineFigures(
                text=tokenizer.decode(transcript.ids[here & transcript.is_code].tolist()),
                thought=tokenizer.decode(transcript.ids[thought].tolist()).strip() if transcript.think[line] else None,
                offered=bool(transcript.offered[line]),
                tokens=int(visible.sum()),
                nll=-float(scores.log_probs[visible].sum()),
                raw_nll=-float(raw.log_probs[raw_visible].sum()),
                greedy=bool(scores.greedy[visible].all()),
                raw_greedy=bool(raw.greedy[raw_visible].all()),
                layout_nll=-float(scores.log_probs[layout].sum()),
                raw_layout_nll=-float(raw.log_probs[raw_layout].sum()),
                thought_nll=-float(scores.log_probs[thought].sum()),
            )
        )
    return lines
