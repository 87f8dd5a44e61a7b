"""Rotary positions and SwiGLU with fewer passes over memory than Megatron-Core's own ones without a fused kernel.

Megatron-Core's rotation makes seven tensors of the size of the queries (two products, a negation, a concatenation, a
sum, and a copy), its SwiGLU adds a zero and concatenates gradients. These write halves in place, and keep less for the
backward pass; on GPUs each is one kernel (`triton_kernels`), where there is a compiler. Results are the same but for
rounding, of which there is less.

`install` puts them where Megatron-Core calls its own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import attention, mlp
from torch import Tensor

from ra3_megatron.mcore.hardware import has_triton

_swiglu_of_megatron = mlp.bias_swiglu_impl


def install() -> None:
    """Replace Megatron-Core's functions in the modules that call them."""
    attention.apply_rotary_pos_emb = _rotate_for_megatron
    mlp.bias_swiglu_impl = _swiglu_for_megatron


def turns(angles: Tensor, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of angles [..., d / 2], behind each other in [..., d], as `rotate` takes them."""
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the channel pairs (j, j + d / 2) of x, [s, b, h, d], by `turns`, [s, b, 1, d] (no gradient to them)."""
    return _Rotation.apply(x, turn)


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b of the halves a, b of the last dimension: [..., 2 f] -> [..., f]."""
    return _SwiGLU.apply(x)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Tensor) -> Tensor:
        ctx.save_for_backward(turn)
        return _turned(x, turn, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (turn,) = ctx.saved_tensors
        return _turned(gradients[0], turn, -1.0), None


def _turned(x: Tensor, turn: Tensor, sign: float) -> Tensor:
    if x.is_cuda and has_triton():
        from ra3_megatron.mcore import triton_kernels

        return triton_kernels.rotate(x if x.stride(-1) == 1 else x.contiguous(), turn.contiguous(), sign)
    cos, sin = turn.chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first)
    out_first.addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_second)
    out_second.addcmul_(first, sin, value=sign)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        if x.is_cuda and has_triton():
            from ra3_megatron.mcore import triton_kernels

            return triton_kernels.swiglu(_matrix(x)).view(*x.shape[:-1], -1)
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if x.is_cuda and has_triton():
            from ra3_megatron.mcore import triton_kernels

            return triton_kernels.swiglu_gradient(_matrix(x), _matrix(gradients[0])).view(x.shape)
        gate, value = x.chunk(2, dim=-1)
        found = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        of_gate, of_value = found.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(gradients[0] * value, gate, grad_input=of_gate)
        torch.mul(gradients[0], F.silu(gate), out=of_value)
        return found


def _matrix(x: Tensor) -> Tensor:
    return x.contiguous().view(-1, x.shape[-1])


def _rotate_for_megatron(t: Tensor, freqs: Tensor, config: Any, cu_seqlens: Tensor | None = None, **_: Any) -> Tensor:
    """freqs: what `turns` gives."""
    if cu_seqlens is not None or freqs.shape[-1] != t.shape[-1]:
        raise ValueError("rotary positions are those of each token, for all channels")
    return rotate(t, freqs)


def _swiglu_for_megatron(input: Tensor, bias: Tensor | None, *more: Any) -> Tensor:
    if bias is None:
        return swiglu(input)
    return _swiglu_of_megatron(input, bias, *more)
