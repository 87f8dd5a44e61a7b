"""Log-probabilities and entropies of events over a vocabulary that is split over the tensor-parallel group.

An *event* at a position is "the next token is in A, given that it is in B", A and B sets of tokens:

    log P(A | B) = logsumexp_{v in A} x_v - logsumexp_{v in B} x_v,      A a subset of B

This one form covers next-token prediction (A = {target}, B = everything), a thought token sampled from the allowed
tokens (A = {target}, B = allowed), the decision <act> of the comment format (A = tokens that start no thought, B =
everything) and the expert's first visible token renormalised over tokens that start no thought (A = {target}, B =
those tokens): see method.md, What is scored.

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
from torch.autograd.function import once_differentiable

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

    def columns(self, tokens: Tensor) -> Tensor:
        """Where tokens stand in this share, long; -1: in another one."""
        local = tokens - self.start
        return torch.where((local >= 0) & (local < self.real), local, -1)


def shard_sets(sets: Tensor, size: int, rank: int, world: int, group: dist.ProcessGroup | None) -> VocabularyShard:
    """The share of `rank` in token sets [R, vocab], for a vocabulary padded to `size` and split over `world` ranks."""
    local = size // world
    start = rank * local
    real = max(0, min(sets.shape[1] - start, local))
    share = torch.zeros(sets.shape[0], local, dtype=torch.bool, device=sets.device)
    share[:, :real] = sets[:, start : start + real]
    return VocabularyShard(start=start, real=real, sets=share, group=group if world > 1 else None)


def at_columns(logits: Tensor, columns: Tensor) -> Tensor:
    """The logit of each row in its column, fp32 [n]; 0 where that is -1. logits: [n, V_local]."""
    found = logits.gather(1, columns.clamp_min(0)[:, None])[:, 0].float()
    return torch.where(columns >= 0, found, 0.0)


def event_log_probs(
    logits: Tensor,
    targets: Tensor,
    shard: VocabularyShard,
    numerator: Tensor | None = None,
    denominator: Tensor | None = None,
    merged: Tensor | None = None,
    entropy: bool = True,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """log P(A | B), the entropy of the choice, and the margin of the target at each position.

    logits: [n, V_local]; targets: [n] token ids; numerator, denominator, merged: [n] rows of `shard.sets`
    (TARGET / ALL / TARGET everywhere when None). entropy=False: do not compute it (zeros are returned).
    overwrite=True: fp32 logits are scratch space; the caller must not use them again.
    Returns three fp32 tensors [n]; the first two are differentiable, once. The margin is log P(target | B) less that of
    the likeliest token of B: 0 where the target is what greedy decoding would write, negative elsewhere.
    """
    return _EventLogProbs.apply(logits, targets, shard, numerator, denominator, merged, entropy, overwrite)


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
        with_entropy: bool,
        overwrite: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = logits.shape[0]
        none = torch.empty(0, dtype=torch.long, device=logits.device)
        in_set = none if numerator is None else torch.nonzero(numerator != TARGET).flatten()
        in_merged = none if merged is None or not with_entropy else torch.nonzero(merged != TARGET).flatten()
        x = logits.float()
        if x is logits and not overwrite:
            x = x.clone()
        if shard.real < x.shape[1]:
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
        # a rank may hold no token of B at all: its -inf stay -inf
        shifted = x.sub_(top[:, None])
        local = shard.columns(targets)
        at_target = at_columns(shifted, local)
        logged = None
        if with_entropy:
            weight = shifted.exp()
            logged = shifted.clamp_min_(-1e4).mul_(weight)  # 0 * -1e4 = 0 where the token is excluded
        else:
            weight = shifted.exp_()
        parts = [weight.sum(-1), at_target]
        if logged is not None:
            parts.append(logged.sum(-1))
        merged_mask = None
        if len(in_merged):
            assert merged is not None and logged is not None
            merged_mask = shard.sets[merged[in_merged]]
            parts += [(weight[in_merged] * merged_mask).sum(-1), (logged[in_merged] * merged_mask).sum(-1)]
        event_weight = None
        if event is not None:
            event_weight = (event - top_event[:, None]).exp()
            parts.append(event_weight.sum(-1))
        pieces = _all_reduce(torch.cat(parts), dist.ReduceOp.SUM, shard).split([len(part) for part in parts])
        total = pieces[0]
        log_total = total.log()
        log_prob = pieces[1] - log_total
        entropy, log_merged = torch.zeros_like(log_prob), None
        if logged is not None:
            # H = -sum p log p = log Z - E[x - top]; merging M replaces its inner terms by one outcome
            entropy = log_total - pieces[2] / total
        if merged_mask is not None:
            p_merged = pieces[3] / total[in_merged]
            log_merged = p_merged.clamp_min(torch.finfo(torch.float32).tiny).log()
            unmerged = pieces[4] / total[in_merged] - p_merged * log_total[in_merged]
            entropy[in_merged] += unmerged - p_merged * log_merged
        if event is not None:
            log_prob[in_set] = pieces[-1].log() + top_event - top[in_set] - log_total[in_set]
        ctx.dtype = logits.dtype
        share = None if event_weight is None else event_weight.div_(pieces[-1][:, None])
        ctx.save_for_backward(weight, total, local, in_set, in_merged, entropy, share, log_merged, merged_mask)
        ctx.spent = False
        margin = pieces[1].clone()
        ctx.mark_non_differentiable(margin)
        return log_prob, entropy, margin

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("event_log_probs can be differentiated once: its probabilities became the gradient")
        ctx.spent = True
        grad_log_prob, grad_entropy, _ = grads
        weight, total, local, in_set, in_merged, entropy, share, log_merged, merged_mask = ctx.saved_tensors
        bonus = None
        rows = torch.nonzero(grad_entropy).flatten()
        if len(rows):
            # dH / dx_v = -p_v (log P(outcome of v) + H)
            p = weight[rows] / total[rows][:, None]
            outcome = p.clamp_min(torch.finfo(torch.float32).tiny).log()
            if merged_mask is not None:
                where = torch.full((weight.shape[0],), -1, dtype=torch.long, device=p.device)
                where[in_merged] = torch.arange(len(in_merged), device=p.device)
                here = torch.nonzero(where[rows] >= 0).flatten()
                source = where[rows[here]]
                outcome[here] = torch.where(merged_mask[source], log_merged[source][:, None], outcome[here])
            bonus = p * (outcome + entropy[rows][:, None]) * grad_entropy[rows][:, None]
        # d log P(A|B) / dx = 1_A p / P_A - 1_B p; the probabilities are overwritten by the gradient
        grad = weight.mul_((-grad_log_prob / total)[:, None])
        single = local >= 0
        single[in_set] = False
        at = torch.nonzero(single).flatten()
        grad[at, local[at]] += grad_log_prob[at]
        if share is not None:
            grad[in_set] += share * grad_log_prob[in_set][:, None]
        if bonus is not None:
            grad[rows] -= bonus
        return grad.to(ctx.dtype), None, None, None, None, None, None, None


def _all_reduce(values: Tensor, op: Any, shard: VocabularyShard) -> Tensor:
    if shard.group is not None:
        dist.all_reduce(values, op=op, group=shard.group)
    return values
