"""Megatron's optimizer step in two halves, so that the gradient norm is known before anything moves.

`prepare` and `move` together are `ChainedOptimizer.step`, call for call. Between them nothing has changed but the
gradients, so a step that ends there has not been.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from ra3_megatron.mcore.startup import Runtime


def prepare(optimizer: Any) -> float:
    """Bring the gradients to the main parameters; their norm over the whole model, before clipping. Collective."""
    found_inf = optimizer.prepare_grads()  # only with a loss scale, which fp16 alone has
    norm = optimizer.get_grad_norm()
    return math.inf if found_inf else float(norm or 0.0)


def move(optimizer: Any, norm: float) -> None:
    """Clip the gradients, whose norm is known, and take the step. Collective."""
    for part in optimizer.chained_optimizers:
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=norm,
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()


def agreed(values: Sequence[float], runtime: Runtime) -> list[float]:
    """The largest of each value on any process; one that is not finite anywhere is finite nowhere. Collective.

    What is decided by them is decided alike, whichever process a value went wrong on.
    """
    if runtime.world_size == 1:
        return list(values)
    largest = torch.tensor([v if math.isfinite(v) else math.inf for v in values], dtype=torch.float64)
    largest = largest.to(runtime.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return [mine if not math.isfinite(mine) else all_ for mine, all_ in zip(values, largest.tolist(), strict=True)]
