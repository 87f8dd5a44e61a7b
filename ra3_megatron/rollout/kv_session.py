"""Incremental forward passes over a batch of rows with key/value caches on the live Megatron model.

Each row has its own length. `feed` appends tokens to every row in one ragged pass; `cut` takes tokens back; `select`
keeps, drops or copies rows (the G transcripts of one document share their first pass this way).

Under pipeline parallelism every stage calls the same methods and holds the caches of its own layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ra3_megatron.mcore.attention import CacheView, LayerCache, RowGroup
from ra3_megatron.mcore.batch import TokenBatch
from ra3_megatron.rollout.stage_pass import StagePass

GROWTH = 64
"""Slots are allocated in multiples of this."""
ALIGNED = 16
"""Slots that a GPU attends to are a multiple of this, which divides `GROWTH`."""

Longs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Group:
    """A `RowGroup` on the host."""

    members: Longs
    everyone: bool
    """The members are all rows, in order."""
    index: Longs
    places: Longs
    sources: Longs
    slots: int
    whole: bool


class KVSession:
    """Caches of a batch of rows."""

    def __init__(self, stage: StagePass) -> None:
        self.stage = stage
        self.device = stage.runtime.device
        self.aligned = ALIGNED if self.device.type == "cuda" else 1
        """Slots that are attended to are a multiple of this."""
        self.lengths: list[int] = []
        self.caches: list[LayerCache] = []
        """Of each layer of this process."""

    @property
    def rows(self) -> int:
        """Rows in the batch."""
        return len(self.lengths)

    def open(self, rows: int) -> None:
        """Start with empty rows."""
        self.lengths = [0] * rows
        self.caches = []

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        if list(rows) == list(range(self.rows)):
            return
        self.lengths = [self.lengths[r] for r in rows]
        used = self._slots(max(self.lengths, default=0))
        index = torch.tensor(list(rows), dtype=torch.long, device=self.device)
        for cache in self.caches:
            cache.keys = cache.keys[:, :, :used].index_select(0, index)
            cache.values = cache.values[:, :, :used].index_select(0, index)

    def split(self, rows: Sequence[int]) -> "KVSession":
        """A session of copies of these rows; this one is left as it is."""
        part = KVSession(self.stage)
        part.lengths, part.caches = list(self.lengths), [LayerCache(c.keys, c.values) for c in self.caches]
        part.select(rows)
        if part.rows == self.rows:  # nothing was copied if the rows are the same
            part.caches = [LayerCache(c.keys.clone(), c.values.clone()) for c in part.caches]
        return part

    def append(self, other: "KVSession") -> None:
        """Put the rows of `other` behind the rows of this session."""
        if not self.rows:
            self.lengths, self.caches = other.lengths, other.caches
            return
        slots = self._slots(max(*self.lengths, *other.lengths))
        self._reserve(slots)
        other._reserve(slots)
        for mine, theirs in zip(self.caches, other.caches, strict=True):
            mine.keys = torch.cat([mine.keys[:, :, :slots], theirs.keys[:, :, :slots]])
            mine.values = torch.cat([mine.values[:, :, :slots], theirs.values[:, :, :slots]])
        self.lengths = self.lengths + other.lengths

    def replace(self, rows: Sequence[int], part: "KVSession", same: Sequence[int]) -> None:
        """Let these rows be those of `part`, which have the first `same` slots in common with them."""
        self._reserve(max(part.lengths))
        new = [np.arange(start, length) for start, length in zip(same, part.lengths, strict=True)]
        counts = [len(slots) for slots in new]
        arrays = [np.repeat(np.array(rows), counts), np.repeat(np.arange(part.rows), counts), np.concatenate(new)]
        target, source, slot = to_device(arrays, self.device)
        for mine, theirs in zip(self.caches, part.caches, strict=True):
            mine.keys[target, :, slot] = theirs.keys[source, :, slot]
            mine.values[target, :, slot] = theirs.values[source, :, slot]
        for row, length in zip(rows, part.lengths, strict=True):
            self.lengths[row] = length

    def extend(self, rows: int) -> None:
        """Put empty rows behind those of this session."""
        if rows:
            empty = KVSession(self.stage)
            empty.open(rows)
            self.append(empty)

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
        ids = np.array([token for new in tokens for token in new], dtype=np.int64)
        rows = np.repeat(np.arange(self.rows), counts)
        positions = np.concatenate([np.arange(n, n + count) for n, count in zip(self.lengths, counts, strict=True)])
        groups = self._groups(counts, starts)
        arrays = [ids, rows, positions]
        for group in groups:
            arrays += [group.members, group.index, group.places, group.sources, positions[group.index]]
        # one transfer: each costs a GPU's host as much as the kernels of a layer
        token_ids, row_of, position_of, *rest = to_device(arrays, self.device)
        view = CacheView(row_of, position_of, [])
        for n, group in enumerate(groups):
            members, index, places, sources, at = rest[5 * n : 5 * n + 5]
            here, slots = None if group.everyone else members, self._slots(group.slots)
            view.groups.append(RowGroup(here, index, places, sources, slots, at, whole=group.whole))
        batch = TokenBatch(token_ids[None], position_of[None], row_of[None], token_ids[None])
        hidden = self.stage(batch, self.caches, view)
        self.lengths = [n + count for n, count in zip(self.lengths, counts, strict=True)]
        return hidden, starts

    def _groups(self, counts: list[int], starts: list[int]) -> list["_Group"]:
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
            slots = int(max(self.lengths[r] + counts[r] for r in members if counts[r]))
            everyone = len(members) == self.rows
            whole = bool(inside.all()) and inside.size == sum(counts)
            groups.append(_Group(members, everyone, index, index[inside], np.flatnonzero(inside), slots, whole))
        return groups

    def _slots(self, slots: int) -> int:
        """As many slots and those that fill a multiple up, for which a GPU's kernels need no copy. They are there:
        caches are never cut to less."""
        return -(-slots // self.aligned) * self.aligned

    def _reserve(self, slots: int) -> None:
        """Make room for `slots` slots a row."""
        if self.caches and self.caches[0].keys.shape[2] >= slots:
            return
        total = -(-slots // GROWTH) * GROWTH
        config = self.stage.config
        groups = config.num_query_groups // config.tensor_model_parallel_size
        shape = (self.rows, groups, total, config.kv_channels)
        old = self.caches
        self.caches = [
            LayerCache(*(torch.empty(shape, dtype=config.params_dtype, device=self.device) for _ in range(2)))
            for _ in self.stage.attentions
        ]
        used = max(self.lengths, default=0)
        for new, before in zip(self.caches, old, strict=False):
            new.keys[:, :, :used] = before.keys[:, :, :used]
            new.values[:, :, :used] = before.values[:, :, :used]
        for cache in self.caches:  # what is masked must be a number, too: 0 times NaN is NaN
            cache.keys[:, :, used:] = 0
            cache.values[:, :, used:] = 0


def to_device(arrays: list[Longs], device: torch.device) -> list[Tensor]:
    """Arrays of whole numbers as tensors, long, in one transfer that the host does not wait for."""
    whole = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]).astype(np.int64, copy=False))
    if device.type == "cuda":
        whole = whole.pin_memory()
    parts = whole.to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
