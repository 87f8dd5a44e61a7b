"""Log-probabilities and entropies of events over a vocabulary that is split over the tensor-parallel group.

An *event* at a position is "the next token is in A, given that it is in B", A and B sets of tokens:

    log P(A | B) = logsumexp_{v in A} x_v - logsumexp_{v in B} x_v,      A a subset of B

This one form covers next-token prediction (A = {target}, B = everything), a thought token sampled from the allowed
tokens (A = {target}, B = allowed), the decision <act> of the comment format (A = tokens that start no thought, B =
everything) and the expert's first visible token renormalised over tokens that start no thought (A = {target}, B =
those tokens): see method.md, Objective.

The entropy of a choice at a position is that of the distribution over B in which the tokens of a *merged* set M are
one outcome ("no thought"): H = -P_M log P_M - sum_{v in B \\ M} p_v log p_v.

One MAX and one SUM all-reduce of a few numbers a position; the vocabulary is never gathered. Arithmetic is fp32.
Shapes: n positions, V_local = this rank's share of the padded vocabulary, R rows of the table of token sets.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TARGET = -1
"""Value of `numerator` for A = {target}, and of `merged` for no merged set."""
ALL = 0
"""Row of the table of sets that holds every token."""


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's share of the vocabulary."""

    start: int
    """First token id of the share."""
    real: int
    """Tokens of the share that exist; the rest is padding and has probability 0."""
    sets: Tensor
    """Token sets, bool [R, V_local], False on padding; row 0 is every token."""
    group: dist.ProcessGroup | None
    """Tensor-parallel group; None: the vocabulary is whole."""


def shard_sets(sets: Tensor, size: int, rank: int, world: int, group: dist.ProcessGroup | None) -> VocabularyShard:
    """The share of `rank` in token sets [R, vocab], for a vocabulary padded to `size` and split over `world` ranks."""
    local = size // world
    start = rank * local
    real = max(0, min(sets.shape[1] - start, local))
    share = torch.zeros(sets.shape[0], local, dtype=torch.bool, device=sets.device)
    share[:, :real] = sets[:, start : start + real]
    return VocabularyShard(start=start, real=real, sets=share, group=group if world > 1 else None)


def event_log_probs(
    logits: Tensor,
    targets: Tensor,
    shard: VocabularyShard,
    numerator: Tensor | None = None,
    denominator: Tensor | None = None,
    merged: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log P(A | B) and the entropy of the choice at each position.

    logits: [n, V_local]; targets: [n] token ids; numerator, denominator, merged: [n] rows of `shard.sets`
    (TARGET / ALL / TARGET everywhere when None). Returns two fp32 tensors [n]; both are differentiable.
    """
    return _EventLogProbs.apply(logits, targets, shard, numerator, denominator, merged)


class _EventLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        shard: VocabularyShard,
        numerator: Tensor | None,
        denominator: Tensor | None,
        merged: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        n = logits.shape[0]
        none = torch.empty(0, dtype=torch.long, device=logits.device)
        in_set = none if numerator is None else torch.nonzero(numerator != TARGET).flatten()
        in_merged = none if merged is None else torch.nonzero(merged != TARGET).flatten()
        x = logits.float()
        if x is logits:
            x = x.clone()
        x[:, shard.real :] = -torch.inf
        if denominator is not None:
            rows = torch.nonzero(denominator != ALL).flatten()
            if len(rows):
                x[rows] = x[rows].masked_fill(~shard.sets[denominator[rows]], -torch.inf)
        event = None
        if len(in_set):
            assert numerator is not None
            event = x[in_set].masked_fill(~shard.sets[numerator[in_set]], -torch.inf)

        peaks = [x.amax(-1)] + ([] if event is None else [event.amax(-1)])
        peak = _all_reduce(torch.cat(peaks), dist.ReduceOp.MAX, shard)
        top, top_event = peak[:n], peak[n:]
        shifted = x.sub_(top[:, None])
        weight = shifted.exp()  # exp(x - top), turned into probabilities below
        logged = weight * shifted.clamp_min(-1e4)  # 0 * -1e4 = 0 where the token is excluded
        local = targets - shard.start
        mine = (local >= 0) & (local < shard.real)
        at_target = shifted.gather(1, local.clamp(0, x.shape[1] - 1)[:, None])[:, 0]
        at_target = torch.where(mine, at_target, torch.zeros_like(at_target))
        total = weight.sum(-1)
        expected = logged.sum(-1)
        parts = [total, at_target, expected]
        merged_mask = None
        if len(in_merged):
            assert merged is not None
            merged_mask = shard.sets[merged[in_merged]]
            parts += [(weight[in_merged] * merged_mask).sum(-1), (logged[in_merged] * merged_mask).sum(-1)]
        event_weight = None
        if event is not None:
            event_weight = (event - top_event[:, None]).exp()
            parts.append(event_weight.sum(-1))
        reduced = _all_reduce(torch.cat(parts), dist.ReduceOp.SUM, shard)
        sizes = [n, n, n] + [len(in_merged)] * (2 if merged_mask is not None else 0)
        sizes += [len(in_set)] if event is not None else []
        pieces = list(reduced.split(sizes))
        total, at_target, expected = pieces[:3]
        log_total = total.log()
        log_prob = at_target - log_total
        # H = -sum p log p = log Z - E[x - top]; merging M replaces its inner terms by one outcome
        entropy = log_total - expected / total
        log_merged = None
        if merged_mask is not None:
            mass, inner = pieces[3], pieces[4]
            p_merged = mass / total[in_merged]
            log_merged = p_merged.clamp_min(torch.finfo(torch.float32).tiny).log()
            unmerged = inner / total[in_merged] - p_merged * log_total[in_merged]
            entropy[in_merged] += unmerged - p_merged * log_merged
        if event is not None:
            log_prob[in_set] = pieces[-1].log() + top_event - top[in_set] - log_total[in_set]
        ctx.shard = shard
        ctx.dtype = logits.dtype
        probability = weight.div_(total[:, None])
        share = None if event_weight is None else event_weight.div_(pieces[-1][:, None])
        ctx.save_for_backward(probability, local, mine, in_set, in_merged, entropy, share, log_merged, merged_mask)
        return log_prob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_log_prob, grad_entropy = grads
        probability, local, mine, in_set, in_merged, entropy, share, log_merged, merged_mask = ctx.saved_tensors
        # d log P(A|B) / dx = 1_A p / P_A - 1_B p
        grad = probability * -grad_log_prob[:, None]
        single = torch.ones_like(mine)
        single[in_set] = False
        rows = torch.nonzero(mine & single).flatten()
        grad[rows, local[rows]] += grad_log_prob[rows]
        if share is not None:
            grad[in_set] += share * grad_log_prob[in_set][:, None]
        # dH / dx_v = -p_v (log P(outcome of v) + H)
        if bool(grad_entropy.any()):
            rows = torch.nonzero(grad_entropy).flatten()
            p = probability[rows]
            outcome = p.clamp_min(torch.finfo(torch.float32).tiny).log()
            if merged_mask is not None:
                where = torch.full((probability.shape[0],), -1, dtype=torch.long, device=p.device)
                where[in_merged] = torch.arange(len(in_merged), device=p.device)
                here = torch.nonzero(where[rows] >= 0).flatten()
                source = where[rows[here]]
                outcome[here] = torch.where(merged_mask[source], log_merged[source][:, None], outcome[here])
            grad[rows] -= p * (outcome + entropy[rows][:, None]) * grad_entropy[rows][:, None]
        return grad.to(ctx.dtype), None, None, None, None, None


def _all_reduce(values: Tensor, op: Any, shard: VocabularyShard) -> Tensor:
    if shard.group is not None:
        dist.all_reduce(values, op=op, group=shard.group)
    return values
