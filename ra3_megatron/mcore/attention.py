"""Core attention on torch's scaled_dot_product_attention, for Megatron-Core's local layer spec.

Megatron's own local attention materialises sequence x sequence scores for every head and has no packed sequences.
This one groups query heads, attends within the documents of a packed row only (and spends nothing on the rest of the
row), gathers keys and values where rows are split over the context-parallel group, and holds an optional key/value
cache for the sampler: one row per transcript, each with its own length, which can be cut back (slot j of a row holds
position j).

Shapes: s sequence, b batch, h query heads, g key/value heads, d channels.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ra3_megatron.mcore import variable_length
from ra3_megatron.mcore.packing import Packing, packing_of
from ra3_megatron.mcore.sequence_split import gather_keys, places

LONG = 1024
"""Tokens of a sequence from which on cuDNN's kernels are taken first on a GPU. They are faster than torch's, but each
shape has a plan that has to be made: sampling, whose shapes are all different, would make nothing else
(`startup.initialize` switches them off elsewhere)."""


@dataclass
class LayerCache:
    """Rotated keys and values of one layer for a batch of rows, [b, g, slots, d] each."""

    keys: Tensor
    values: Tensor


@dataclass
class CacheView:
    """Where the tokens of one incremental pass stand: T tokens of several rows, flattened, row after row."""

    rows: Tensor
    """Cache row of each token, long [T]."""
    positions: Tensor
    """Slot of each token, which is its position in its row, long [T]."""
    groups: list["RowGroup"]
    """Rows that are attended together; each token is in one."""


@dataclass
class RowGroup:
    """Rows with about the same number of new tokens, padded to the longest of them."""

    rows: Tensor | None
    """Cache rows, long [n]; None: all of them, in order."""
    index: Tensor
    """Places in the flattened tokens, long [n, longest]; 0 behind a row's own tokens."""
    places: Tensor
    """Places of the rows' own tokens in the flattened tokens, long [tokens]."""
    sources: Tensor
    """Places of the same tokens in the flattened `index`, long [tokens]."""
    slots: int
    """Leading slots that any of these tokens attends to."""
    positions: Tensor
    """Position of each token of `index`, long [n, longest]."""
    whole: bool = False
    """All tokens of the pass are in this group, as many of each row: `index` is their order."""
    _masks: dict[int, Tensor] = field(default_factory=dict)

    def visible(self, share: int) -> Tensor:
        """Which slots each query sees, bool [n, 1, share * longest, slots]; the same in all layers. share: query heads
        of a key/value head."""
        found = self._masks.get(share)
        if found is None:
            n, longest = self.index.shape
            slot = torch.arange(self.slots, device=self.index.device)
            seen = slot <= self.positions[:, None, None, :, None]
            found = seen.expand(n, 1, share, longest, self.slots).reshape(n, 1, -1, self.slots)
            self._masks[share] = found
        return found


class CachedAttention(MegatronModule):
    """softmax(q k^T * scale + mask) v with grouped query heads and an optional cache.

    forward: query [s, b, h, d], key and value [s, b, g, d]. What Megatron passes through as `attention_mask` are the
    segments of packed rows here, long [b, S] (documents are runs of one number, padding is negative), or None for
    plain causal attention. S > s: this rank holds its share of rows of S tokens (see sequence_split). Returns
    [s, b, h * d], 0 at padding.
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
        self.context_group = parallel_state.get_context_parallel_group() if config.context_parallel_size > 1 else None
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
            raise ValueError("CachedAttention takes segments of packed rows, no bias and no packed_seq_params")
        s, b, h, d = query.shape
        if self.cache is not None:
            assert self.view is not None
            return self.incremental(query, key, value, self.cache, self.view)
        if attention_mask is not None and attention_mask.shape[1] != s:
            return self._split(query, key, value, attention_mask)
        if attention_mask is not None:
            return self._packed(query, key, value, attention_mask)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = self._attend(q, k, v, None).permute(2, 0, 1, 3).reshape(s, b, h * d)
        # Transformer Engine would offload what this is a view of, and fail: that is not contiguous
        return out.clone() if self.config.cpu_offloading else out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        long = q.is_cuda and visible is None and q.shape[2] >= LONG
        with _cudnn_first() if long else nullcontext():
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=visible,
                is_causal=visible is None and q.shape[2] > 1,
                scale=self.scale,
                dropout_p=self.dropout if self.training else 0.0,
                enable_gqa=k.shape[1] != q.shape[1],
            )

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> Tensor:
        """Causal attention of each document by itself: in one kernel where there is one that takes documents of any
        length, else documents of like length together."""
        packing = packing_of(segments)
        if self._takes_any_length(query):
            return self._of_any_length(query, key, value, packing)
        s, b, h, d = query.shape
        flat = [x.transpose(0, 1).reshape(b * s, -1) for x in (query, key, value)]
        out = flat[0].new_zeros(b * s, h * d) if packing.buckets else _nothing(flat)
        for bucket in packing.buckets:
            q, k, v = (_rows(x, bucket.index, d) for x in flat)
            attended = self._attend(q, k, v, None).transpose(1, 2).reshape(-1, h * d)
            out = out.index_copy(0, bucket.places, attended.index_select(0, bucket.sources))
        return out.view(b, s, h * d).transpose(0, 1).contiguous()

    def _takes_any_length(self, query: Tensor) -> bool:
        return not (self.training and self.dropout) and variable_length.takes(query)

    def _of_any_length(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
        s, b, h, d = query.shape
        flat = [x.transpose(0, 1).reshape(b * s, -1, d) for x in (query, key, value)]
        if not packing.longest:
            return _nothing([x.flatten(1) for x in flat]).view(b, s, h * d).transpose(0, 1).contiguous()
        q, k, v = flat if packing.real is None else (x.index_select(0, packing.real) for x in flat)
        out = variable_length.attention(q, k, v, packing.bounds, packing.longest, self.scale)
        if packing.real is not None:
            out = out.new_zeros(b * s, h, d).index_copy(0, packing.real, out)
        return out.reshape(b, s, h * d).transpose(0, 1).contiguous()

    def _split(self, query: Tensor, key: Tensor, value: Tensor, segments: Tensor) -> Tensor:
        """Causal attention of each document: this rank's queries, everybody's keys and values."""
        assert self.context_group is not None, "segments of longer rows than the queries' without context parallelism"
        s, b, h, d = query.shape
        g, length = key.shape[2], segments.shape[1]
        both = gather_keys(torch.cat((key, value), dim=2), self.context_group)
        k_flat, v_flat = (x.transpose(0, 1).reshape(b * length, -1) for x in both.split(g, dim=2))
        q_flat = query.transpose(0, 1).reshape(b * s, -1)
        mine = places(length, self.context_group.rank(), self.context_group.size()).to(query.device)
        # where each token of the flattened whole rows stands in this rank's flattened rows; -1: on another rank
        here = torch.full((b, length), -1, device=query.device)
        here[:, mine] = torch.arange(b * s, device=query.device).view(b, s)
        here = here.flatten()
        out = _nothing((q_flat, k_flat, v_flat))
        for bucket in packing_of(segments).buckets:
            index, inside = bucket.index, bucket.inside
            local = torch.where(inside, here[index], -1)
            held = local >= 0
            most = int(held.sum(1).max())
            if most == 0:
                continue
            # the columns that this rank holds, first; behind them some that are not used
            column = held.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
            used = held.gather(1, column)
            target = local.gather(1, column)
            q = _rows(q_flat, target.clamp_min(0), d)
            k, v = _rows(k_flat, index, d), _rows(v_flat, index, d)
            place = torch.arange(index.shape[1], device=query.device)
            visible = (place <= column[:, :, None])[:, None]
            attended = self._attend(q, k, v, visible).transpose(1, 2).reshape(-1, h * d)
            out = out.index_copy(0, target[used], attended[used.flatten()])
        return out.view(b, s, h * d).transpose(0, 1).contiguous()

    def incremental(self, query: Tensor, key: Tensor, value: Tensor, cache: LayerCache, view: CacheView) -> Tensor:
        """Attention of new tokens [T, 1, ., d] to everything in their rows' caches, their own keys appended first:
        [T, 1, h * d]."""
        cache.keys[view.rows, :, view.positions] = key[:, 0]
        cache.values[view.rows, :, view.positions] = value[:, 0]
        if len(view.groups) == 1 and view.groups[0].whole:
            return self._of_group(query[:, 0], cache, view.groups[0])[:, None]
        out = query.new_zeros(len(query), query.shape[2] * query.shape[3])
        for group in view.groups:
            attended = self._of_group(query[:, 0].index_select(0, group.index.flatten()), cache, group)
            out.index_copy_(0, group.places, attended.index_select(0, group.sources))
        return out[:, None]

    def _of_group(self, query: Tensor, cache: LayerCache, group: RowGroup) -> Tensor:
        """Attention of a group's queries [n * longest, h, d] to their rows: [n * longest, h * d]."""
        k, v = cache.keys[:, :, : group.slots], cache.values[:, :, : group.slots]
        if group.rows is not None:
            k, v = k.index_select(0, group.rows), v.index_select(0, group.rows)
        _, h, d = query.shape
        n, longest = group.index.shape
        g = k.shape[1]
        # the query heads of one key/value head stand behind each other, so that keys and values need no copies
        q = query.reshape(n, longest, g, h // g, d).permute(0, 2, 3, 1, 4).reshape(n, g, -1, d)
        attended = self._attend(q, k, v, group.visible(h // g)).view(n, g, h // g, longest, d)
        return attended.permute(0, 3, 1, 2, 4).reshape(-1, h * d)


def _cudnn_first() -> AbstractContextManager[None]:
    backends = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    found: AbstractContextManager[None] = sdpa_kernel(backends, set_priority=True)
    return found


def _rows(flat: Tensor, index: Tensor, channels: int) -> Tensor:
    """[places, heads * d] -> [n, heads, length, d] at places `index`, [n, length]."""
    return flat.index_select(0, index.flatten()).view(*index.shape, -1, channels).transpose(1, 2)


def _nothing(flat: Sequence[Tensor]) -> Tensor:
    """Zeros in the shape of the queries, with a gradient of 0: every rank's backward pass takes the same way, also
    where a micro-batch holds nothing for it."""
    query, *others = flat
    return query * 0.0 + sum(x.sum() for x in others) * 0.0
