"""Whole tensors on the senders, from pieces on all processes, round by round of a plan.

Collective: every process goes through all rounds. A sender that stops reading would leave the others waiting, so it
must go on to the end whatever happens to what it read.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ra3_megatron.hf.weights import Link
from ra3_megatron.rollout.refit.plan import Block, Plan


def gathered(plan: Plan, pieces: Sequence[Tensor], rank: int, dtype: torch.dtype) -> Iterator[tuple[Link, Tensor]]:
    """On a sender: each link and its whole tensor, in order. On other processes: nothing.

    pieces: this process's tensors, in the order of its holdings. dtype: in which pieces travel. A whole tensor may
    be memory of the weights themselves, in their dtype: it must not be written to.
    """
    wholes: dict[int, Tensor] = {}
    for blocks in plan.rounds:
        messages = _exchange(blocks, pieces, rank, dtype)
        for block in blocks:
            if block.sender != rank:
                continue
            here = pieces[block.piece] if block.source == rank else None
            shape = plan.links[block.link].slot.shape
            if here is not None and block.alone:
                wholes[block.link] = here[: shape[0]]
            else:
                if block.link not in wholes:
                    device = pieces[0].device
                    wholes[block.link] = torch.empty(shape, dtype=dtype, device=device)
                _put(wholes[block.link], block, _part(here, block) if here is not None else messages[block.source])
            if block.last:
                yield plan.links[block.link], wholes.pop(block.link)
        del messages


class _Message:
    """Blocks of one source, one behind the other."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.taken = 0

    def take(self, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape)
        part = self.buffer[self.taken : self.taken + size]
        self.taken += size
        return part.view(*shape)


def _exchange(blocks: Sequence[Block], pieces: Sequence[Tensor], rank: int, dtype: torch.dtype) -> dict[int, _Message]:
    """Send and receive what travels in a round; the messages that arrived, by source."""
    outgoing: dict[int, list[Tensor]] = {}
    incoming: dict[int, int] = {}
    for block in blocks:
        if block.source == rank and block.sender != rank:
            part = _part(pieces[block.piece], block).reshape(-1).to(dtype)
            outgoing.setdefault(block.sender, []).append(part)
        elif block.sender == rank and block.source != rank:
            incoming[block.source] = incoming.get(block.source, 0) + math.prod(block.shape)
    messages = {
        source: _Message(torch.empty(size, dtype=dtype, device=pieces[0].device)) for source, size in incoming.items()
    }
    operations = [dist.P2POp(dist.irecv, message.buffer, source) for source, message in messages.items()]
    for sender, parts in outgoing.items():
        operations.append(dist.P2POp(dist.isend, parts[0] if len(parts) == 1 else torch.cat(parts), sender))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return messages


def _part(piece: Tensor, block: Block) -> Tensor:
    return piece[block.row : block.row + block.shape[0]]


def _put(whole: Tensor, block: Block, part: "Tensor | _Message") -> None:
    target = whole
    for axis, (start, length) in enumerate(zip(block.start, block.shape, strict=True)):
        target = target.narrow(axis, start, length)
    target.copy_(part.take(block.shape) if isinstance(part, _Message) else part)
