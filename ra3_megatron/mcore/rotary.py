"""Frequencies of rotary positions, with the scalings that `RopeScalingConfig` names.

Angles are fp32 products of positions and these; channel pairs are (j, j + d / 2) (as in Hugging Face).
"""

import math

import torch
from torch import Tensor

from ra3_megatron.config.model import ModelConfig


def inverse_frequencies(model: ModelConfig) -> Tensor:
    """Angle of one position in radians for each pair of channels, fp32 [head_dim / 2]."""
    channels = model.head_dim or model.hidden_size // model.num_attention_heads
    frequencies = 1.0 / (model.rope_base ** (torch.arange(0, channels, 2, dtype=torch.int64).float() / channels))
    scaling = model.rope_scaling
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        # in the order of operations of Hugging Face: far from the origin, the last bit of a frequency shows
        low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_context_length
        wavelengths = 2 * math.pi / frequencies
        stretched = frequencies / scaling.factor
        kept = (context / wavelengths - low) / (high - low)
        between = (1 - kept) * stretched + kept * frequencies
        scaled = torch.where(wavelengths > context / low, stretched, frequencies)
        return torch.where((wavelengths <= context / low) & (wavelengths >= context / high), between, scaled)
    return frequencies
