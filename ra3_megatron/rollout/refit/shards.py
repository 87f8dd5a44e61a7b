"""What a process holds of the whole model: pieces of the slots of hf.weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ra3_megatron.hf.weights import Shape
from ra3_megatron.mcore.model import SHARDING, LanguageModel
from ra3_megatron.mcore.shards import shards_of


@dataclass(frozen=True)
class Piece:
    """A rectangular part of a slot's tensor."""

    key: str
    place: Shape
    """The slot's."""
    start: Shape
    """Where the part begins in the slot's tensor."""
    shape: Shape


@dataclass(frozen=True)
class Holdings:
    """What one process holds, as all processes are told."""

    rank: int
    replica: int
    """Number of the copy of the model that the process belongs to."""
    pieces: tuple[Piece, ...]


def local_pieces(chunks: Sequence[LanguageModel]) -> list[tuple[Piece, Tensor]]:
    """Every piece of this process's chunks, with the memory of the weights that it is, or a copy of weights in FP8.

    Raises RuntimeError when a piece of other weights is a copy: it would not follow the training.
    """
    pieces = []
    for chunk in chunks:
        follow = follow_training(chunk)
        weights = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()} if follow else set()
        for shard in shards_of(chunk, SHARDING):
            fixed = shard.prepend_axis_num
            piece = Piece(
                key=shard.key,
                place=tuple(shard.global_offset[:fixed]),
                start=tuple(shard.global_offset[fixed:]),
                shape=tuple(shard.data.shape),
            )
            if follow and shard.data.untyped_storage().data_ptr() not in weights:
                raise RuntimeError(f"the shard {piece.key} at {piece.place} is a copy of the weight, not the weight")
            pieces.append((piece, shard.data.detach()))
    return pieces


def follow_training(chunk: LanguageModel) -> bool:
    """Whether the tensors of `local_pieces` are the weights themselves; in FP8 they are copies, to be read anew."""
    return not chunk.config.fp8_param


def addresses(chunks: Sequence[LanguageModel]) -> list[int]:
    """Where the weights are in memory: while it is the same, so are the tensors of `local_pieces`."""
    return [parameter.data_ptr() for chunk in chunks for parameter in chunk.parameters()]


def wire_dtype(pieces: Sequence[tuple[Piece, Tensor]]) -> torch.dtype:
    """The dtype of the weights. Raises ValueError when they have several."""
    kinds = {tensor.dtype for _, tensor in pieces}
    if len(kinds) != 1:
        raise ValueError(
            f"the weights have several dtypes ({', '.join(sorted(map(str, kinds)))}): name the one to send"
        )
    return kinds.pop()
