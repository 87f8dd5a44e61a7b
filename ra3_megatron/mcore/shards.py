"""Which part of which whole tensor a process holds, as Megatron's sharded state dict says it."""

from collections.abc import Iterator
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8


def shards_of(chunk: Any, metadata: dict[str, Any]) -> Iterator[ShardedTensor]:
    """The shards of a model chunk's weights; their `data` is memory of the weights themselves, or a copy in bf16 of
    those that are kept in FP8.

    The first `prepend_axis_num` entries of `global_offset` are the place in the stacked axes (layer, expert), the
    others the offset within the tensor. The halves of a gated layer are two shards of one tensor.
    """
    state = chunk.sharded_state_dict(metadata=dict(metadata))
    force_all_tensors_to_non_fp8(state)
    apply_factories(state)
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            yield value
