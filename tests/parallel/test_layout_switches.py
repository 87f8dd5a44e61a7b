"""Keys of `parallel` that may change no result do what they are for: they save work, memory or messages.

The matrix alone would not notice a switch that is connected to nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.mcore.attention import CachedAttention
from ra3_megatron.mcore.loss import PolicyLoss
from ra3_megatron.mcore.model import chunks_of
from ra3_megatron.mcore.startup import Runtime, initialize
from ra3_megatron.mcore.trainer import Trainer
from tests.mcore.small_models import MODEL, ROW_LENGTH, make_documents, make_trainer, micro_batches, put_in_rows
from tests.processes import run_processes

DEEP = MODEL.model_copy(update={"num_layers": 4})
ROWS = 2
"""Rows of a micro-batch."""


class Watch:
    """What the parts of a model are called with."""

    def __init__(self, trainer: Trainer) -> None:
        self.calls: Counter[str] = Counter()
        self.lengths: set[int] = set()
        for chunk in chunks_of(trainer.model):
            for layer in chunk.decoder.layers:
                layer.register_forward_pre_hook(self._layer, with_kwargs=True)
            for module in chunk.modules():
                if isinstance(module, CachedAttention):
                    module.register_forward_pre_hook(self._attention)

    def _layer(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.calls["layer"] += 1
        self.lengths.add(hidden.shape[0])

    def _attention(self, module: torch.nn.Module, args: Any) -> None:
        self.calls["attention"] += 1


def step(parallel: ParallelConfig, runtime: Runtime) -> tuple[Watch, Trainer, int]:
    """One train step; also the number of this process's micro-batches."""
    trainer = make_trainer(parallel, runtime, model=DEEP)
    watch = Watch(trainer)
    batches = micro_batches(put_in_rows(make_documents(12, seed=1)), runtime, ROWS)
    trainer.step(batches, PolicyLoss())
    return watch, trainer, len(batches)


@pytest.mark.parametrize(
    ("settings", "layers", "attentions"),
    [
        ({}, 4, 4),
        ({"recompute": "selective"}, 4, 8),
        ({"recompute": "full"}, 8, 8),
        ({"recompute": "full", "recompute_method": "block", "recompute_layers": 1}, 5, 5),
    ],
)
def test_recompute_runs_what_it_does_not_keep_again(
    runtime: Runtime, settings: dict[str, Any], layers: int, attentions: int
) -> None:
    watch, _, batches = step(ParallelConfig(threads=1, **settings), runtime)
    assert watch.calls == {"layer": layers * batches, "attention": attentions * batches}


def optimizer_elements(trainer: Trainer) -> int:
    """Numbers of first moments on this process."""
    states = trainer.optimizer.optimizer.state.values()
    return sum(state["exp_avg"].numel() for state in states)


def in_two_processes() -> dict[str, tuple[Counter[str], set[int], int, int]]:
    found = {}
    for name, settings in {
        "tensor": {"tensor": 2},
        "sequence": {"tensor": 2, "sequence": True},
        "context": {"context": 2},
        "pipeline": {"pipeline": 2},
        "data": {"data": 2},
        "distributed_optimizer": {"data": 2, "distributed_optimizer": True},
    }.items():
        parallel = ParallelConfig(threads=1, **settings)
        watch, trainer, batches = step(parallel, initialize(parallel, seed=1))
        found[name] = (watch.calls, watch.lengths, optimizer_elements(trainer), batches)
    return found


@pytest.mark.multiprocess
def test_each_axis_splits_what_it_is_to_split(runtime: Runtime) -> None:
    _, trainer, batches = step(ParallelConfig(threads=1), runtime)
    everything = optimizer_elements(trainer)
    for rank in run_processes(2, in_two_processes):
        layers = {name: calls["layer"] / count for name, (calls, _, _, count) in rank.items()}
        assert layers == {name: 2 if name == "pipeline" else 4 for name in layers}, "layers of a process"
        split = {name for name, (_, lengths, _, _) in rank.items() if lengths == {ROW_LENGTH // 2}}
        assert split == {"sequence", "context"}, "activations between layers"
        dealt = {name for name, (_, _, _, count) in rank.items() if count == -(-batches // 2)}
        assert dealt == {"data", "distributed_optimizer"}, "micro-batches"
        share = {name: elements / everything for name, (_, _, elements, _) in rank.items()}
        assert share["data"] == share["context"] == 1, "replicas"
        assert all(0.4 < share[name] < 0.6 for name in ("tensor", "sequence", "pipeline", "distributed_optimizer"))
