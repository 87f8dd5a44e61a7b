"""Which documents each phase reads, and the names of all random streams: functions of the seed alone.

The M-steps of RA3 and of NTP read the same documents in the same order. Thoughts make documents longer, so the rows of
an M-step hold at most the documents that they would hold without thoughts: those are drawn.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from ra3_megatron.config.training import PackedTraining
from ra3_megatron.corpus.packing import PackedBatcher
from ra3_megatron.corpus.sampler import DocumentSampler
from ra3_megatron.text.transcript import Transcript


class Stream(IntEnum):
    """Second part of the key of every random stream; the first is the seed of the run."""

    WARM_ORDER = 1
    MID_ORDER = 2
    ESTEP_ORDER = 3
    ESTEP = 4
    INFUSE = 5
    EVALUATION = 6


def order_seed(*key: int) -> int:
    """Seed of a document order, from the parts of its name."""
    return int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Ordered:
    """Documents of a store in a given order (a document may come several times)."""

    def __init__(self, store: Any, order: Sequence[int]) -> None:
        self._store = store
        self._order = list(order)
        self.lengths: npt.NDArray[np.int32] = np.asarray(store.lengths)[self._order]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Transcript:
        item: Transcript = self._store[self._order[index]]
        return item


class DocumentOrder:
    """Documents of the phases 1, 2, … of one kind; each begins where the one before it ended."""

    def __init__(self, store: Any, settings: PackedTraining, row_length: int, seed: int) -> None:
        self._store, self._settings, self._row_length = store, settings, row_length
        self._sampler = _Recorder(len(store), seed)
        self._orders: list[list[int]] = []

    def of(self, number: int) -> list[int]:
        """Indices into the store of the documents of phase `number` (from 1), one batch more than its steps need."""
        while len(self._orders) < number:
            self._sampler.taken = []
            batcher = PackedBatcher(self._store, self._sampler, self._settings.global_batch_size, self._row_length)
            for _ in range(self._settings.steps + 1):
                next(batcher)
            self._orders.append(self._sampler.taken)
        return self._orders[number - 1]


class _Recorder(DocumentSampler):
    """Remembers what was taken."""

    def __init__(self, num_documents: int, seed: int) -> None:
        super().__init__(num_documents, seed)
        self.taken: list[int] = []

    def next(self, count: int) -> list[int]:
        taken = super().next(count)
        self.taken += taken
        return taken
