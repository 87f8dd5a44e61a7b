"""The few numbers that shapes and data sheets do not tell: which share of a peak is reached, and what overlaps."""

from __future__ import annotations

from dataclasses import dataclass

CONTEXT_GIB = 2.5
"""CUDA context, NCCL's buffers and workspaces of libraries."""


@dataclass(frozen=True)
class Rates:
    """Shares of the data sheet's rates. Those called fitted are so to the rows of `data/published.yaml` marked `fit`
    (`fit` in `calibration.py`, and a test that they are what it finds); the others are measurements of others, rounded.
    """

    bf16_matmul: float = 0.602
    """Of the bf16 peak, in products with weights. Fitted."""
    fp8_matmul: float = 0.498
    """Of the FP8 peak, in products with weights. Fitted."""
    fp32_matmul: float = 0.602
    """The same of the fp32 peak, taken over from bf16, as it is published for no GPU. A device that was measured has
    its own (`rates` of its description)."""
    exposed: float = 0.302
    """Share of the messages inside layers and between stages that products do not hide, where they overlap. Fitted."""
    attention_forward: float = 0.60
    """Of the bf16 peak, in causal fused attention with heads of 128 channels (FlashAttention-3, cuDNN on H100)."""
    attention_backward: float = 0.48
    """The same, backward."""
    small_heads: float = 0.7
    """What is left of both with heads of less than 128 channels."""
    memory: float = 0.85
    """Of the memory's bandwidth, in pointwise kernels (a copy on H100: 2.9 of 3.35 TB/s)."""
    link: float = 0.8
    """Of a link's bandwidth, in collectives of many megabytes."""
    hop_seconds: float = 4.0e-6
    """A hop of a ring takes no less than this, whatever it carries."""
    launch_seconds: float = 1.0e-4
    """A layer's forward pass takes no less than this: its kernels are started one after another."""


RATES = Rates()
MAY_BE_ZERO = ("exposed", "hop_seconds", "launch_seconds")
"""Rates that nothing is divided by."""
