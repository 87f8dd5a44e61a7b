"""Adam's state in a form that knows neither the layout nor whether the optimizer is distributed.

For each weight `NAME` a checkpoint holds `optimizer.state.exp_avg.NAME` and `optimizer.state.exp_avg_sq.NAME` (fp32,
the weight's shape and shards) and, for a weight that is not fp32 itself, its fp32 original
`optimizer.state.fp32_param.NAME`; and one number of steps. Megatron's replicated and distributed optimizers write
different selections under different names, so that neither loads the other's; here both write these.

Learning rate, betas, weight decay and epsilon are not in it: they come from the configuration and from the
learning-rate schedule, which sets them before every step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "fp32_param"
_PREFIX = "optimizer.state"
_DISTRIBUTED_MASTER = "param"
"""Megatron's name of the fp32 weights of a distributed optimizer."""


def sharded_state(optimizer: Any, weights: dict[str, Any], metadata: dict[str, Any], loading: bool) -> dict[str, Any]:
    """State of Megatron's `optimizer` (which it fills with zeros if there is none), to save or as a template to load.

    weights: sharded state dict of all of this process's model chunks. Collective.
    """
    entries = _entries(weights)
    parts: dict[str, Any] = {}
    steps = set()
    for number, part in _parts(optimizer):
        _allocate(part.optimizer)
        steps |= _steps(part.optimizer)
        if isinstance(part, DistributedOptimizer):
            parts[number] = _sharded_distributed(part, weights, metadata, loading)
        else:
            parts[number] = {
                str(index): {
                    key: make_sharded_optimizer_tensor(entries[id(weight)], tensor, f"{_PREFIX}.{key}")
                    for key, tensor in _tensors(part, weight, master).items()
                }
                for index, (weight, master) in enumerate(_masters(part))
            }
    if len(steps) > 1:
        raise RuntimeError(f"parts of the optimizer have made different numbers of steps: {sorted(steps)}")
    step = torch.tensor(max(steps, default=0))
    dist.all_reduce(step, op=dist.ReduceOp.MAX)  # a rank may hold no part of a distributed optimizer
    return {"step": int(step), "parts": parts}


@torch.no_grad()
def load_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Put loaded state into Megatron's `optimizer`. The model's weights must have been loaded before."""
    for number, part in _parts(optimizer):
        loaded = state["parts"][number]
        if isinstance(part, DistributedOptimizer):
            tensors = {}
            for index, parameter in enumerate(_weights_in_buffers(part)):
                found = dict(loaded[str(index)])
                found[_DISTRIBUTED_MASTER] = found.pop(MASTER, parameter.data)
                tensors[index] = found
            part.load_parameter_state_from_fully_reshardable(tensors)
        else:
            for index, (weight, master) in enumerate(_masters(part)):
                for key, tensor in _tensors(part, weight, master).items():
                    tensor.copy_(loaded[str(index)][key])
        _set_step(part.optimizer, int(state["step"]))


def _parts(optimizer: Any) -> Iterator[tuple[str, Any]]:
    """Megatron keeps experts (and whatever else is reduced over other processes) in optimizers of their own."""
    for number, part in enumerate(getattr(optimizer, "chained_optimizers", [optimizer])):
        if not getattr(part, "is_stub_optimizer", False):
            yield str(number), part


def _entries(weights: dict[str, Any]) -> dict[int, Any]:
    """How each weight is sharded, by its id."""
    kinds = (ShardedTensor, ShardedTensorFactory)
    return {id(entry.data): entry for entry in nested_values(weights) if isinstance(entry, kinds)}


def _masters(part: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights of a replicated optimizer, and the fp32 tensors that it updates (the weights themselves in fp32)."""
    if not hasattr(part, "float16_groups"):
        for group in part.optimizer.param_groups:
            yield from ((weight, weight) for weight in group["params"])
        return
    groups = zip(part.float16_groups, part.fp32_from_float16_groups, part.fp32_from_fp32_groups, strict=True)
    for float16, masters, fp32 in groups:
        yield from zip(float16, masters, strict=True)
        yield from ((weight, weight) for weight in fp32)


def _tensors(part: Any, weight: Tensor, master: Tensor) -> dict[str, Tensor]:
    state = part.optimizer.state[master]
    tensors = {key: state[key] for key in MOMENTS}
    return tensors if master is weight else {MASTER: master.data, **tensors}


def _weights_in_buffers(part: DistributedOptimizer) -> Iterator[torch.nn.Parameter]:
    """Weights of a distributed optimizer, in the order of Megatron's fully reshardable state."""
    for buffer in part.buffers:
        yield from buffer.param_index_map


def _sharded_distributed(
    part: DistributedOptimizer, weights: dict[str, Any], metadata: dict[str, Any], loading: bool
) -> dict[str, Any]:
    with _places_without_padding(part):
        state = part.sharded_param_state_fully_reshardable(weights, loading, metadata)
    result: dict[str, Any] = {}
    for index, weight in enumerate(_weights_in_buffers(part)):
        tensors = dict(state[index])
        master = tensors.pop(_DISTRIBUTED_MASTER)
        if weight.dtype != torch.float32:
            name = master.key.removeprefix(f"{_PREFIX}.{_DISTRIBUTED_MASTER}.")
            tensors[MASTER] = replace(master, key=f"{_PREFIX}.{MASTER}.{name}")
        result[str(index)] = tensors
    return result


@contextmanager
def _places_without_padding(part: DistributedOptimizer) -> Iterator[None]:
    """Let buffers say where each weight stands when the padding between their buckets is left out.

    Megatron gathers the state without that padding, and then looks weights up where they stand with it: behind the
    first bucket with padding, it would take parts of other weights' state.
    """
    padded = [buffer.param_index_map for buffer in part.buffers]
    for buffer in part.buffers:
        starts = list(accumulate((bucket.numel_unpadded for bucket in buffer.buckets), initial=0))
        shifts = [start - bucket.offset for start, bucket in zip(starts, buffer.buckets, strict=False)]
        buffer.param_index_map = {
            weight: (start + shifts[bucket], end + shifts[bucket], bucket)
            for weight, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, places in zip(part.buffers, padded, strict=True):
            buffer.param_index_map = places


def _allocate(adam: torch.optim.Optimizer) -> None:
    for group in adam.param_groups:
        for parameter in group["params"]:
            state = adam.state[parameter]
            if "exp_avg" not in state:
                state |= {key: torch.zeros_like(parameter.data) for key in MOMENTS}
                if _counts_per_parameter(adam):
                    state["step"] = torch.tensor(0.0)


def _counts_per_parameter(adam: torch.optim.Optimizer) -> bool:
    """torch's Adam keeps a step in each parameter's state, the fused ones of Transformer Engine and apex in groups."""
    return isinstance(adam, torch.optim.Adam)


def _steps(adam: torch.optim.Optimizer) -> set[int]:
    if _counts_per_parameter(adam):
        return {int(state["step"]) for state in adam.state.values()}
    return {int(group["step"]) for group in adam.param_groups if group["params"] and "step" in group}


def _set_step(adam: torch.optim.Optimizer, step: int) -> None:
    if _counts_per_parameter(adam):
        for state in adam.state.values():
            state["step"] = torch.full_like(state["step"], step)  # a tensor of its own for each
        return
    for group in adam.param_groups:
        group["step"] = step
