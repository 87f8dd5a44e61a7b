"""Output layer and events in one, on GPUs: what `event_log_probs` computes, from hidden states.

The logits are read once, and become their own gradient where they lie (`held_logits`). See `vocab_parallel` for what an
event, its entropy and its margin are.

Shapes: n positions, V_local = this rank's share of the padded vocabulary, R rows of the table of token sets.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ra3_megatron.mcore.held_logits import HeldLogits
from ra3_megatron.mcore.vocab_parallel import ALL, TARGET, VocabularyShard, at_columns

TINY = torch.finfo(torch.float32).tiny
NO_SET = -1
"""In the place of a row of the table of sets."""


@dataclass(frozen=True)
class EventRows:
    """The events of n positions, as the kernels take them."""

    targets: Tensor
    """Token ids, long [n]."""
    numerator: Tensor
    """long [n]; NO_SET: the target."""
    denominator: Tensor
    """long [n]; NO_SET: every token."""
    merged: Tensor
    """long [n]; NO_SET: none."""
    temperature: float

    @classmethod
    def of(
        cls,
        targets: Tensor,
        numerator: Tensor | None,
        denominator: Tensor | None,
        merged: Tensor | None,
        temperature: float,
    ) -> "EventRows":
        """From rows of `shard.sets` as `event_log_probs` takes them."""
        none = torch.full_like(targets, NO_SET)
        return cls(
            targets,
            none if numerator is None else numerator.masked_fill(numerator == TARGET, NO_SET),
            none if denominator is None else denominator.masked_fill(denominator == ALL, NO_SET),
            none if merged is None else merged.masked_fill(merged == TARGET, NO_SET),
            temperature,
        )


def hidden_events(
    hidden: Tensor, weight: Tensor, events: EventRows, shard: VocabularyShard, keep: bool, positions: int
) -> tuple[Tensor, Tensor, Tensor]:
    """log P(A | B), the entropy of the choice, and the margin of the target, fp32 [n] each; the first two are
    differentiable, once.

    hidden: [n, hidden]; weight: [V_local, hidden]; keep, positions: as in `target_log_probs`.
    """
    found: tuple[Tensor, Tensor, Tensor] = _HiddenEvents.apply(hidden, weight, events, shard, keep, positions)
    return found


class _HiddenEvents(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, events: EventRows, shard: VocabularyShard, keep: bool, positions: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        from ra3_megatron.mcore.triton_kernels import event_statistics

        n = hidden.shape[0]
        local = shard.columns(events.targets)
        logits_of = HeldLogits(hidden, weight, keep and any(ctx.needs_input_grad[:2]), positions)
        found = torch.empty(7, n, dtype=torch.float32, device=hidden.device)
        at_target = torch.empty(n, dtype=torch.float32, device=hidden.device)
        for part, logits in logits_of.forward(hidden, weight):
            rows = (events.numerator[part], events.denominator[part], events.merged[part])
            found[:, part] = event_statistics(logits, shard.sets, *rows, events.temperature, shard.real)
            at_target[part] = at_columns(logits, local[part]) / events.temperature
        at_target.masked_fill_(_excluded(events, local, shard), -torch.inf)
        top, total, weighted, total_m, weighted_m, top_a, total_a = _over_ranks(found, shard).unbind()
        if shard.group is not None:
            dist.all_reduce(at_target, op=dist.ReduceOp.SUM, group=shard.group)
        log_total = total.log()
        margin = at_target - top
        set_log_prob = total_a.log() + top_a - top - log_total
        log_prob = torch.where(events.numerator == NO_SET, margin - log_total, set_log_prob)
        # H = -sum p log p = log Z - E[y - top]; merging M replaces its inner terms by one outcome
        p_merged = total_m / total
        log_merged = p_merged.clamp_min(TINY).log()
        unmerged = weighted_m / total - p_merged * log_total
        entropy = log_total - weighted / total
        entropy = torch.where(events.merged == NO_SET, entropy, entropy + unmerged - p_merged * log_merged)
        log_a = torch.where(events.numerator == NO_SET, 0.0, total_a.log() + top_a)
        ctx.save_for_backward(hidden, weight, local, torch.stack((log_total + top, log_a, log_merged, entropy)))
        ctx.logits_of, ctx.events, ctx.shard = logits_of, events, shard
        ctx.mark_non_differentiable(margin)
        return log_prob, entropy, margin

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from ra3_megatron.mcore.triton_kernels import event_gradient_

        hidden, weight, local, known = ctx.saved_tensors
        events, shard = ctx.events, ctx.shard
        rows = torch.cat((torch.stack(gradients[:2]).float(), known))

        def differentiate(part: slice, logits: Tensor) -> None:
            event_gradient_(
                logits,
                shard.sets,
                events.numerator[part],
                events.denominator[part],
                events.merged[part],
                local[part],
                rows[:, part].contiguous(),
                events.temperature,
                shard.real,
            )

        return (*ctx.logits_of.backward(hidden, weight, differentiate), None, None, None, None)


def _excluded(events: EventRows, local: Tensor, shard: VocabularyShard) -> Tensor:
    """Whether the target is in this share of the vocabulary, and not in B. local: columns of the targets, or -1."""
    in_b = shard.sets[events.denominator.clamp_min(0), local.clamp_min(0)]
    return (events.denominator != NO_SET) & (local >= 0) & ~in_b


def _over_ranks(found: Tensor, shard: VocabularyShard) -> Tensor:
    """The statistics over the whole vocabulary, from those of each share: one MAX and one SUM."""
    if shard.group is None:
        return found
    top, total, weighted, total_m, weighted_m, top_a, total_a = found.unbind()
    peaks = torch.stack((top, top_a))
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX, group=shard.group)
    # a rank may hold no token of a set at all: its top is -inf, and its sums are 0
    moved, moved_a = (torch.where(own.isinf(), 0.0, own - all_) for own, all_ in zip((top, top_a), peaks, strict=True))
    scale = moved.exp()
    sums = torch.stack(
        (
            scale * total,
            scale * (weighted + moved * total),
            scale * total_m,
            scale * (weighted_m + moved * total_m),
            moved_a.exp() * total_a,
        )
    )
    dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=shard.group)
    return torch.stack((peaks[0], *sums[:4], peaks[1], sums[4]))
