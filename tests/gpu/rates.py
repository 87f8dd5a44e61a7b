"""What torch's own matrix products reach on this device, in the run in which a model is held against them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.measure import Timing, alternate
from ra3_megatron.scaling.counts import Layer, padded
from ra3_megatron.scaling.tables import Architecture
from tests.gpu.evidence import Evidence
from tests.gpu.setting import Setting

CALLS = 10
"""Products of one repeat."""
Shape = tuple[int, int, int]
"""Rows, inner dimension, columns."""


def square(setting: Setting) -> Shape:
    """A product that is large enough to reach what can be reached."""
    size = setting.pick(8192, 128)
    return size, size, size


def shapes_of(made: Architecture, tokens: int) -> dict[str, Shape]:
    """The products with the weights of a layer, forward, and with those of the output layer."""
    layer = Layer.of(made.model)
    return {
        "qkv": (tokens, layer.hidden, layer.query + 2 * layer.key_value),
        "attention's output": (tokens, layer.query, layer.hidden),
        "fc1": (tokens, layer.hidden, 2 * layer.width),
        "fc2": (tokens, layer.width, layer.hidden),
        "output layer": (min(tokens, 2048), layer.hidden, padded(made.vocab_size, 1)),
    }


def measure(evidence: Evidence, setting: Setting, name: str, shape: Shape, repeats: int = 5) -> dict[str, float]:
    """FLOP/s of one product in bf16 and, where the device has it, in FP8 (e4m3, one scale a tensor)."""
    flops = 2.0 * shape[0] * shape[1] * shape[2] * CALLS
    found = {}
    for kind, make in (("bf16", _bf16), ("FP8", _fp8)):
        if kind == "FP8" and not setting.cuda:
            continue
        with evidence.attempt(f"{kind} product {name}"):
            timing = _timed(make(shape, setting.device), setting, repeats)
            found[kind] = flops / timing.median
            text = " x ".join(map(str, shape))
            evidence.rate(f"torch's {kind} product {name}, {text}", timing, flops / 1e12, "TFLOP/s")
    return found


def _timed(product: Callable[[], object], setting: Setting, repeats: int) -> Timing:
    def calls() -> None:
        for _ in range(CALLS):
            product()

    return alternate({"": calls}, repeats, warm_up=2, wait=setting.wait)[""]


def _bf16(shape: Shape, device: torch.device) -> Callable[[], object]:
    one = torch.randn(shape[0], shape[1], device=device, dtype=torch.bfloat16)
    other = torch.randn(shape[2], shape[1], device=device, dtype=torch.bfloat16).t()
    out = torch.empty(shape[0], shape[2], device=device, dtype=torch.bfloat16)
    return lambda: torch.mm(one, other, out=out)


def _fp8(shape: Shape, device: torch.device) -> Callable[[], object]:
    one = torch.randn(shape[0], shape[1], device=device).to(torch.float8_e4m3fn)
    other = torch.randn(shape[2], shape[1], device=device).to(torch.float8_e4m3fn).t()
    scale = torch.ones((), device=device)
    return lambda: torch._scaled_mm(
        one, other, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )
