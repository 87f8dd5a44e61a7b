"""Kernels of this project for GPUs, in Triton: one pass over memory where torch's operations take several.

Each has a plain form in torch that computes the same (`elementwise`, `target_log_probs`, `vocab_parallel`), which CPUs
and machines without a C compiler take. Arithmetic is fp32, whatever the tensors are; results are rounded once. Nothing
here adds up in an order that differs from run to run.

Importing this needs Triton, which CUDA builds of torch bring: see `hardware.has_triton`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 8192
"""Of a row that a program holds at once."""
EVENT_COLUMNS = 2048
"""The same, of rows of which sets of tokens are read as well."""
ELEMENTS = 1024
"""Of a tensor that a program of `swiglu` computes."""


def logsumexp(x: Tensor, real: int) -> Tensor:
    """log sum exp of the first `real` columns of each row: [n, V] of any floating type -> fp32 [n]. One read of x."""
    n = x.shape[0]
    out = torch.empty(n, dtype=torch.float32, device=x.device)
    if n:
        _logsumexp[(n,)](x, out, x.stride(0), real, BLOCK=_block(real), num_warps=8)
    return out


def log_softmax_gradient_(x: Tensor, log_total: Tensor, targets: Tensor, gradients: Tensor, real: int) -> Tensor:
    """Replace logits [n, V] by the gradient of sum_i gradients_i * (x_i[targets_i] - log_total_i); returns them.

    log_total, gradients: fp32 [n]; targets: long [n], columns, or negative where a row's target is not among them.
    Columns from `real` on get 0. One read and one write of x.
    """
    n, width = x.shape
    if n:
        block = _block(width)
        grid = (n, triton.cdiv(width, block))
        _log_softmax_gradient[grid](
            x, log_total, targets, gradients, x.stride(0), real, width, BLOCK=block, num_warps=8
        )
    return x


def event_statistics(
    x: Tensor, sets: Tensor, numerator: Tensor, denominator: Tensor, merged: Tensor, temperature: float, real: int
) -> Tensor:
    """What the log-probability and entropy of an event over the next token are made of, fp32 [7, n].

    x: logits [n, V] of any floating type, of which the first `real` columns exist; sets: bool [R, V]; numerator A,
    denominator B, merged M: long [n], rows of `sets`; a negative one is no set, and stands for the target in A, for
    everything in B, for nothing in M. With y = x / temperature and top = max_B y:

        top, sum_B e^(y - top), sum_B (y - top) e^(y - top), the last two over M and B,
        top of A, sum_A e^(y - top of A)

    Tops of empty sets are -inf, their sums 0. One read of x.
    """
    n = x.shape[0]
    out = torch.empty(7, n, dtype=torch.float32, device=x.device)
    if n:
        _event_statistics[(n,)](
            x, sets.view(torch.uint8), numerator, denominator, merged, out, x.stride(0), sets.stride(0), real, n,
            temperature, TEMPERED=temperature != 1.0, BLOCK=min(EVENT_COLUMNS, _block(real)), num_warps=8,
        )  # fmt: skip
    return out


def event_gradient_(
    x: Tensor,
    sets: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    merged: Tensor,
    targets: Tensor,
    rows: Tensor,
    temperature: float,
    real: int,
) -> Tensor:
    """Replace logits by the gradient of  sum_i g_i log P(A_i | B_i) + h_i H_i;  returns them.

    As `event_statistics`; targets: long [n], columns, or negative; rows: fp32 [6, n]: g, h, the log sum exp over B,
    over A, log P of M, and the entropy H. One read and one write of x.
    """
    n, width = x.shape
    if n:
        block = min(EVENT_COLUMNS, _block(width))
        _event_gradient[(n, triton.cdiv(width, block))](
            x, sets.view(torch.uint8), numerator, denominator, merged, targets, rows, x.stride(0), sets.stride(0), real,
            width, n, temperature, TEMPERED=temperature != 1.0, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return x


def rotate(x: Tensor, turn: Tensor, sign: float) -> Tensor:
    """Channel pairs (j, j + d / 2) of x, [s, b, h, d] with any strides but a last one of 1, turned by the cosines and
    sines `turn`, [s, b, 1, d] contiguous; by minus the angles where sign is -1. Returns a contiguous tensor."""
    s, b, h, d = x.shape
    out = torch.empty(s, b, h, d, dtype=x.dtype, device=x.device)
    if out.numel():
        pairs = triton.next_power_of_2(d // 2)
        heads = max(1, min(triton.next_power_of_2(h), 4096 // pairs))
        grid = (s * b, triton.cdiv(h, heads))
        _rotate[grid](x, turn, out, b, x.stride(0), x.stride(1), x.stride(2), h, d // 2, sign, HEADS=heads, PAIRS=pairs)
    return out


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b of the halves a, b of rows: contiguous [n, 2 f] -> [n, f]."""
    n, f = x.shape[0], x.shape[1] // 2
    out = torch.empty(n, f, dtype=x.dtype, device=x.device)
    if out.numel():
        _swiglu[(n, triton.cdiv(f, ELEMENTS))](x, out, f, BLOCK=ELEMENTS)
    return out


def swiglu_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Gradient [n, 2 f] of `swiglu` at x, given that of its result, contiguous [n, f]."""
    n, f = gradient.shape
    found = torch.empty_like(x)
    if gradient.numel():
        _swiglu_gradient[(n, triton.cdiv(f, ELEMENTS))](x, gradient, found, f, BLOCK=ELEMENTS)
    return found


def _block(width: int) -> int:
    return min(COLUMNS, int(triton.next_power_of_2(max(width, 1))))


@triton.jit
def _logsumexp(x, out, stride, real, BLOCK: tl.constexpr):  # type: ignore
    row = tl.program_id(0).to(tl.int64)
    start = x + row * stride
    columns = tl.arange(0, BLOCK)
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, real, BLOCK):
        at = first + columns
        value = tl.load(start + at, mask=at < real, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(peak, value)
        # where nothing has been seen, -inf less -inf would be NaN
        base = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(peak - base) + tl.exp(value - base)
        peak = larger
    top = tl.max(peak, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(out + row, tl.log(tl.sum(total * tl.exp(peak - base), 0)) + base)


@triton.jit
def _log_softmax_gradient(x, log_total, targets, gradients, stride, real, width, BLOCK: tl.constexpr):  # type: ignore
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = x + row * stride + at
    gradient = tl.load(gradients + row)
    value = tl.load(place, mask=at < real, other=float("-inf")).to(tl.float32)
    found = tl.where(at == tl.load(targets + row), gradient, 0.0)
    found -= gradient * tl.exp(value - tl.load(log_total + row))
    tl.store(place, tl.where(at < real, found, 0.0).to(x.dtype.element_ty), mask=at < width)


@triton.jit
def _in_set(sets, number, stride, at, inside):  # type: ignore
    """Whether columns are in a set; a negative number: False."""
    wanted = tl.where(inside, at, -1)
    wanted = tl.where(number < 0, -1, wanted)
    return tl.load(sets + number * stride + at, mask=wanted >= 0, other=0) != 0


@triton.jit
def _event_statistics(  # type: ignore
    x, sets, numerator, denominator, merged, out, stride, set_stride, real, n, temperature,
    TEMPERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    of_a, of_b, of_m = tl.load(numerator + row), tl.load(denominator + row), tl.load(merged + row)
    columns = tl.arange(0, BLOCK)
    nothing = tl.full((BLOCK,), float("-inf"), tl.float32)
    top, top_a = nothing, nothing
    total, weighted = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    total_m, weighted_m = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    total_a = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, real, BLOCK):
        at = first + columns
        inside = at < real
        value = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
        if TEMPERED:
            value = value / temperature
        in_b = tl.where(of_b < 0, inside, _in_set(sets, of_b, set_stride, at, inside))
        in_m = in_b & _in_set(sets, of_m, set_stride, at, inside)
        in_a = _in_set(sets, of_a, set_stride, at, inside)
        larger = tl.where(in_b, tl.maximum(top, value), top)
        base = tl.where(larger == float("-inf"), 0.0, larger)
        moved = tl.where(top == float("-inf"), 0.0, top - base)  # nothing was seen before: its sums are 0
        scale = tl.exp(moved)
        weight = tl.where(in_b, tl.exp(value - base), 0.0)
        log_weight = tl.where(in_b, value - base, 0.0)
        weighted = scale * (weighted + moved * total) + weight * log_weight
        total = scale * total + weight
        weight = tl.where(in_m, weight, 0.0)
        weighted_m = scale * (weighted_m + moved * total_m) + weight * log_weight
        total_m = scale * total_m + weight
        top = larger
        larger = tl.where(in_a, tl.maximum(top_a, value), top_a)
        base = tl.where(larger == float("-inf"), 0.0, larger)
        moved = tl.where(top_a == float("-inf"), 0.0, top_a - base)
        total_a = tl.exp(moved) * total_a + tl.where(in_a, tl.exp(value - base), 0.0)
        top_a = larger
    whole = tl.max(top, 0)
    moved = tl.where(top == float("-inf"), 0.0, top - whole)
    scale = tl.exp(moved)
    tl.store(out + row, whole)
    tl.store(out + n + row, tl.sum(scale * total, 0))
    tl.store(out + 2 * n + row, tl.sum(scale * (weighted + moved * total), 0))
    tl.store(out + 3 * n + row, tl.sum(scale * total_m, 0))
    tl.store(out + 4 * n + row, tl.sum(scale * (weighted_m + moved * total_m), 0))
    whole = tl.max(top_a, 0)
    moved = tl.where(top_a == float("-inf"), 0.0, top_a - whole)
    tl.store(out + 5 * n + row, whole)
    tl.store(out + 6 * n + row, tl.sum(tl.exp(moved) * total_a, 0))


@triton.jit
def _event_gradient(  # type: ignore
    x, sets, numerator, denominator, merged, targets, rows, stride, set_stride, real, width, n, temperature,
    TEMPERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < real
    of_a, of_b, of_m = tl.load(numerator + row), tl.load(denominator + row), tl.load(merged + row)
    given, of_entropy = tl.load(rows + row), tl.load(rows + n + row)
    log_b, log_a = tl.load(rows + 2 * n + row), tl.load(rows + 3 * n + row)
    log_merged, entropy = tl.load(rows + 4 * n + row), tl.load(rows + 5 * n + row)
    place = x + row * stride + at
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if TEMPERED:
        value = value / temperature
    in_b = tl.where(of_b < 0, inside, _in_set(sets, of_b, set_stride, at, inside))
    in_m = in_b & _in_set(sets, of_m, set_stride, at, inside)
    in_a = _in_set(sets, of_a, set_stride, at, inside)
    log_p = tl.where(in_b, value - log_b, float("-inf"))
    p = tl.exp(log_p)
    outcome = tl.where(in_m, log_merged, tl.maximum(log_p, -87.3))
    # d log P(A|B) / dy = 1_A e^y / sum_A e^y - 1_B p;  dH / dy = -p (log P(outcome) + H)
    found = tl.where(in_a, given * tl.exp(value - log_a), 0.0)
    found += tl.where(at == tl.where(of_a < 0, tl.load(targets + row), -1), given, 0.0)
    found -= p * (given + of_entropy * (outcome + entropy))
    if TEMPERED:
        found = found / temperature
    tl.store(place, tl.where(inside, found, 0.0).to(x.dtype.element_ty), mask=at < width)


@triton.jit
def _rotate(x, turn, out, b, stride_s, stride_b, stride_h, h, half, sign, HEADS: tl.constexpr, PAIRS: tl.constexpr):  # type: ignore
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    inside = (head < h) & (pair < half)
    source = x + (token // b) * stride_s + (token % b) * stride_b + head.to(tl.int64) * stride_h + pair
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    angle = turn + token * 2 * half + pair
    cos = tl.load(angle, mask=pair < half, other=0.0).to(tl.float32)
    sin = tl.load(angle + half, mask=pair < half, other=0.0).to(tl.float32) * sign
    target = out + (token * h + head) * 2 * half + pair
    tl.store(target, (first * cos - second * sin).to(out.dtype.element_ty), mask=inside)
    tl.store(target + half, (second * cos + first * sin).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu(x, out, f, BLOCK: tl.constexpr):  # type: ignore
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < f
    gate = tl.load(x + row * 2 * f + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + row * 2 * f + f + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * f + at, (gate * tl.sigmoid(gate) * value).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_gradient(x, gradient, found, f, BLOCK: tl.constexpr):  # type: ignore
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < f
    gate = tl.load(x + row * 2 * f + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + row * 2 * f + f + at, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(gradient + row * f + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    of_gate = given * value * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    kind = found.dtype.element_ty
    tl.store(found + row * 2 * f + at, of_gate.to(kind), mask=inside)
    tl.store(found + row * 2 * f + f + at, (given * gate * sigmoid).to(kind), mask=inside)
