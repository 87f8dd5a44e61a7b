"""One trainer core: the E-step, the M-step, NTP and RLVR are different ways to fill a TokenBatch.

Everything runs through Megatron's forward-backward schedules, DDP, optimizer and learning-rate scheduler. Gradients
are summed (not averaged) over data- and context-parallel ranks, because the loss is normalised by global counts
already. Callers hand over whole rows; this module splits them over the context-parallel group.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.config.training import OptimizerConfig
from ra3_megatron.mcore import optimizer_step, watchdog
from ra3_megatron.mcore.batch import TokenBatch
from ra3_megatron.mcore.fp8 import DelayedScales
from ra3_megatron.mcore.loss import MAXIMA, Counts, PolicyLoss, Stat, local_counts, stream_loss
from ra3_megatron.mcore.model import STREAMS
from ra3_megatron.mcore.offload import Parking, optimizer_tensors
from ra3_megatron.mcore.sequence_split import gather_outputs
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.step_clock import StepClock


class RefusedStep(RuntimeError):
    """A step is not to be taken, and the run not to go on: the weights are those before it."""


class NonFiniteLoss(RefusedStep):
    """The loss of a step or its gradient is NaN or infinite."""


Judge = Callable[[float, float], str]
"""(loss, gradient norm) of an update, the same on every process -> why it is to be skipped; "": it is taken. May raise
RefusedStep."""


def refuse_nonfinite(loss: float, grad_norm: float) -> str:
    """The judge of a trainer that was given no other: NonFiniteLoss."""
    if not math.isfinite(loss):
        raise NonFiniteLoss(f"loss is {loss}")
    if not math.isfinite(grad_norm):
        raise NonFiniteLoss(f"gradient norm is {grad_norm}")
    return ""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, over the global batch."""

    loss: float
    grad_norm: float
    learning_rate: float
    stats: dict[Stat, float]
    skipped: str = ""
    """Why the weights did not move; "": they did."""

    def mean(self, total: Stat, count: Stat) -> float | None:
        """stats[total] / stats[count]; None when nothing was counted."""
        return self.stats[total] / self.stats[count] if self.stats[count] else None


class Trainer:
    """A model (`build_model`) in Megatron's DDP with its optimizer and learning-rate schedule over `steps` steps.

    A model has one trainer: DDP puts hooks on its parameters.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: OptimizerConfig,
        parallel: ParallelConfig,
        runtime: Runtime,
        steps: int,
    ) -> None:
        inner = _chunks(model)
        config = get_model_config(inner[0])
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            use_distributed_optimizer=parallel.distributed_optimizer,
            bucket_size=parallel.grad_bucket_size,
            fp8_param_gather=config.fp8_param,
            average_in_collective=False,
        )
        self.runtime = runtime
        self.clock = StepClock(runtime.device)
        """Says where the seconds of a step went, to whoever opens one on it."""
        self.judge: Judge = refuse_nonfinite
        self.may_skip = False
        """Whether `judge` may skip a step."""
        self._delayed_scales = config.fp8 is not None and config.fp8_recipe == "delayed"
        self.chunks = [
            # as Megatron does it: only the first chunk's gradients are worth reducing in parts
            DistributedDataParallel(config=config, ddp_config=ddp, module=chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(inner)
        ]
        self.model = torch.nn.ModuleList(self.chunks)
        fuse_weight_gradients(self.model)
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
                fp8_recipe=config.fp8_recipe if config.fp8 else None,
                use_distributed_optimizer=parallel.distributed_optimizer,
            ),
            self.chunks,
            # no decay on vectors: norms (and biases, where an architecture has them)
            {ParamKey(name="*.bias", predicate=ParamPredicate(name="vector", fn=_is_vector)): {"wd_mult": 0.0}},
        )
        self._parking: Parking | None = None
        if parallel.offload_optimizer:
            state = partial(optimizer_tensors, self.optimizer, self.model)
            self._parking = Parking(state, runtime.device, partial(self.clock.part, "optimizer"))
            with self._parking.resident():
                pass
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
        config.finalize_model_grads_func = partial(_finalize, clock=self.clock)
        config.timers = self.clock.timers
        if parallel.overlap_grad_reduce:
            functions = [chunk.no_sync for chunk in self.chunks]
            config.no_sync_func = functions if len(functions) > 1 else functions[0]

    def step(self, batches: Sequence[TokenBatch], policy: PolicyLoss | None = None) -> StepResult:
        """One optimizer step on this data-parallel rank's micro-batches (as many on every rank, of one shape).

        Every process asks `judge` the same question. When it skips the step, weights, optimizer and scales of FP8 (with
        `may_skip`) are as if the step had not been, and the learning rate goes on; when it raises RefusedStep, that
        does not either.
        """
        with self.clock.part("data"):
            shares = _shares(batches, self.runtime)
        counts = global_counts(shares, self.runtime)
        self.model.train()
        scales = DelayedScales(self.chunks) if self.may_skip and self._delayed_scales else None
        with self.clock.part("optimizer"):
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
        loss = partial(_training_loss, counts=counts, policy=policy or PolicyLoss())
        with self.clock.schedule(pipelined=self.runtime.pipeline_size > 1):
            results = _run(self.model, shares, self.runtime, loss)
        each = torch.zeros(1, len(Stat), dtype=torch.float64, device=self.runtime.device)
        if results:  # on the last pipeline stage
            each = torch.stack(results).double()
        sums, largest = each.sum(0), each[:, MAXIMA].amax(0)
        sums = self.runtime.sum_replicas(sums)
        sums[MAXIMA] = self.runtime.max_replicas(largest)
        sums = self.runtime.from_last_stage(sums)
        stats = {stat: float(sums[stat]) for stat in Stat}
        loss_seen = stats[Stat.LOSS] if bool(torch.isfinite(sums).all()) else math.nan
        with self.optimizer_resident():
            with self.clock.part("optimizer"):
                grad_norm = optimizer_step.prepare(self.optimizer)
            skipped = self.judge(*optimizer_step.agreed([loss_seen, grad_norm], self.runtime))
            self.scheduler.step(increment=1)
            learning_rate = max(group["lr"] for group in self.optimizer.param_groups)
            if not skipped:
                with self.clock.part("optimizer"):
                    optimizer_step.move(self.optimizer, grad_norm)
            elif scales is not None:
                scales.restore()
        return StepResult(stats[Stat.LOSS], grad_norm, float(learning_rate), stats, skipped)

    def passes(self, batches: Sequence[TokenBatch], policy: PolicyLoss, count: int) -> list[StepResult]:
        """`count` steps on the same choices, each as `step`."""
        if count > 1 and policy.needs_proximal:
            with self.clock.part("scoring"):
                found = forward(self.model, batches, self.runtime)
            batches = [
                replace(batch, proximal=out[1].to(batch.ids.device)) for batch, out in zip(batches, found, strict=True)
            ]
        return [self.step(batches, policy) for _ in range(count)]

    def pass_over(self, count: int = 1) -> float:
        """Steps with nothing to learn from: weights and optimizer stay, the learning rate goes on and is returned."""
        self.scheduler.step(increment=count)
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    @contextmanager
    def optimizer_resident(self) -> Iterator[None]:
        """Within it the optimizer's state is on the device: whoever reads or writes it opens this."""
        if self._parking is None:
            yield
            return
        with self._parking.resident():
            yield

    def synchronize(self) -> None:
        """Finish what `parallel.overlap_param_gather` leaves to the next step: before weights are read. Collective."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)
                # the copies of weights in FP8 that backward passes multiply: Megatron's hooks make them of what they
                # themselves have waited for alone
                rounded = [parameter for parameter in chunk.parameters() if is_float8tensor(parameter)]
                if rounded:
                    post_all_gather_processing(rounded)


def global_counts(batches: Sequence[TokenBatch], runtime: Runtime) -> Counts:
    """Normalisers over every rank's batches (its share of their rows)."""
    counts = runtime.sum_replicas(local_counts(list(batches)).to(runtime.device))
    return Counts(ce=float(counts[0]), decisions=float(counts[1]))


@torch.no_grad()
def forward(model: torch.nn.Module, batches: Sequence[TokenBatch], runtime: Runtime) -> list[Tensor]:
    """LanguageModel outputs, fp32 [STREAMS, b, s] each, of this data-parallel rank's batches, without gradients.

    Whole rows, on every pipeline stage.
    """
    if not batches:
        return []
    training = model.training
    model.eval()
    try:
        results = _run(model, _shares(batches, runtime), runtime, None)
    finally:
        model.train(training)
    if runtime.is_last_stage:
        outputs = torch.stack(results)
        if runtime.context_size > 1:
            outputs = gather_outputs(outputs, runtime.context_group)
    else:
        outputs = torch.empty(len(batches), STREAMS, *batches[0].ids.shape, device=runtime.device)
    return list(runtime.from_last_stage(outputs).unbind())


def _shares(batches: Sequence[TokenBatch], runtime: Runtime) -> list[TokenBatch]:
    """This context-parallel rank's share of the rows."""
    return [b.share(runtime.context_rank, runtime.context_size).placed().to(runtime.device) for b in batches]


def _chunks(model: torch.nn.Module) -> list[torch.nn.Module]:
    return list(model) if isinstance(model, torch.nn.ModuleList) else [model]


def _run(model: torch.nn.Module, batches: Sequence[TokenBatch], runtime: Runtime, loss: Any) -> list[Tensor]:
    """Megatron's schedule over all chunks and stages; what `loss` (or the model) gave, on the last stage."""

    def forward_step(iterator: Iterator[TokenBatch], network: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)
        return network(batch), partial(_keep if loss is None else loss, batch=batch)

    chunks = _chunks(model)
    if len(chunks) > 1 and len(batches) % runtime.pipeline_size:
        raise ValueError(f"{len(batches)} micro-batches on {runtime.pipeline_size} interleaved stages: not a multiple")
    rows, length = batches[0].ids.shape
    watchdog.touch()
    iterators = [iter(batches) for _ in chunks]
    results: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=length * runtime.context_size,
        micro_batch_size=rows,
        forward_only=loss is None,
        collect_non_loss_data=loss is None,
    )
    return results


def _training_loss(out: Tensor, batch: TokenBatch, counts: Counts, policy: PolicyLoss) -> tuple[Tensor, Tensor, Tensor]:
    loss, stats = stream_loss(out, batch, counts, policy)
    return loss, torch.zeros((), dtype=torch.int, device=out.device), stats


def _keep(out: Tensor, batch: TokenBatch, non_loss_data: bool) -> Tensor:
    return out


def _finalize(model: list[Any], num_tokens: Any = None, *, clock: StepClock, **kwargs: Any) -> None:
    with clock.part("grad_reduce"):
        finalize_model_grads(model, None, **kwargs)  # the loss is normalised by global counts already


def fuse_weight_gradients(model: torch.nn.Module) -> int:
    """Let Transformer Engine's layers of a model in DDP add weight gradients to the fp32 buffers in their matrix
    products; how many do.

    (Megatron's key for it, `gradient_accumulation_fusion`, would also ask for apex's kernel in the output layer, which
    is not computed that way here.)
    """
    fused = [module for module in model.modules() if hasattr(module, "fuse_wgrad_accumulation")]
    for module in fused:
        setattr(module, "fuse_wgrad_accumulation", True)  # noqa: B010
    return len(fused)


def _is_vector(parameter: torch.nn.Parameter) -> bool:
    return parameter.dim() == 1
