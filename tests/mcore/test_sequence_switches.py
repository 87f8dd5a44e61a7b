"""The sampler's passes under sequence parallelism, which cannot split single tokens: it is off inside a pass and on
again behind it, so training is undisturbed. (What is sampled in every layout: tests/parallel.)"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.mcore.loss import PolicyLoss
from ra3_megatron.mcore.model import language_model
from ra3_megatron.mcore.startup import Runtime, initialize
from tests.mcore.small_models import gradients, make_documents, make_trainer, micro_batches, put_in_rows
from tests.processes import run_processes

LAYOUTS = (ParallelConfig(tensor=2, threads=1), ParallelConfig(tensor=2, sequence=True, threads=1))


def switches(model: torch.nn.Module) -> dict[str, Any]:
    """Every attribute of a module or its configuration that speaks of splitting sequences."""
    found = {}
    for name, module in model.named_modules():
        for owner, values in ((name, vars(module)), (f"{name}.config", vars(getattr(module, "config", module)))):
            found |= {(owner, key): value for key, value in values.items() if "sequence_parallel" in key}
            found |= {(owner, key): value for key, value in values.items() if key == "reduce_scatter_embeddings"}
    return found


def train_around_a_pass(parallel: ParallelConfig, runtime: Runtime, sampling: bool) -> dict[str, Any]:
    trainer = make_trainer(parallel, runtime)
    batches = micro_batches(put_in_rows(make_documents(12, seed=1)), runtime, 2)
    if sampling:
        model = language_model(trainer.model)
        before = switches(model)
        split = {key: value for key, value in before.items() if key[1] == "sequence_parallel"}
        assert len(split) > 10 and set(split.values()) == {parallel.sequence}
        with torch.no_grad():
            assert model(batches[0], hidden_only=True).shape[0] == batches[0].ids.shape[1]
        with pytest.raises(RuntimeError), torch.no_grad():  # positions of another length than the ids
            model(replace(batches[0], positions=batches[0].positions[:, :3]), hidden_only=True)
        assert switches(model) == before, "also after a pass that failed"
    return {"loss": trainer.step(batches, PolicyLoss()).loss, **gradients(trainer, runtime)}


def in_two_processes() -> None:
    for parallel in LAYOUTS:
        runtime = initialize(parallel, seed=1)
        disturbed, plain = (train_around_a_pass(parallel, runtime, sampling) for sampling in (True, False))
        assert disturbed["loss"] == plain.pop("loss")
        assert all(torch.equal(disturbed[key], value) for key, value in plain.items())


@pytest.mark.multiprocess
def test_a_pass_of_the_sampler_leaves_training_as_it_was() -> None:
    run_processes(2, in_two_processes)
