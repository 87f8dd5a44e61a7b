"""Incremental forward passes over a batch of rows with key/value caches on the live Megatron model.

Each row has its own length. `feed` appends tokens to every row in one ragged pass; `cut` takes tokens back; `select`
keeps, drops or copies rows (the G transcripts of one document share their first pass this way).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ra3_megatron.mcore.attention import CachedAttention, CacheView, LayerCache
from ra3_megatron.mcore.batch import TokenBatch
from ra3_megatron.mcore.model import LanguageModel

GROWTH = 64
"""Slots are allocated in multiples of this."""


class KVSession:
    """Caches of `rows` rows. The last slot of each cache takes the padding of ragged passes."""

    def __init__(self, model: LanguageModel, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.lengths: list[int] = []
        self._caches: list[LayerCache] = []
        self._attentions = [m for m in model.modules() if isinstance(m, CachedAttention)]

    @property
    def rows(self) -> int:
        """Rows in the batch."""
        return len(self.lengths)

    def open(self, rows: int) -> None:
        """Start with empty rows."""
        self.lengths = [0] * rows
        self._caches = []

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        if list(rows) == list(range(self.rows)):
            return
        self.lengths = [self.lengths[r] for r in rows]
        used = max(self.lengths, default=0) + 1
        index = torch.tensor(list(rows), device=self.device)
        for cache in self._caches:
            cache.keys = cache.keys[:, :, :used].index_select(0, index)
            cache.values = cache.values[:, :, :used].index_select(0, index)

    def cut(self, lengths: Sequence[int]) -> None:
        """Forget what is behind these lengths."""
        if any(new > old for new, old in zip(lengths, self.lengths, strict=True)):
            raise ValueError("a row cannot be cut to more than it holds")
        self.lengths = list(lengths)

    @torch.no_grad()
    def feed(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to each row (none: the row stays); returns hidden states [rows, longest, hidden].

        Positions behind a row's own tokens hold no meaning.
        """
        longest = max(len(t) for t in tokens)
        needed = max(n + len(t) for n, t in zip(self.lengths, tokens, strict=True)) + 1
        self._reserve(needed)
        spare = self._caches[0].keys.shape[2] - 1
        ids = torch.zeros(self.rows, longest, dtype=torch.long)
        positions = torch.full((self.rows, longest), spare, dtype=torch.long)
        for row, (start, new) in enumerate(zip(self.lengths, tokens, strict=True)):
            ids[row, : len(new)] = torch.as_tensor(list(new), dtype=torch.long)
            positions[row, : len(new)] = torch.arange(start, start + len(new))
        ids, positions = ids.to(self.device), positions.to(self.device)
        view = CacheView(positions=positions, slots=spare + 1)
        batch = TokenBatch(ids, positions, positions, ids)
        training = self.model.training
        self.model.eval()
        try:
            for attention, cache in zip(self._attentions, self._caches, strict=True):
                attention.cache, attention.view = cache, view
            hidden = self.model(batch, hidden_only=True)
        finally:
            for attention in self._attentions:
                attention.cache = attention.view = None
            self.model.train(training)
        self.lengths = [n + len(t) for n, t in zip(self.lengths, tokens, strict=True)]
        return hidden.transpose(0, 1)

    def _reserve(self, slots: int) -> None:
        """Make room for `slots` slots a row; the last one is for padding."""
        if self._caches and self._caches[0].keys.shape[2] >= slots:
            return
        total = -(-slots // GROWTH) * GROWTH
        config = self.model.config
        groups = config.num_query_groups // config.tensor_model_parallel_size
        shape = (self.rows, groups, total, config.kv_channels)
        old = self._caches
        self._caches = [
            LayerCache(*(torch.zeros(shape, dtype=config.params_dtype, device=self.device) for _ in range(2)))
            for _ in self._attentions
        ]
        used = max(self.lengths, default=0)
        for new, before in zip(self._caches, old, strict=False):
            new.keys[:, :, :used] = before.keys[:, :, :used]
            new.values[:, :, :used] = before.values[:, :, :used]
