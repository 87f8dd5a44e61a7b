"""What the benchmarks count is what was computed. Nothing here is timed."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.fp8_rollouts import round_layers, rounded
from benchmarks.shares import KINDS, kind_of, shares


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::mm", "matrix products"),
        ("aten::mul", "other operations"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::copy_", "copies and casts"),
        ("aten::index_put_", "indexing"),
        ("aten::index_select", "copies and casts"),
        ("Optimizer.step#AdamW.step", "optimizer"),
    ],
)
def test_kinds_of_operations(operation: str, kind: str) -> None:
    assert kind_of(operation) == kind


def test_shares_sum_to_one_and_find_what_there_is() -> None:
    matrix = torch.randn(512, 512)
    products = shares(lambda: [matrix @ matrix for _ in range(5)], repeats=1)
    assert set(products.of) == set(KINDS) and abs(sum(products.of.values()) - 1) < 1e-9
    assert max(products.of, key=products.of.__getitem__) == "matrix products"
    waiting = shares(lambda: time.sleep(0.05), repeats=1)
    assert waiting.of["Python"] > 0.9 and waiting.seconds >= 0.05
    casts = shares(lambda: [matrix.to(torch.bfloat16) for _ in range(200)], repeats=1)
    assert casts.of["copies and casts"] > casts.of["matrix products"]
    assert casts.largest[0][0] == "aten::copy_"


@pytest.mark.parametrize("per_row", [True, False])
def test_fp8_rollouts_round_to_the_nearest_of_e4m3(per_row: bool) -> None:
    x = torch.randn(6, 64) * torch.logspace(-3, 3, 6)[:, None]
    found = rounded(x, per_row)
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()]
    for row, out in zip(x, found, strict=True):
        scale = (row if per_row else x).abs().max() / 448
        nearest = (row[:, None] / scale - numbers).abs().argmin(1)
        assert torch.allclose(out, numbers[nearest] * scale, rtol=1e-6, atol=0)
    assert torch.equal(found.abs().amax(), x.abs().amax()) and rounded(torch.zeros(2, 3), per_row).count_nonzero() == 0


def test_fp8_rollouts_round_weights_and_inputs_of_the_linear_layers_alone() -> None:
    model = torch.nn.ModuleDict({"linear_qkv": torch.nn.Linear(8, 4), "norm": torch.nn.LayerNorm(8)})
    before, x = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.randn(3, 8)
    assert round_layers(model, "token") == 1
    weight = rounded(before["linear_qkv.weight"], per_row=False)
    assert torch.equal(model["linear_qkv"].weight, weight) and not torch.equal(weight, before["linear_qkv.weight"])
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before if name != "linear_qkv.weight")
    wanted = torch.nn.functional.linear(rounded(x, per_row=True), weight, before["linear_qkv.bias"])
    assert torch.equal(model["linear_qkv"](x), wanted)


def test_fp8_rollouts_refuse_layers_that_begin_with_a_norm() -> None:
    """As Transformer Engine's do: their inputs are not those of the product."""
    model = torch.nn.ModuleDict({"linear_qkv": torch.nn.Linear(8, 4)})
    model["linear_qkv"].layer_norm_weight = torch.nn.Parameter(torch.ones(8))
    with pytest.raises(ValueError, match="measure on a CPU"):
        round_layers(model, "token")
