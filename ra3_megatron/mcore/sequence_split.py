"""How a row of tokens is split over the context-parallel group, and put together again.

A row of s tokens is cut into 2 * size pieces; rank r holds pieces r and 2 * size - 1 - r, one after the other, so that
causal attention costs every rank about the same (Megatron's order). s is a multiple of 2 * size.
"""

from functools import lru_cache

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor


@lru_cache(maxsize=64)
def places(length: int, rank: int, size: int) -> Tensor:
    """Places in a row of `length` tokens that rank `rank` holds, in its order, long [length / size]."""
    if length % (2 * size):
        raise ValueError(f"a row of {length} tokens cannot be split over {size} context-parallel ranks")
    pieces = torch.arange(length).view(2 * size, -1)
    return torch.cat([pieces[rank], pieces[2 * size - 1 - rank]])


@lru_cache(maxsize=64)
def original_order(length: int, size: int) -> Tensor:
    """Where each token of a row stands when the ranks' shares are put behind each other, long [length]."""
    return torch.cat([places(length, rank, size) for rank in range(size)]).argsort()


def gather_keys(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Whole rows from every rank's share, [s / size, ...] -> [s, ...] in the order of the row; differentiable."""
    together = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=True, group=group)
    order = original_order(together.shape[0], group.size()).to(values.device)
    return together.index_select(0, order)


@torch.no_grad()
def gather_outputs(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Whole rows from every rank's share, [..., s / size] -> [..., s]."""
    shares = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(shares, values.contiguous(), group=group)
    together = torch.cat(shares, dim=-1)
    return together.index_select(-1, original_order(together.shape[-1], group.size()).to(values.device))
