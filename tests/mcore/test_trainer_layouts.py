"""Train steps at every layout of one, two and four processes: the same loss, gradients and weights.

Also: what a step does not depend on (micro-batches, padding, which rank holds what), and that a loss that is not
finite changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.mcore.batch import TokenBatch
from ra3_megatron.mcore.loss import PolicyLoss, Stat
from ra3_megatron.mcore.model import language_model
from ra3_megatron.mcore.startup import Runtime, initialize
from ra3_megatron.mcore.trainer import NonFiniteLoss, Trainer, forward
from tests.mcore.small_models import (
    MODEL,
    gradients,
    make_documents,
    make_trainer,
    micro_batches,
    pack_rows,
    put_in_rows,
    weights,
)
from tests.processes import run_processes

SINGLE = ParallelConfig(threads=1)
STEPS = 4
POLICY = PolicyLoss(clip_ratio=5.0, importance_cap=2.0)
TIED = MODEL.model_copy(update={"tied_embeddings": True})

LAYOUTS = {
    "tp2": ParallelConfig(tensor=2, threads=1),
    "tp2_sequence": ParallelConfig(tensor=2, sequence=True, threads=1),
    "dp2": ParallelConfig(data=2, threads=1),
    "dp2_distributed_optimizer": ParallelConfig(data=2, distributed_optimizer=True, threads=1),
    "tp2_dp2": ParallelConfig(tensor=2, data=2, threads=1),
    "tp2_sequence_dp2_distributed_optimizer": ParallelConfig(
        tensor=2, data=2, sequence=True, distributed_optimizer=True, threads=1
    ),
}


def train(
    parallel: ParallelConfig,
    runtime: Runtime,
    model: ModelConfig = MODEL,
    size: int = 2,
    uneven: bool = False,
    padding_rows: int = 0,
    shuffled: bool = False,
    steps: int = STEPS,
) -> dict[str, Any]:
    """Losses, norms and metrics of `steps` steps, the first step's gradients and the weights at the end."""
    trainer = make_trainer(parallel, runtime, model=model)
    results, first = [], {}
    for step in range(steps):
        documents = make_documents(24, seed=100 + step)
        if shuffled:
            documents = documents[::-1]
        rows = [*put_in_rows(documents), *([] for _ in range(padding_rows))]
        results.append(trainer.step(micro_batches(rows, runtime, size, uneven), POLICY))
        if step == 0:
            first = gradients(trainer, runtime)
    return {
        "loss": torch.tensor([r.loss for r in results]),
        "grad_norm": torch.tensor([r.grad_norm for r in results]),
        "learning_rate": torch.tensor([r.learning_rate for r in results]),
        "stats": torch.tensor([[r.stats[s] for s in Stat] for r in results]),
        "gradients": first,
        "weights": weights(trainer.model, runtime),
    }


def assert_same_training(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["grad_norm"], expected["grad_norm"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["stats"], expected["stats"], rtol=1e-4, atol=1e-3)
    assert torch.equal(found["learning_rate"], expected["learning_rate"])
    for kind, tolerance in (("gradients", 1e-6), ("weights", 1e-5)):
        assert found[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            difference = float((found[kind][name] - value).abs().max())
            assert difference < tolerance, f"{kind} of {name}: {difference:.1e}"


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    return train(SINGLE, initialize(SINGLE, seed=1))


@pytest.fixture(scope="module")
def reference_tied() -> dict[str, Any]:
    return train(SINGLE, initialize(SINGLE, seed=1), TIED)


# -- other layouts ----------------------------------------------------------------------------------------------------


def in_layouts(names: Sequence[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        runtime = initialize(LAYOUTS[name], seed=1)
        found[name] = train(LAYOUTS[name], runtime)
        found[name, "tied"] = train(LAYOUTS[name], runtime, TIED)
        if name == "dp2":
            found[name, "uneven"] = train(LAYOUTS[name], runtime, uneven=True)
        found[name, "not finite"] = not_finite(LAYOUTS[name], runtime)
    return found


@pytest.fixture(scope="module")
def layouts() -> dict[str, Any]:
    def of_size(size: int) -> list[str]:
        return [name for name, parallel in LAYOUTS.items() if parallel.world_size == size]

    two = run_processes(2, in_layouts, of_size(2))
    four = run_processes(4, in_layouts, of_size(4))
    return two[0] | four[0]


@pytest.mark.multiprocess
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_alike(
    layout: str, layouts: dict[str, Any], reference: dict[str, Any], reference_tied: dict[str, Any]
) -> None:
    assert_same_training(layouts[layout], reference)
    assert_same_training(layouts[layout, "tied"], reference_tied)


@pytest.mark.multiprocess
def test_ranks_with_unequal_shares_train_alike(layouts: dict[str, Any], reference: dict[str, Any]) -> None:
    """One rank has a single row, the other all the rest: counts are global, no mean of means."""
    assert_same_training(layouts["dp2", "uneven"], reference)


def test_the_reference_is_worth_comparing_with(reference: dict[str, Any]) -> None:
    """Both streams are filled, gradients are clipped, every weight moves."""
    stats = {stat: reference["stats"][:, stat] for stat in Stat}
    for stat in (Stat.CODE_TOKENS, Stat.THOUGHT_TOKENS, Stat.CHOICES, Stat.DECISIONS, Stat.CLIPPED):
        assert bool((stats[stat] > 3).all()), stat
    assert bool((reference["grad_norm"] > 0.6).all())
    assert all(float(g.abs().max()) > 1e-4 for g in reference["gradients"].values())
    initial = weights(make_trainer(SINGLE, initialize(SINGLE, seed=1)).model, initialize(SINGLE, seed=1))
    assert all(float((reference["weights"][n] - w).abs().max()) > 1e-3 for n, w in initial.items())


# -- what does not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{"size": 1}, {"size": 5}, {"padding_rows": 4}, {"shuffled": True}, {"size": 3, "padding_rows": 1}]
)
def test_the_split_of_the_batch_does_not_matter(
    runtime: Runtime, reference: dict[str, Any], change: dict[str, Any]
) -> None:
    assert_same_training(train(SINGLE, runtime, **change), reference)


# -- what a step does -------------------------------------------------------------------------------------------------


def output_gradient(batch: TokenBatch, runtime: Runtime) -> Tensor:
    """Gradient of the loss with respect to the logits' rows, [rows * length, hidden]: at the last hidden states."""
    trainer = make_trainer(SINGLE, runtime)
    found: list[Tensor] = []
    norm = language_model(trainer.model).decoder.final_layernorm

    def keep(_: Any, __: Any, out: Tensor) -> None:
        out.register_hook(found.append)

    handle = norm.register_forward_hook(keep)
    trainer.step([batch], POLICY)
    handle.remove()
    return found[0].transpose(0, 1)


def test_tokens_without_weight_get_exactly_no_gradient(runtime: Runtime) -> None:
    """The expert's tokens in the policy-gradient stream, tokens of weight 0 in the cross-entropy stream, padding."""
    batch = pack_rows(put_in_rows(make_documents(9, seed=3)))
    assert batch.choices is not None and batch.ce_weight is not None
    policy_only = replace(batch, ce_weight=None)
    cases = {
        "policy": (policy_only, batch.choices.mask),
        "ce": (replace(batch, choices=None, decision=None, advantage=None), batch.ce_weight > 0),
        "both": (batch, batch.choices.mask | (batch.ce_weight > 0)),
    }
    for name, (case, weighted) in cases.items():
        touched = (output_gradient(case, runtime) != 0).any(-1)
        assert torch.equal(touched & ~weighted, torch.zeros_like(weighted)), name
        assert int((touched & weighted).sum()) > 0.9 * int(weighted.sum()), name


def test_padding_has_no_probability_in_training(runtime: Runtime) -> None:
    trainer = make_trainer(SINGLE, runtime)
    trainer.step([pack_rows(put_in_rows(make_documents(9, seed=3)))], POLICY)
    grad = gradients(trainer, runtime)["output_layer.weight"]
    assert not grad[150:].any() and bool(grad[:150].any(-1).all())


def test_learning_rate_schedule_and_no_decay_on_norms(runtime: Runtime, reference: dict[str, Any]) -> None:
    lr = reference["learning_rate"]
    assert lr[0] == pytest.approx(1e-2), "the first of 4 steps is the whole warm-up"
    assert bool((lr[1:] < lr[:-1]).all())
    # cosine from step 1 of the warm-up to step 5, which is behind the last one: that one still learns
    assert lr.tolist() == pytest.approx([1e-2 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])
    decay = {
        (parameter.dim() == 1, float(group["wd_mult"]))
        for group in make_trainer(SINGLE, runtime).optimizer.param_groups
        for parameter in group["params"]
    }
    assert decay == {(True, 0.0), (False, 1.0)}


def test_a_step_learns(runtime: Runtime) -> None:
    trainer = make_trainer(SINGLE, runtime, steps=30)
    batch = pack_rows(put_in_rows(make_documents(9, seed=3)))
    case = replace(batch, choices=None, decision=None, advantage=None)
    losses = [trainer.step([case]).loss for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_forward_leaves_no_trace(runtime: Runtime) -> None:
    trainer = make_trainer(SINGLE, runtime)
    batches = [pack_rows([row]) for row in put_in_rows(make_documents(9, seed=3))]
    trainer.model.train()
    before = weights(trainer.model, runtime)
    outputs = forward(trainer.model, batches, runtime)
    assert len(outputs) == len(batches) and all(not out.requires_grad for out in outputs)
    assert trainer.model.training
    assert all(torch.equal(before[name], value) for name, value in weights(trainer.model, runtime).items())
    together = forward(trainer.model, [pack_rows(put_in_rows(make_documents(9, seed=3)))], runtime)[0]
    torch.testing.assert_close(torch.cat(outputs, dim=1), together, rtol=0, atol=1e-5)
    assert forward(trainer.model, [], runtime) == []


# -- losses that are not finite ---------------------------------------------------------------------------------------


def not_finite(parallel: ParallelConfig, runtime: Runtime) -> None:
    """A step whose loss is NaN on one data-parallel rank raises on all, and training goes on as if it had not been."""

    def steps(disturb: Callable[[Trainer], None] | None) -> dict[str, Tensor]:
        trainer = make_trainer(parallel, runtime)
        for step in range(3):
            rows = put_in_rows(make_documents(24, seed=100 + step))
            if disturb is not None and step == 1:
                disturb(trainer)
            result = trainer.step(micro_batches(rows, runtime, 2), POLICY)
        return {**weights(trainer.model, runtime), "loss": torch.tensor([result.loss, result.learning_rate])}

    def disturb(trainer: Trainer) -> None:
        batches = micro_batches(put_in_rows(make_documents(24, seed=9)), runtime, 2)
        if runtime.data_rank == 0:
            weight = batches[0].ce_weight
            assert weight is not None
            weight[0, 0] = torch.nan
        before = weights(trainer.model, runtime)
        with pytest.raises(NonFiniteLoss):
            trainer.step(batches, POLICY)
        assert all(torch.equal(before[name], value) for name, value in weights(trainer.model, runtime).items())

    expected, found = steps(None), steps(disturb)
    assert all(torch.equal(expected[name], value) for name, value in found.items())


def test_a_loss_that_is_not_finite_changes_nothing(runtime: Runtime) -> None:
    not_finite(SINGLE, runtime)
