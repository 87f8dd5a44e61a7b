"""Output layer and log-softmax in one: log p(target) at many positions, for next-token prediction.

    log p(t | h) = w_t . h - log sum_v exp(w_v . h)

The logits are held in the type of the weights, and become their own gradient where they lie, so that neither fp32
copies of them nor a second product for the backward pass are needed (`keep=False`: they are computed again there, a few
positions at a time, for memory). What is rounded is what `event_log_probs` rounds: logits once, and their gradient.
Arithmetic on them is fp32.

Shapes: n positions, V_local = this rank's share of the padded vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ra3_megatron.mcore.hardware import has_triton
from ra3_megatron.mcore.vocab_parallel import VocabularyShard


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
        local = targets - shard.start
        mine = (local >= 0) & (local < shard.real)
        local = torch.where(mine, local, -1)
        keep = keep and any(ctx.needs_input_grad[:2])
        kept = hidden.new_empty(n if keep else min(n, positions), weight.shape[0])
        log_total = torch.empty(n, dtype=torch.float32, device=hidden.device)
        at_target = torch.zeros(n, dtype=torch.float32, device=hidden.device)
        for part in parts(n, positions):
            logits = kept[part] if keep else kept[: part.stop - part.start]
            torch.mm(hidden[part], weight.t(), out=logits)
            log_total[part] = _logsumexp(logits, shard.real)
            found = logits.gather(1, local[part].clamp_min(0)[:, None])[:, 0].float()
            at_target[part] = torch.where(mine[part], found, 0.0)
        log_total, at_target = _over_ranks(log_total, at_target, shard)
        ctx.save_for_backward(hidden, weight, local, log_total)
        ctx.kept, ctx.real, ctx.positions, ctx.spent = (kept if keep else None), shard.real, positions, False
        return at_target - log_total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("target_log_probs can be differentiated once: its logits became the gradient")
        ctx.spent = True
        hidden, weight, local, log_total = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        n, given = hidden.shape[0], gradients[0].float().contiguous()
        of_hidden = torch.empty_like(hidden)
        of_weight: Tensor | None = None
        buffer = hidden.new_empty(min(n, ctx.positions), weight.shape[0]) if kept is None else None
        for part in parts(n, ctx.positions):
            if kept is not None:
                logits = kept[part]
            else:
                assert buffer is not None
                logits = torch.mm(hidden[part], weight.t(), out=buffer[: part.stop - part.start])
            _gradient_(logits, log_total[part], local[part], given[part], ctx.real)
            torch.mm(logits, weight, out=of_hidden[part])
            if kept is None:
                of_weight = plus_product(of_weight, logits, hidden[part])
        if kept is not None:
            of_weight = plus_product(None, kept, hidden)
        return of_hidden, of_weight, None, None, None, None


def parts(n: int, positions: int) -> list[slice]:
    """Slices of so many positions that cover n."""
    return [slice(start, min(n, start + positions)) for start in range(0, n, positions)]


def plus_product(total: Tensor | None, gradient: Tensor, hidden: Tensor) -> Tensor:
    """Gradient of the weights: total + gradient^T hidden, in place where there is a total."""
    return gradient.t() @ hidden if total is None else total.addmm_(gradient.t(), hidden)


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
