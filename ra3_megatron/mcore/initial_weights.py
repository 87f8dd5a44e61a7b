"""Initial weights that are the same in every layout.

Megatron draws each process's parameters one after another, so they depend on what the process holds. Here every weight
is drawn whole from a generator of its own, named by the seed and the parameter's global name, and each process keeps
its share: the numbers depend on the seed and the architecture alone.

Matrices are normal with standard deviation `init_std`; those that write to the residual stream (the output projections
of attention and feed-forward layers) with init_std / sqrt(2 * layers), as Megatron has it. Norms stay 1, the padding of
the vocabulary is 0.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ra3_megatron.mcore.shards import shards_of

_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@torch.no_grad()
def draw_weights(
    chunks: Sequence[Any], seed: int, init_std: float, num_layers: int, vocab_size: int, metadata: dict[str, Any]
) -> None:
    """Overwrite every matrix of this process's model chunks. vocab_size: tokens that exist."""
    for chunk in chunks:
        drawn: tuple[str, Tensor] | None = None
        for shard in shards_of(chunk, metadata):
            fixed = shard.prepend_axis_num
            shape, offset = list(shard.global_shape[fixed:]), shard.global_offset[fixed:]
            if len(shape) < 2:
                continue
            if shard.key.endswith(_VOCABULARY):
                shape[0] = vocab_size
            name = "/".join([shard.key, *(str(place) for place in shard.global_offset[:fixed])])
            if drawn is None or drawn[0] != name:  # the halves of a gated layer are shards of one tensor
                std = init_std / math.sqrt(2 * num_layers) if shard.key.endswith(_RESIDUAL) else init_std
                drawn = name, torch.empty(shape).normal_(0.0, std, generator=_generator(seed, name))
            size = shard.data.shape
            here = tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))
            piece = drawn[1][here]
            shard.data.zero_()
            shard.data[: piece.shape[0]].copy_(piece)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=False) >> 1)
