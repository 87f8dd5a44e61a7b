"""The sampler's order: complete, resumable, dependent on the seed alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ra3_megatron.corpus.sampler import DocumentSampler, SequentialSampler

SEEDS = st.integers(0, 2**31 - 1)
STEPS = st.lists(st.integers(0, 9), max_size=12)


@given(st.integers(1, 40), SEEDS, st.integers(1, 3))
def test_each_epoch_takes_every_document_once(documents: int, seed: int, epochs: int) -> None:
    order = DocumentSampler(documents, seed).next(documents * epochs)
    for epoch in range(epochs):
        assert sorted(order[epoch * documents : (epoch + 1) * documents]) == list(range(documents))


@given(st.integers(1, 20), SEEDS, STEPS, STEPS)
def test_order_does_not_depend_on_how_many_are_taken_and_resume_is_exact(
    documents: int, seed: int, before: list[int], after: list[int]
) -> None:
    whole = DocumentSampler(documents, seed).next(sum(before) + sum(after))
    first = DocumentSampler(documents, seed)
    taken = [index for count in before for index in first.next(count)]
    second = DocumentSampler(documents, seed)
    second.load_state_dict(first.state_dict())
    taken += [index for count in after for index in second.next(count)]
    assert taken == whole


def test_seeds_and_epochs_differ() -> None:
    one, two = DocumentSampler(100, 1).next(200), DocumentSampler(100, 2).next(200)
    assert one != two
    assert one[:100] != one[100:]


def test_order_is_fixed_for_good() -> None:
    """A change here breaks the resume of every run made before it."""
    assert DocumentSampler(8, 1234).next(16) == [5, 4, 7, 3, 6, 2, 0, 1, 0, 5, 7, 3, 6, 4, 2, 1]


def test_sequential_order_and_its_resume() -> None:
    sampler = SequentialSampler(3)
    assert sampler.next(4) == [0, 1, 2, 0]
    resumed = SequentialSampler(3)
    resumed.load_state_dict(sampler.state_dict())
    assert resumed.next(3) == sampler.next(3) == [1, 2, 0]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least one document"):
        DocumentSampler(0, 1)
    with pytest.raises(ValueError, match="does not fit 5 documents"):
        DocumentSampler(5, 1).load_state_dict({"epoch": 0, "position": 6})
