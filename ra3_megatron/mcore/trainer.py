"""One trainer core: the E-step, the M-step, NTP and RLVR are different ways to fill a TokenBatch.

Everything runs through Megatron's forward-backward schedule, DDP, optimizer and learning-rate scheduler. Gradients are
summed (not averaged) over data-parallel ranks, because the loss is normalised by global counts already.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.config.training import OptimizerConfig
from ra3_megatron.mcore.batch import TokenBatch
from ra3_megatron.mcore.loss import Counts, PolicyLoss, Stat, local_counts, stream_loss
from ra3_megatron.mcore.startup import Runtime


class NonFiniteLoss(RuntimeError):
    """The loss of a step or its gradient is NaN or infinite: the weights are not to be used any more."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, over the global batch."""

    loss: float
    grad_norm: float
    learning_rate: float
    stats: dict[Stat, float]

    def mean(self, total: Stat, count: Stat) -> float | None:
        """stats[total] / stats[count]; None when nothing was counted."""
        return self.stats[total] / self.stats[count] if self.stats[count] else None


class Trainer:
    """A model in Megatron's DDP with its optimizer and learning-rate schedule over `steps` steps."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: OptimizerConfig,
        parallel: ParallelConfig,
        runtime: Runtime,
        steps: int,
    ) -> None:
        config = get_model_config(model)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            use_distributed_optimizer=parallel.distributed_optimizer,
            average_in_collective=False,
        )
        self.runtime = runtime
        self.model = DistributedDataParallel(config=config, ddp_config=ddp, module=model)
        self.optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=optimizer.learning_rate,
                min_lr=optimizer.min_learning_rate,
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.beta1,
                adam_beta2=optimizer.beta2,
                adam_eps=optimizer.epsilon,
                clip_grad=optimizer.clip_grad,
                bf16=config.bf16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=parallel.distributed_optimizer,
            ),
            [self.model],
            # no decay on vectors: norms (and biases, where an architecture has them)
            {ParamKey(name="*.bias", predicate=ParamPredicate(name="vector", fn=_is_vector)): {"wd_mult": 0.0}},
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=optimizer.learning_rate,
            min_lr=optimizer.min_learning_rate,
            lr_warmup_steps=int(optimizer.warmup_fraction * steps),
            lr_decay_steps=steps + 1,  # the last step still learns
            lr_decay_style=optimizer.schedule,
            start_wd=optimizer.weight_decay,
            end_wd=optimizer.weight_decay,
            wd_incr_steps=max(steps, 1),
            wd_incr_style="constant",
        )
        config.finalize_model_grads_func = _finalize

    def step(self, batches: Sequence[TokenBatch], policy: PolicyLoss | None = None) -> StepResult:
        """One optimizer step on this process's micro-batches (as many on every data-parallel rank).

        Raises NonFiniteLoss on every process when the loss or the gradient norm is not finite.
        """
        batches = [b.to(self.runtime.device) for b in batches]
        counts = global_counts(batches, self.runtime)
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = _run(self.model, batches, partial(_training_loss, counts=counts, policy=policy or PolicyLoss()))
        sums = torch.stack(results).double().sum(0)
        if self.runtime.data_size > 1:
            dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        stats = {stat: float(sums[stat]) for stat in Stat}
        if not torch.isfinite(sums).all():
            raise NonFiniteLoss(f"loss is {stats[Stat.LOSS]}")
        self.scheduler.step(increment=1)
        learning_rate = max(group["lr"] for group in self.optimizer.param_groups)
        _, norm, _ = self.optimizer.step()
        grad_norm = float(norm or 0.0)
        if not math.isfinite(grad_norm):
            raise NonFiniteLoss(f"gradient norm is {grad_norm}")
        return StepResult(stats[Stat.LOSS], grad_norm, float(learning_rate), stats)


def global_counts(batches: Sequence[TokenBatch], runtime: Runtime) -> Counts:
    """Normalisers over every data-parallel rank's batches."""
    counts = local_counts(list(batches))
    if runtime.data_size > 1:
        dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    return Counts(ce=float(counts[0]), decisions=float(counts[1]))


@torch.no_grad()
def forward(model: torch.nn.Module, batches: Sequence[TokenBatch], runtime: Runtime) -> list[Tensor]:
    """LanguageModel outputs, fp32 [3, b, s] each, of this process's batches, without gradients."""
    if not batches:
        return []
    training = model.training
    model.eval()
    try:
        return _run(model, [b.to(runtime.device) for b in batches], None)
    finally:
        model.train(training)


def _run(model: torch.nn.Module, batches: Sequence[TokenBatch], loss: Any) -> list[Tensor]:
    def forward_step(iterator: Iterator[TokenBatch], network: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)
        return network(batch), partial(_keep if loss is None else loss, batch=batch)

    results: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=batches[0].ids.shape[1],
        micro_batch_size=batches[0].ids.shape[0],
        forward_only=loss is None,
        collect_non_loss_data=loss is None,
    )
    return results


def _training_loss(out: Tensor, batch: TokenBatch, counts: Counts, policy: PolicyLoss) -> tuple[Tensor, Tensor, Tensor]:
    loss, stats = stream_loss(out, batch, counts, policy)
    return loss, torch.zeros((), dtype=torch.int, device=out.device), stats


def _keep(out: Tensor, batch: TokenBatch, non_loss_data: bool) -> Tensor:
    return out


def _finalize(model: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
    finalize_model_grads(model, None, **kwargs)  # the loss is normalised by global counts already


def _is_vector(parameter: torch.nn.Parameter) -> bool:
    return parameter.dim() == 1
