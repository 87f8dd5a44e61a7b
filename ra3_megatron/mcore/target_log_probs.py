"""Output layer and log-softmax in one: log p(target) at many positions, for next-token prediction.

    log p(t | h) = w_t . h - log sum_v exp(w_v . h)

Neither fp32 copies of the logits nor a second product for the backward pass are needed (`held_logits`). What is rounded
is what `event_log_probs` rounds: logits once, and their gradient. Arithmetic on them is fp32.

Shapes: n positions, V_local = this rank's share of the padded vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ra3_megatron.mcore.hardware import has_triton
from ra3_megatron.mcore.held_logits import HeldLogits
from ra3_megatron.mcore.vocab_parallel import VocabularyShard, at_columns


def target_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard, keep: bool, positions: int
) -> Tensor:
    """log p(target), fp32 [n], differentiable once.

    hidden: [n, hidden]; weight: [V_local, hidden]; targets: [n] token ids of the whole vocabulary; keep: hold the
    logits of all positions for the backward pass; positions: how many are worked on at once where that is a choice.
    """
    out: Tensor = _TargetLogProbs.apply(hidden, weight, targets, shard, keep, positions)
    return out


class _TargetLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabularyShard, keep: bool, positions: int
    ) -> Tensor:
        n = hidden.shape[0]
        local = shard.columns(targets)
        logits_of = HeldLogits(hidden, weight, keep and any(ctx.needs_input_grad[:2]), positions)
        log_total = torch.empty(n, dtype=torch.float32, device=hidden.device)
        at_target = torch.empty(n, dtype=torch.float32, device=hidden.device)
        for part, logits in logits_of.forward(hidden, weight):
            log_total[part] = _logsumexp(logits, shard.real)
            at_target[part] = at_columns(logits, local[part])
        log_total, at_target = _over_ranks(log_total, at_target, shard)
        ctx.save_for_backward(hidden, weight, local, log_total)
        ctx.logits_of, ctx.real = logits_of, shard.real
        return at_target - log_total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, local, log_total = ctx.saved_tensors
        given = gradients[0].float().contiguous()

        def differentiate(part: slice, logits: Tensor) -> None:
            _gradient_(logits, log_total[part], local[part], given[part], ctx.real)

        return (*ctx.logits_of.backward(hidden, weight, differentiate), None, None, None, None)


def _logsumexp(logits: Tensor, real: int) -> Tensor:
    if logits.is_cuda and has_triton():
        from ra3_megatron.mcore import triton_kernels

        return triton_kernels.logsumexp(logits, real)
    if real == 0:  # this rank's share is padding
        return torch.full((len(logits),), -torch.inf, device=logits.device)
    return logits[:, :real].float().logsumexp(-1)


def _gradient_(logits: Tensor, log_total: Tensor, local: Tensor, given: Tensor, real: int) -> None:
    if logits.is_cuda and has_triton():
        from ra3_megatron.mcore import triton_kernels

        triton_kernels.log_softmax_gradient_(logits, log_total, local, given, real)
        return
    whole = logits[:, :real].float()  # fp32 logits: they themselves
    whole.sub_(log_total[:, None]).exp_().mul_(-given[:, None])
    at = torch.nonzero(local >= 0).flatten()
    whole[at, local[at]] += given[at]
    if whole.data_ptr() != logits.data_ptr():
        logits[:, :real] = whole
    logits[:, real:] = 0.0


def _over_ranks(log_total: Tensor, at_target: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """log sum exp over the whole vocabulary, and the targets' logits, from those of each share."""
    if shard.group is None:
        return log_total, at_target
    peak = log_total.clone()
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=shard.group)
    sums = torch.cat(((log_total - peak).exp(), at_target))
    dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=shard.group)
    total, at_target = sums.chunk(2)
    return total.log() + peak, at_target
