"""The plan covers every element of every tensor once, in bounded rounds, and refuses maps that are not the model's."""

from __future__ import annotations

from math import prod

import pytest

import ra3_megatron.mcore  # noqa: F401
from ra3_megatron.hf.weights import EMBEDDING, Link, Slot, same
from ra3_megatron.rollout.refit.plan import leaders, make_plan, with_output_layer
from ra3_megatron.rollout.refit.shards import Holdings, Piece

MATRIX, TALL, EXPERT = "matrix", EMBEDDING, "expert"
LINKS = [
    same(Slot(TALL, (), (150, 4)), "tall"),
    same(Slot(MATRIX, (0,), (6, 8)), "m0"),
    same(Slot(EXPERT, (0, 0), (4, 4)), "e0"),
    same(Slot(EXPERT, (0, 1), (4, 4)), "e1"),
]


def world() -> list[Holdings]:
    """TP2, DP2, EP2: a padded tensor split by rows, a matrix by columns; expert e on replica e only."""
    holdings = []
    for rank in range(4):
        tensor, replica = rank % 2, rank // 2
        pieces = (
            Piece(TALL, (), (128 * tensor, 0), (128, 4)),
            Piece(MATRIX, (0,), (0, 4 * tensor), (6, 4)),
            Piece(EXPERT, (0, replica), (2 * tensor, 0), (2, 4)),
        )
        holdings.append(Holdings(rank, replica, pieces))
    return holdings


@pytest.mark.parametrize("limit", [1, 5, 16, 100, 10_000])
def test_each_sender_gets_every_element_once_in_bounded_rounds(limit: int) -> None:
    senders = [0, 2]
    plans = [make_plan(LINKS, world(), senders, rank, limit) for rank in range(4)]
    assert len({len(plan.rounds) for plan in plans}) == 1
    for sender in senders:
        filled: dict[int, set[tuple[int, int]]] = {number: set() for number in range(len(LINKS))}
        done = []
        for number, blocks in enumerate(plans[sender].rounds):
            mine = [block for block in blocks if block.sender == sender]
            row = max((prod(block.shape[1:]) for block in mine), default=0)
            assert sum(prod(block.shape) for block in mine) <= max(limit, row)
            for block in mine:
                assert block in plans[block.source].rounds[number], "the source knows of it"
                rows = range(block.start[0], block.start[0] + block.shape[0])
                columns = range(block.start[1], block.start[1] + block.shape[1])
                cells = {(row, column) for row in rows for column in columns}
                assert not cells & filled[block.link]
                filled[block.link] |= cells
                if block.last:
                    assert len(filled[block.link]) == prod(LINKS[block.link].slot.shape)
                    done.append(block.link)
        assert done == list(range(len(LINKS)))


def test_pieces_come_from_the_own_replica_or_the_nearest_holder() -> None:
    for sender in (0, 2):
        blocks = [b for r in make_plan(LINKS, world(), [0, 2], sender, 10_000).rounds for b in r if b.sender == sender]
        sources = {(block.link, block.start): block.source for block in blocks}
        assert sources[0, (0, 0)] == sender and sources[0, (128, 0)] == sender + 1
        assert sources[1, (0, 0)] == sender and sources[1, (0, 4)] == sender + 1
        for expert in (0, 1):
            assert {s for (link, _), s in sources.items() if link == 2 + expert} == {2 * expert, 2 * expert + 1}


def test_experts_come_from_the_nearest_of_several_replicas() -> None:
    """EP2 in four replicas: each expert is held twice."""
    everybody = [Holdings(rank, rank, (Piece(EXPERT, (0, rank % 2), (0, 0), (4, 4)),)) for rank in range(4)]
    senders = list(range(4))
    for sender, sources in enumerate([[0, 1], [0, 1], [2, 1], [2, 3]]):
        plan = make_plan(LINKS[2:], everybody, senders, sender, 100)
        assert [b.source for blocks in plan.rounds for b in blocks if b.sender == sender] == sources


def test_the_lowest_rank_of_each_replica_leads() -> None:
    assert leaders([0, 0, 1, 1]) == [0, 2]
    assert leaders([0, 1, 0, 1]) == [0, 1]
    assert leaders([0, 0, 0]) == [0]


def test_the_output_layer_is_sent_in_any_case() -> None:
    tied = with_output_layer(LINKS)
    assert [link.names for link in tied] == [*(link.names for link in LINKS), ("lm_head.weight",)]
    assert tied[-1].slot == LINKS[0].slot
    assert with_output_layer(tied) == tied


BROKEN: dict[str, tuple[list[Link], str]] = {
    "a weight that no link names": (LINKS[:-1], r"expert at \(0, 1\) is not part of the weight map"),
    "a slot that nobody holds": (
        [*LINKS, same(Slot(MATRIX, (1,), (6, 8)), "m1")],
        r"matrix at \(1,\): the model holds 0 of the 48 elements",
    ),
    "another shape": (
        [LINKS[0], same(Slot(MATRIX, (0,), (6, 7)), "m0"), *LINKS[2:]],
        r"matrix at \(0,\): the model has a piece \(6, 4\) at \(0, 4\), the map says \(6, 7\)",
    ),
    "a larger shape": (
        [LINKS[0], same(Slot(MATRIX, (0,), (6, 9)), "m0"), *LINKS[2:]],
        r"matrix at \(0,\): the model holds 48 of the 54 elements",
    ),
    "a larger vocabulary": (
        [same(Slot(TALL, (), (257, 4)), "tall"), *LINKS[1:]],
        r"embedding.word_embeddings.weight at \(\): the model holds 1024 of the 1028 elements",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_map_that_is_not_the_models_is_refused(what: str) -> None:
    links, message = BROKEN[what]
    with pytest.raises(ValueError, match=message):
        make_plan(links, world(), [0], 0, 100)


def test_pieces_that_overlap_are_refused() -> None:
    everybody = world()
    shifted = Piece(MATRIX, (0,), (0, 3), (6, 4))
    everybody[1] = Holdings(1, 0, (everybody[1].pieces[0], shifted, everybody[1].pieces[2]))
    with pytest.raises(ValueError, match=r"matrix at \(0,\): pieces of the model overlap"):
        make_plan(LINKS, everybody, [0], 0, 100)
