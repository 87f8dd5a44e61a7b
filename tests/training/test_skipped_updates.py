"""A NaN on one process of a layout: all skip the update, and weights and optimizer are as if it had not been."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.config.training import MonitorConfig
from ra3_megatron.mcore import optimizer_step, startup
from ra3_megatron.mcore.loss import PolicyLoss
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import StepResult, Trainer
from ra3_megatron.training.spikes import Spikes
from tests.mcore.small_models import MODEL, make_documents, make_trainer, micro_batches, put_in_rows, weights
from tests.processes import run_processes

LAYOUTS = {
    "tensor": ParallelConfig(tensor=2, threads=1),
    "data": ParallelConfig(
        data=2, distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True, threads=1
    ),
}


def take(trainer: Trainer, runtime: Runtime, seed: int, wrong: bool = False) -> StepResult:
    batches = micro_batches(put_in_rows(make_documents(12, seed=seed)), runtime, 2)
    if wrong and runtime.rank == 1:
        weight = batches[0].ce_weight
        assert weight is not None
        weight[weight > 0] = torch.nan
    return trainer.step(batches, PolicyLoss())


def optimizer_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Everything that the optimizer holds on this process: moments, main weights, counts of steps."""
    found = {}
    for number, group in enumerate(trainer.optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            found[f"{number}.{place}"] = parameter.detach().clone()
    for number, part in enumerate(trainer.optimizer.chained_optimizers):
        for place, state in enumerate(part.optimizer.state.values()):
            found |= {f"{number}.{place}.{name}": torch.as_tensor(value).clone() for name, value in state.items()}
    return found


def skip_in(layout: ParallelConfig, precision: str) -> bool:
    runtime = startup.initialize(layout, 1)
    loss, norm = optimizer_step.agreed([math.nan if runtime.rank else 1.0, 3.0 + runtime.rank], runtime)
    assert not math.isfinite(loss) and norm == 4.0, "what is seen on one process is judged by all"
    model = MODEL.model_copy(update={"precision": precision})

    def trained(with_nan: bool) -> dict[str, torch.Tensor]:
        trainer = make_trainer(layout, runtime, 4, model)
        spikes = Spikes(MonitorConfig(nonfinite="skip"))
        trainer.judge = spikes.judge
        take(trainer, runtime, 1)
        if with_nan:
            trainer.synchronize()
            before, held = weights(trainer.model, runtime), optimizer_of(trainer)
            result = take(trainer, runtime, 2, wrong=True)
            assert result.skipped, f"rank {runtime.rank}: {result}"
            assert len(set(runtime.gather_all(spikes.state_dict()["in_a_row"]))) == 1
            trainer.synchronize()
            same(before, weights(trainer.model, runtime))
            same(held, optimizer_of(trainer))
        else:
            trainer.scheduler.step(increment=1)  # the learning rate goes on
        result = take(trainer, runtime, 3)
        assert not result.skipped and spikes.state_dict()["norms"][1:] == [result.grad_norm]
        trainer.synchronize()
        return {**weights(trainer.model, runtime), "learning rate": torch.tensor(result.learning_rate)}

    same(trained(True), trained(False))
    return True


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys() and len(one) > 5
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.multiprocess
@pytest.mark.parametrize(("layout", "precision"), [("tensor", "fp32"), ("data", "bf16")])
def test_every_process_skips(layout: str, precision: str) -> None:
    assert run_processes(2, skip_in, LAYOUTS[layout], precision) == [True, True]
