"""Incremental forward passes over a batch of rows with key/value caches on the live Megatron model.

Each row has its own length. `feed` appends tokens to every row in one ragged pass; `cut` takes tokens back; `select`
keeps, drops or copies rows (the G transcripts of one document share their first pass this way).

Under pipeline parallelism every stage calls the same methods and holds the caches of its own layers.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from ra3_megatron.mcore.attention import CacheView, LayerCache, RowGroup
from ra3_megatron.mcore.batch import TokenBatch
from ra3_megatron.rollout.stage_pass import StagePass

GROWTH = 64
"""Slots are allocated in multiples of this."""


class KVSession:
    """Caches of a batch of rows."""

    def __init__(self, stage: StagePass) -> None:
        self.stage = stage
        self.device = stage.runtime.device
        self.lengths: list[int] = []
        self._caches: list[LayerCache] = []

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
        used = max(self.lengths, default=0)
        index = torch.tensor(list(rows), dtype=torch.long, device=self.device)
        for cache in self._caches:
            cache.keys = cache.keys[:, :, :used].index_select(0, index)
            cache.values = cache.values[:, :, :used].index_select(0, index)

    def split(self, rows: Sequence[int]) -> "KVSession":
        """A session of copies of these rows; this one is left as it is."""
        part = KVSession(self.stage)
        part.lengths, part._caches = list(self.lengths), [LayerCache(c.keys, c.values) for c in self._caches]
        part.select(rows)
        if part.rows == self.rows:  # nothing was copied if the rows are the same
            part._caches = [LayerCache(c.keys.clone(), c.values.clone()) for c in part._caches]
        return part

    def append(self, other: "KVSession") -> None:
        """Put the rows of `other` behind the rows of this session."""
        if not self.rows:
            self.lengths, self._caches = other.lengths, other._caches
            return
        slots = max(*self.lengths, *other.lengths)
        self._reserve(slots)
        other._reserve(slots)
        for mine, theirs in zip(self._caches, other._caches, strict=True):
            mine.keys = torch.cat([mine.keys[:, :, :slots], theirs.keys[:, :, :slots]])
            mine.values = torch.cat([mine.values[:, :, :slots], theirs.values[:, :, :slots]])
        self.lengths = self.lengths + other.lengths

    def cut(self, lengths: Sequence[int]) -> None:
        """Forget what is behind these lengths."""
        if any(new > old for new, old in zip(lengths, self.lengths, strict=True)):
            raise ValueError("a row cannot be cut to more than it holds")
        self.lengths = list(lengths)

    @torch.no_grad()
    def feed(self, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
        """Append tokens to each row (none: the row stays as it is).

        Returns hidden states of the new tokens, [T, hidden], row after row, and where each row's begin. They are
        zeros on all pipeline stages but the last.
        """
        counts = [len(new) for new in tokens]
        starts = [0, *accumulate(counts)][:-1]
        self._reserve(max(n + count for n, count in zip(self.lengths, counts, strict=True)))
        ids = torch.tensor([token for new in tokens for token in new], dtype=torch.long, device=self.device)
        rows = np.repeat(np.arange(self.rows), counts)
        positions = np.concatenate([np.arange(n, n + count) for n, count in zip(self.lengths, counts, strict=True)])
        view = CacheView(
            torch.from_numpy(rows).to(self.device),
            torch.from_numpy(positions).to(self.device),
            self._groups(counts, starts),
        )
        batch = TokenBatch(ids[None], view.positions[None], view.rows[None], ids[None])
        hidden = self.stage(batch, self._caches, view)
        self.lengths = [n + count for n, count in zip(self.lengths, counts, strict=True)]
        return hidden, starts

    def _groups(self, counts: list[int], starts: list[int]) -> list[RowGroup]:
        """Rows grouped by how many new tokens they have, within a factor of two."""
        sizes = np.array([max(count - 1, 0).bit_length() if count else -1 for count in counts])
        groups = []
        wanted = np.unique(sizes[sizes >= 0])
        for size in wanted:
            members = np.flatnonzero(sizes == size)
            if len(wanted) == 1 and 2 * len(members) >= self.rows:
                members = np.arange(self.rows)  # computing a few rows for nothing is cheaper than copying the others
            length = np.array([counts[r] for r in members])
            place = np.arange(length.max())
            inside = place[None] < length[:, None]
            index = np.where(inside, np.array([starts[r] for r in members])[:, None] + place[None], 0)
            groups.append(
                RowGroup(
                    None if len(members) == self.rows else torch.from_numpy(members).to(self.device),
                    torch.from_numpy(index).to(self.device),
                    torch.from_numpy(inside).to(self.device),
                    int(max(self.lengths[r] + counts[r] for r in members if counts[r])),
                )
            )
        return groups

    def _reserve(self, slots: int) -> None:
        """Make room for `slots` slots a row."""
        if self._caches and self._caches[0].keys.shape[2] >= slots:
            return
        total = -(-slots // GROWTH) * GROWTH
        config = self.stage.config
        groups = config.num_query_groups // config.tensor_model_parallel_size
        shape = (self.rows, groups, total, config.kv_channels)
        old = self._caches
        self._caches = [
            LayerCache(*(torch.zeros(shape, dtype=config.params_dtype, device=self.device) for _ in range(2)))
            for _ in self.stage.attentions
        ]
        used = max(self.lengths, default=0)
        for new, before in zip(self._caches, old, strict=False):
            new.keys[:, :, :used] = before.keys[:, :, :used]
            new.values[:, :, :used] = before.values[:, :, :used]
