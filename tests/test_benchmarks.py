"""What the benchmarks count is what was computed. Nothing here is timed."""

from __future__ import annotations

import time

import pytest
import torch

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
