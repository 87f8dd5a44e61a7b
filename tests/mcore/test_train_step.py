"""What a train step does, in one process: which tokens get gradient, the schedule, what a bad loss changes (nothing).

That every layout, and every way to deal out a batch, gives the same numbers is tested in tests/parallel.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.mcore.batch import TokenBatch
from ra3_megatron.mcore.loss import PolicyLoss
from ra3_megatron.mcore.model import language_model
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import forward
from tests.mcore.small_models import gradients, make_documents, make_trainer, pack_rows, put_in_rows, weights

SINGLE = ParallelConfig(threads=1)
POLICY = PolicyLoss(clip_ratio=5.0, importance_cap=2.0)


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


def test_learning_rate_schedule_and_no_decay_on_norms(runtime: Runtime) -> None:
    trainer = make_trainer(SINGLE, runtime, steps=4)
    batch = pack_rows(put_in_rows(make_documents(3, seed=3)))
    lr = [trainer.step([batch]).learning_rate for _ in range(4)]
    assert lr[0] == pytest.approx(1e-2), "the first of 4 steps is the whole warm-up"
    assert all(after < before for before, after in pairwise(lr))
    # cosine from step 1 of the warm-up to step 5, which is behind the last one: that one still learns
    assert lr == pytest.approx([1e-2 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])
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
