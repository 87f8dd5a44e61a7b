"""Packing: no overfull row, nothing lost, exact resume."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ra3_megatron.corpus.packing import PackedBatcher, pack
from ra3_megatron.corpus.sampler import DocumentSampler, SequentialSampler

ROW = 16
LENGTHS = st.lists(st.integers(1, ROW), min_size=1, max_size=30)


@dataclass
class Store:
    lengths: list[int]


def batcher(lengths: list[int], rows: int, seed: int = 1) -> PackedBatcher:
    return PackedBatcher(Store(lengths), DocumentSampler(len(lengths), seed), rows, ROW)


@given(LENGTHS)
def test_pack_places_each_document_once_and_overfills_no_row(lengths: list[int]) -> None:
    rows = pack(lengths, ROW)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= ROW for row in rows)
    # first-fit: at most one row is half empty or more
    assert sum(sum(lengths[index] for index in row) <= ROW // 2 for row in rows) <= 1


def test_pack_is_first_fit_in_the_given_order() -> None:
    assert pack([10, 10, 6, 3, 3], ROW) == [[0, 2], [1, 3, 4]]
    assert pack([], ROW) == []


def test_too_long_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="document 1 has 17 tokens"):
        pack([3, 17], ROW)
    with pytest.raises(ValueError, match="document 1 has 17 tokens"):
        batcher([3, 17], 2)
    with pytest.raises(ValueError, match="document 0 has 0 tokens"):
        batcher([0, 4], 2)


@given(LENGTHS, st.integers(1, 4), st.integers(0, 999), st.integers(1, 12))
def test_batches_follow_the_sampler_and_overfill_no_row(lengths: list[int], rows: int, seed: int, count: int) -> None:
    packed = batcher(lengths, rows, seed)
    batches = [next(packed) for _ in range(count)]
    taken = []
    for batch in batches:
        assert len(batch) == rows
        assert all(row and sum(lengths[index] for index in row) <= ROW for row in batch)
        taken.append(sorted(index for row in batch for index in row))
    order = DocumentSampler(len(lengths), seed)
    for documents in taken:  # the sampler's order, nothing left out, nothing twice
        assert documents == sorted(order.next(len(documents)))
    tokens = sum(lengths[index] for batch in batches for row in batch for index in row)
    assert packed.fill_rate == pytest.approx(tokens / (count * rows * ROW))


@given(LENGTHS, st.integers(1, 4), st.integers(0, 999), st.integers(0, 8))
def test_resume_at_any_batch_gives_the_same_batches(lengths: list[int], rows: int, seed: int, before: int) -> None:
    whole = batcher(lengths, rows, seed)
    for _ in range(before):
        next(whole)
    resumed = batcher(lengths, rows, seed)
    resumed.load_state_dict(whole.state_dict())
    assert [next(resumed) for _ in range(4)] == [next(whole) for _ in range(4)]


def test_a_batch_closes_at_the_first_document_that_fits_nowhere() -> None:
    lengths = [10, 10, 6, 7, 1]
    packed = PackedBatcher(Store(lengths), SequentialSampler(5), 2, ROW)
    assert packed.fill_rate == 0
    assert next(packed) == [[0, 2], [1]]  # 7 fits in no row: the batch closes, though the later 1 would fit
    assert packed.state_dict() == {"sampler": {"epoch": 0, "position": 4}, "carried": 3}
    assert next(packed) == [[3, 4], [0]]


def test_states_of_other_stores_are_refused() -> None:
    with pytest.raises(ValueError, match="carried document 5"):
        batcher([1, 2], 1).load_state_dict({"sampler": {"epoch": 0, "position": 0}, "carried": 5})
    with pytest.raises(ValueError, match="the sampler knows 3 documents, the store 2"):
        PackedBatcher(Store([1, 2]), DocumentSampler(3, 1), 1, ROW)
    with pytest.raises(ValueError, match="at least one row"):
        batcher([1, 2], 0)
