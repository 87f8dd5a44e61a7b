"""Attention in FP8: Transformer Engine's kernels inside `CachedAttention`. On GPUs that have them."""

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from ra3_megatron.mcore.attention import CachedAttention

BLOCK = 128
"""The kernels take sequences of multiples of this."""


class Fp8Attention(CachedAttention):
    """`CachedAttention` whose plain causal passes, which training and scoring are made of, run in FP8; those of packed
    rows by documents of like length.

    Within Megatron-Core's FP8 context Transformer Engine picks a kernel that computes in FP8, or raises; it never falls
    back to bf16. Passes with a cache (sampling) are those of `CachedAttention`.
    """

    def __init__(self, config: Any, layer_number: int, attn_mask_type: AttnMaskType, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, layer_number, attn_mask_type, *args, **kwargs)
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        self.kernel = TEDotProductAttention(config, layer_number, AttnMaskType.causal, "self", softmax_scale=self.scale)

    def _takes_any_length(self, query: Tensor) -> bool:
        return False  # torch's kernel computes in 16 bits

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        if visible is not None or self.cache is not None:
            return super()._attend(q, k, v, visible)
        n, h, length, d = q.shape
        padding = -length % BLOCK  # behind the end, where causal attention of real tokens does not look
        q, k, v = (F.pad(x, (0, 0, 0, padding)).permute(2, 0, 1, 3).contiguous() for x in (q, k, v))
        out = self.kernel(q, k, v, None, AttnMaskType.causal)  # [s, n, h * d]
        return out.view(length + padding, n, h, d)[:length].permute(1, 2, 0, 3)
