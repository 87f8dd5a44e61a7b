"""Core attention on torch's scaled_dot_product_attention, for Megatron-Core's local layer spec.

Megatron's own local attention materialises sequence x sequence scores for every head and has no packed sequences.
This one takes any boolean mask, groups query heads, and holds an optional key/value cache for the sampler: one
row per transcript, each with its own length, which can be cut back (slot j of a row holds position j).

Shapes: s sequence, b batch, h query heads, g key/value heads, d channels.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


@dataclass
class LayerCache:
    """Rotated keys and values of one layer for a batch of rows, [b, g, slots, d] each."""

    keys: Tensor
    values: Tensor


@dataclass
class CacheView:
    """Where the tokens of one forward pass go in the caches.

    positions: [b, s] slot of each new token; padding tokens point to the last slot, which no real token uses.
    slots: number of leading slots that any new token attends to.
    """

    positions: Tensor
    slots: int


class CachedAttention(MegatronModule):
    """softmax(q k^T * scale + mask) v with grouped query heads and an optional cache.

    forward: query [s, b, h, d], key and value [s, b, g, d]; attention_mask: bool [b or 1, 1, s, s], True = hidden,
    or None for plain causal attention. Returns [s, b, h * d].
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ValueError("CachedAttention has no context parallelism")
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.cache: LayerCache | None = None
        self.view: CacheView | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("CachedAttention takes a boolean mask, no bias and no packed_seq_params")
        s, b, h, d = query.shape
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        visible: Tensor | None = None
        if self.cache is not None and self.view is not None:
            k, v, visible = self._append(k, v)
        elif attention_mask is not None:
            visible = ~attention_mask
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=visible,
            is_causal=visible is None and s > 1,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=k.shape[1] != h,
        )
        return out.permute(2, 0, 1, 3).reshape(s, b, h * d)

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert self.cache is not None and self.view is not None
        positions, slots = self.view.positions, self.view.slots
        index = positions[:, None, :, None].expand_as(k)
        self.cache.keys.scatter_(2, index, k)
        self.cache.values.scatter_(2, index, v)
        slot = torch.arange(slots, device=k.device)
        visible = slot[None, None, None, :] <= positions[:, None, :, None]
        return self.cache.keys[:, :, :slots], self.cache.values[:, :, :slots], visible
