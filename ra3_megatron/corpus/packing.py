"""Packing documents into rows of a fixed number of tokens, first-fit in the given order.

Invariants: a document is never split; no row holds more than `row_length` tokens; documents are taken in the
sampler's order, each exactly once an epoch; the outcome depends on lengths and order alone.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, TypedDict

from ra3_megatron.corpus.sampler import DocumentSampler, SamplerState


class HasLengths(Protocol):
    """A store of documents that knows how long each one is."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each document, [documents]."""


class BatcherState(TypedDict):
    """Where a `PackedBatcher` stands."""

    sampler: SamplerState
    carried: int | None
    """The document that closed the last batch and opens the next one."""


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Rows of positions in `lengths`, each row's lengths summing to at most `row_length`.

    Each document goes into the first row that has room for it, or opens a new one. ValueError when one is too long.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        _check_length(index, length, row_length)
        row = _first_fit(room, length)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(row_length)
        rows[row].append(index)
        room[row] -= length
    return rows


class PackedBatcher(Iterator[list[list[int]]]):
    """Endless global batches of `rows_per_batch` rows, each a list of document indices in `store`.

    Documents come from `sampler` and go into the first row that has room. The first document that fits in no row
    closes the batch and opens the next one. Every row of a batch holds at least one document.
    """

    def __init__(self, store: HasLengths, sampler: DocumentSampler, rows_per_batch: int, row_length: int) -> None:
        if rows_per_batch < 1:
            raise ValueError(f"rows_per_batch={rows_per_batch}: a batch has at least one row")
        self._lengths = [int(length) for length in store.lengths]
        if sampler.num_documents != len(self._lengths):
            raise ValueError(f"the sampler knows {sampler.num_documents} documents, the store {len(self._lengths)}")
        for index, length in enumerate(self._lengths):
            _check_length(index, length, row_length)
        self.sampler = sampler
        self.rows_per_batch = rows_per_batch
        self.row_length = row_length
        self._carried: int | None = None
        self._packed_tokens = 0
        self._packed_rows = 0

    def __next__(self) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in range(self.rows_per_batch)]
        room = [self.row_length] * self.rows_per_batch
        document = self.sampler.next(1)[0] if self._carried is None else self._carried
        while (row := _first_fit(room, self._lengths[document])) is not None:
            rows[row].append(document)
            room[row] -= self._lengths[document]
            document = self.sampler.next(1)[0]
        self._carried = document
        self._packed_rows += self.rows_per_batch
        self._packed_tokens += self.rows_per_batch * self.row_length - sum(room)
        return rows

    @property
    def fill_rate(self) -> float:
        """Share of the positions of the rows given so far (by this object) that hold a token; 0 before the first."""
        return self._packed_tokens / (self._packed_rows * self.row_length) if self._packed_rows else 0.0

    def state_dict(self) -> BatcherState:
        """What `load_state_dict` of a batcher with the same arguments needs to give the same next batches."""
        return {"sampler": self.sampler.state_dict(), "carried": self._carried}

    def load_state_dict(self, state: BatcherState) -> None:
        """Go on from `state`. ValueError when it cannot be of this store."""
        carried = state["carried"]
        if carried is not None and not 0 <= carried < len(self._lengths):
            raise ValueError(f"carried document {carried} is not one of {len(self._lengths)}")
        self.sampler.load_state_dict(state["sampler"])
        self._carried = carried


def _first_fit(room: list[int], length: int) -> int | None:
    return next((row for row, free in enumerate(room) if length <= free), None)


def _check_length(index: int, length: int, row_length: int) -> None:
    if not 0 < length <= row_length:
        raise ValueError(f"document {index} has {length} tokens: a row holds 1 to {row_length}")
