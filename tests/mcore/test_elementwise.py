"""Rotary positions and SwiGLU are those of Megatron-Core, forward and backward, and cost less memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import attention, mlp
from torch import Tensor

import ra3_megatron.mcore  # noqa: F401
from ra3_megatron.mcore import elementwise


def megatrons_rotation(x: Tensor, angles: Tensor) -> Tensor:
    found: Tensor = rope_utils._apply_rotary_pos_emb_bshd(x, torch.cat((angles, angles), dim=-1))
    return found


def megatrons_swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * (value + 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 6])
def test_rotation(dtype: torch.dtype, heads: int) -> None:
    """Of queries that are a slice of a larger tensor, as Megatron-Core splits them; positions differ by row."""
    torch.manual_seed(1)
    mixed = torch.randn(5, 3, heads, 24).to(dtype).requires_grad_()
    angles = torch.randint(0, 2000, (5, 3, 1, 1)).float() * torch.rand(8)
    turns = elementwise.turns(angles, dtype)
    assert turns.shape == (5, 3, 1, 16)
    out = elementwise.rotate(mixed[..., 4:20], turns)
    weight = torch.randn(5, 3, heads, 16).to(dtype)
    (gradient,) = torch.autograd.grad((out * weight).sum(), mixed)
    expected = megatrons_rotation(mixed[..., 4:20], angles)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), mixed)
    tolerance = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.01}
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out, expected, **tolerance)
    torch.testing.assert_close(gradient, wanted, **tolerance)


def test_a_rotation_is_undone_by_its_gradient() -> None:
    """It is orthogonal: the gradient of x . rotate(x0) turns back."""
    turns = elementwise.turns(torch.rand(4, 1, 1, 8) * 7, torch.float64)
    x = torch.randn(4, 1, 2, 16, dtype=torch.float64, requires_grad=True)
    (back,) = torch.autograd.grad(elementwise.rotate(x, turns), x, elementwise.rotate(x.detach(), turns))
    torch.testing.assert_close(back, x.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x = torch.randn(7, 2, 48).to(dtype).requires_grad_()
    weight = torch.randn(7, 2, 24).to(dtype)
    out, expected = elementwise.swiglu(x), megatrons_swiglu(x)
    assert torch.equal(out, expected)
    (gradient,) = torch.autograd.grad((out * weight).sum(), x)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), x)
    assert torch.equal(gradient, wanted)


def test_megatron_core_calls_them() -> None:
    import ra3_megatron.mcore.model  # noqa: F401

    assert attention.apply_rotary_pos_emb is elementwise._rotate_for_megatron
    assert mlp.bias_swiglu_impl is elementwise._swiglu_for_megatron
    turns = elementwise.turns(torch.rand(4, 1, 1, 4), torch.float32)
    with pytest.raises(ValueError, match="for all channels"):
        attention.apply_rotary_pos_emb(torch.rand(4, 1, 1, 16), turns, config=None)
    found = torch.rand(3, 8)
    assert torch.equal(mlp.bias_swiglu_impl(found, None, False, False), elementwise.swiglu(found))
    bias = torch.rand(8)
    x = torch.rand(3, 8)
    assert torch.allclose(mlp.bias_swiglu_impl(x, bias, False, False), megatrons_swiglu(x + bias))
