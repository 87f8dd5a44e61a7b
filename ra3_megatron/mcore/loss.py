"""The one loss: a cross-entropy stream and a policy-gradient stream of per-token weights.

    loss = sum ce_weight * -log p(target) / N_ce
         - sum [objective(choice) + entropy_weight * H(choice) - kl_weight * k3(choice)] / N_decisions

N_ce (the summed weights) and N_decisions are counts over the *global* batch, so the loss and its gradient are the same
for any split into micro-batches and processes. The objective of a choice with advantage A is

    A log q                                  times min(q / q_behaviour, cap) without gradient, with a cap
    min(r A, clip(r, 1 - e, 1 + e') A)       r = q / q_behaviour, without a cap
    the same times min(q_old / q_behaviour, cap)     r = q / q_old, with one

The second is PPO (arXiv 1707.06347; e' > e: clip-higher of DAPO, arXiv 2503.14476). A cap (truncated importance
sampling) corrects for an engine, or older weights, that sampled: then q_old, the trainer's own probability before the
first update on these choices, is what the clip is about (decoupled PPO, arXiv 2110.00641), and no ratio counts twice.
k3 = d - log d - 1 with d = reference / q estimates KL(q || reference) without bias, and is never negative
(GRPO, arXiv 2402.03300).
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from ra3_megatron.mcore.batch import Kind, TokenBatch


@dataclass(frozen=True)
class PolicyLoss:
    """Choices of the policy-gradient objective."""

    clip_ratio: float | None = None
    importance_cap: float | None = None
    clip_ratio_high: float | None = None
    """Above 1; None: as below."""

    @property
    def needs_proximal(self) -> bool:
        """Whether updates behind the first one on the same choices need `TokenBatch.proximal`."""
        return self.clip_ratio is not None and self.importance_cap is not None


@dataclass(frozen=True)
class Counts:
    """Normalisers of the two streams over the global batch."""

    ce: float
    decisions: float


class Stat(IntEnum):
    """Sums that one micro-batch contributes to the step's metrics."""

    LOSS = 0
    CODE_NLL = 1
    CODE_TOKENS = 2
    THOUGHT_NLL = 3
    THOUGHT_TOKENS = 4
    CHOICES = 5
    MISMATCH = 6
    DECISIONS = 7
    DECISION_ENTROPY = 8
    CHOICE_ENTROPY = 9
    CLIPPED = 10
    """Choices that the clip leaves without a gradient."""
    LOG_DIFFERENCE = 11
    """|log q - log q_behaviour|."""
    TRUNCATED = 12
    """Choices whose importance weight is cut."""
    LARGEST_DIFFERENCE = 13
    """The largest |log q - log q_behaviour|: a maximum, not a sum."""
    KL = 14
    """k3 of each choice."""
    DECISION_NLL = 15
    """Of markers in the cross-entropy stream."""
    DECISION_TOKENS = 16


MAXIMA = [Stat.LARGEST_DIFFERENCE]
"""Those that are maxima over micro-batches and processes."""


_CE_STATS = {
    Kind.CODE: (Stat.CODE_NLL, Stat.CODE_TOKENS),
    Kind.THOUGHT: (Stat.THOUGHT_NLL, Stat.THOUGHT_TOKENS),
    Kind.DECISION: (Stat.DECISION_NLL, Stat.DECISION_TOKENS),
}


def local_counts(batches: list[TokenBatch]) -> Tensor:
    """This process's part of the normalisers, fp64 [2]."""
    ce = sum(float(b.ce_weight.double().sum()) for b in batches if b.ce_weight is not None)
    decisions = sum(float((b.decision * copies_of(b)).double().sum()) for b in batches if b.decision is not None)
    return torch.tensor([ce, decisions], dtype=torch.float64)


def copies_of(batch: TokenBatch) -> Tensor:
    """How many equal choices each one stands for, fp32 [b, s]."""
    if batch.copies is not None:
        return batch.copies
    return torch.ones(batch.ids.shape, dtype=torch.float32, device=batch.ids.device)


def stream_loss(out: Tensor, batch: TokenBatch, counts: Counts, policy: PolicyLoss) -> tuple[Tensor, Tensor]:
    """Loss of one micro-batch and its `Stat` sums.

    out: fp32 [STREAMS, b, s] of LanguageModel. Returns a scalar and fp32 [len(Stat)].
    """
    log_prob, choice_log_prob, entropy, _ = out
    loss = out.new_zeros(())
    stats = out.new_zeros(len(Stat))
    if batch.ce_weight is not None:
        loss = loss - (batch.ce_weight * log_prob).sum() / max(counts.ce, 1e-30)
        weighted = batch.ce_weight > 0
        for kind, (nll, tokens) in _CE_STATS.items():
            if batch.kind is None and kind != Kind.CODE:
                continue
            counted = weighted if batch.kind is None else weighted & (batch.kind == kind)
            stats[nll], stats[tokens] = -_sum(log_prob, counted), counted.sum()
    if batch.choices is not None and batch.advantage is not None and batch.decision is not None:
        mask, copies = batch.choices.mask, copies_of(batch)
        difference = torch.zeros_like(choice_log_prob)
        ratio = torch.ones_like(choice_log_prob)
        if batch.behaviour is not None:
            difference = torch.where(mask, choice_log_prob - batch.behaviour, 0.0)
            ratio = difference.exp()
            stats[Stat.MISMATCH] = _sum((ratio - 1).abs() * copies, mask)
            sizes = difference.detach().abs()
            stats[Stat.LOG_DIFFERENCE], stats[Stat.LARGEST_DIFFERENCE] = (sizes * copies).sum(), sizes.max()
        log_importance = difference.detach()
        if policy.clip_ratio is None:
            objective = batch.advantage * choice_log_prob
        else:
            if policy.importance_cap is not None:
                old = choice_log_prob.detach() if batch.proximal is None else batch.proximal
                moved = torch.where(mask, choice_log_prob - old, 0.0)
                ratio = moved.exp()
                if batch.behaviour is not None:
                    log_importance = log_importance - moved.detach()
            clipped = ratio.clamp(1 - policy.clip_ratio, 1 + (policy.clip_ratio_high or policy.clip_ratio))
            objective = torch.minimum(ratio * batch.advantage, clipped * batch.advantage)
            stats[Stat.CLIPPED] = _sum(copies, mask & (clipped * batch.advantage < ratio * batch.advantage))
        if policy.importance_cap is not None:
            importance = log_importance.exp()
            objective = objective * importance.clamp(max=policy.importance_cap)
            stats[Stat.TRUNCATED] = _sum(copies, mask & (importance > policy.importance_cap))
        bonus = torch.zeros_like(entropy) if batch.entropy_weight is None else batch.entropy_weight * entropy
        if batch.reference is not None and batch.kl_weight is not None:
            log_ratio = torch.where(mask, batch.reference - choice_log_prob, 0.0)
            divergence = log_ratio.exp() - log_ratio - 1
            bonus = bonus - batch.kl_weight * divergence
            stats[Stat.KL] = (divergence.detach() * copies).sum()
        loss = loss - torch.where(mask, objective + bonus, 0.0).sum() / max(counts.decisions, 1e-30)
        stats[Stat.CHOICES], stats[Stat.DECISIONS] = _sum(copies, mask), _sum(copies, batch.decision)
        stats[Stat.CHOICE_ENTROPY] = _sum(entropy * copies, mask)
        stats[Stat.DECISION_ENTROPY] = _sum(entropy * copies, batch.decision & mask)
    stats[Stat.LOSS] = loss.detach()
    return loss, stats


def _sum(values: Tensor, where: Tensor) -> Tensor:
    """Over the places that count. (values[where] would have to wait for a GPU to learn how many there are.)"""
    return torch.where(where, values.detach(), 0.0).sum()
