"""Who sends what to whom, and in which order: the same on every process, made from descriptions alone.

Tensors travel in the order of the links. Their pieces are cut by rows into blocks of at most `limit` elements; a round
is a run of blocks of at most as many together (a single row may be longer). In a round every process sends each sender
one message at most, so what is on the way never exceeds `limit` elements a process.

A sender takes each piece from itself, if it holds it; else from its own replica; else (experts that live on other
replicas) from the nearest rank that holds it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ra3_megatron.hf.weights import EMBEDDING, Link, Shape, Slot, same
from ra3_megatron.rollout.refit.shards import Holdings

LM_HEAD = "lm_head.weight"

_Cut = tuple[Shape, Shape]
"""Start and shape of a part."""
_Holders = Mapping[_Cut, Sequence[tuple[int, int]]]
"""Each distinct piece of a slot: the ranks that hold it, and its number among theirs."""


@dataclass(frozen=True)
class Block:
    """Rows of a piece on the way from a source to a sender."""

    link: int
    """Number of the link whose slot it is part of."""
    start: Shape
    """Where it begins in the slot's tensor."""
    shape: Shape
    sender: int
    source: int
    """Ranks; the same one: nothing travels."""
    piece: int
    """Number of the piece among those of the source."""
    row: int
    """First of its rows in the piece."""
    alone: bool
    """The slot has this piece only."""
    last: bool
    """It completes the slot."""


@dataclass(frozen=True)
class Plan:
    """What one process does."""

    links: Sequence[Link]
    rounds: Sequence[Sequence[Block]]
    """Blocks that this process sends or receives; as many rounds on every process."""


def with_output_layer(links: Sequence[Link]) -> list[Link]:
    """Links that bring the output layer in any case: of tied embeddings too, engines keep a tensor of its own."""
    if any(LM_HEAD in link.names for link in links):
        return list(links)
    embedding = next(link.slot for link in links if link.slot.key == EMBEDDING)
    return [*links, same(embedding, LM_HEAD)]


def leaders(replicas: Sequence[int]) -> list[int]:
    """The lowest rank of each replica. replicas: number of the replica of every rank."""
    return sorted({replica: rank for rank, replica in reversed(list(enumerate(replicas)))}.values())


def make_plan(
    links: Sequence[Link], everybody: Sequence[Holdings], senders: Sequence[int], rank: int, limit: int
) -> Plan:
    """What `rank` does.

    everybody: in rank order; senders: ranks at which whole tensors are put together; limit: elements of a round.
    Raises ValueError when the links and the model that the processes hold are not the same.
    """
    found = _by_slot(everybody)
    wanted = {(link.slot.key, link.slot.place) for link in links}
    for key, place in found:
        if (key, place) not in wanted:
            raise ValueError(f"the model's weight {key} at {place} is not part of the weight map")
    rounds: list[list[Block]] = [[]]
    filled = 0
    for number, link in enumerate(links):
        holders = _clipped(link.slot, found.get((link.slot.key, link.slot.place), {}))
        _check_tiling(link.slot, list(holders))
        pieces = sorted(holders.items())
        for order, ((start, shape), ranks) in enumerate(pieces):
            sources = {sender: _nearest(everybody, ranks, sender) for sender in senders}
            kept = {sender: source for sender, source in sources.items() if rank in (sender, source[0])}
            for row, count in _rows(shape, limit):
                size = count * _row_size(shape)
                if filled and filled + size > limit:
                    rounds.append([])
                    filled = 0
                filled += size
                for sender, (source, piece) in kept.items():
                    rounds[-1].append(
                        Block(
                            link=number,
                            start=(start[0] + row, *start[1:]),
                            shape=(count, *shape[1:]),
                            sender=sender,
                            source=source,
                            piece=piece,
                            row=row,
                            alone=len(pieces) == 1,
                            last=order == len(pieces) - 1 and row + count == shape[0],
                        )
                    )
    return Plan(links, rounds)


def _by_slot(everybody: Sequence[Holdings]) -> dict[tuple[str, Shape], dict[_Cut, list[tuple[int, int]]]]:
    found: dict[tuple[str, Shape], dict[_Cut, list[tuple[int, int]]]] = {}
    for holdings in everybody:
        for number, piece in enumerate(holdings.pieces):
            cuts = found.setdefault((piece.key, piece.place), {})
            cuts.setdefault((piece.start, piece.shape), []).append((holdings.rank, number))
    return found


def _clipped(slot: Slot, holders: _Holders) -> dict[_Cut, list[tuple[int, int]]]:
    """Without the rows that pad the vocabulary."""
    clipped: dict[_Cut, list[tuple[int, int]]] = {}
    for (start, shape), ranks in holders.items():
        rows = min(shape[0], slot.shape[0] - start[0]) if slot.padded else shape[0]
        if rows > 0:
            clipped.setdefault((start, (rows, *shape[1:])), []).extend(ranks)
    return clipped


def _check_tiling(slot: Slot, cuts: Sequence[_Cut]) -> None:
    """Every element of the slot is in exactly one piece."""
    name = f"{slot.key} at {slot.place}"
    for start, shape in cuts:
        if len(shape) != len(slot.shape) or any(a + n > m for a, n, m in zip(start, shape, slot.shape, strict=True)):
            raise ValueError(f"the weight {name}: the model has a piece {shape} at {start}, the map says {slot.shape}")
    for number, first in enumerate(cuts):
        if any(_overlap(first, other) for other in cuts[number + 1 :]):
            raise ValueError(f"the weight {name}: pieces of the model overlap")
    held = sum(prod(shape) for _, shape in cuts)
    if held != prod(slot.shape):
        raise ValueError(f"the weight {name}: the model holds {held} of the {prod(slot.shape)} elements of the map")


def _overlap(one: _Cut, other: _Cut) -> bool:
    return all(a < b + m and b < a + n for a, n, b, m in zip(one[0], one[1], other[0], other[1], strict=True))


def _nearest(everybody: Sequence[Holdings], holders: Sequence[tuple[int, int]], sender: int) -> tuple[int, int]:
    def distance(holder: tuple[int, int]) -> tuple[bool, int, int]:
        rank = holder[0]
        return everybody[rank].replica != everybody[sender].replica, abs(rank - sender), rank

    return min(holders, key=distance)


def _rows(shape: Shape, limit: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each block of a piece."""
    step = max(1, limit // _row_size(shape))
    for row in range(0, shape[0], step):
        yield row, min(step, shape[0] - row)


def _row_size(shape: Shape) -> int:
    return prod(shape[1:])
