"""No process holds more than its own weights, the buckets and one whole tensor: allocations of a refit are counted."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from collected import Collector
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ra3_megatron.mcore  # noqa: F401
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.hf.families import family_for
from ra3_megatron.mcore.startup import initialize
from ra3_megatron.rollout.refit.refit import Refit
from tests.mcore.small_models import VOCAB, build
from tests.processes import run_processes

BUCKET = 16 * 1024
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=512,
    num_attention_heads=4,
    num_query_groups=2,
    context_length=16,
    tied_embeddings=False,
)
LARGEST = 4 * 1024 * 64
"""Bytes of gate and up projection of a layer, one tensor of the trainer's."""
LAYOUTS = {
    "tp2": {"tensor": 2, "placement": "colocated", "transport": "shared"},
    "pp2": {"pipeline": 2, "placement": "server", "transport": "broadcast"},
    "dp2": {"data": 2, "placement": "colocated", "transport": "shared"},
}


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that this thread allocates while it is active, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in before | self._live:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        size, place = storage.nbytes(), storage.data_ptr()
        self._live.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, size, place)

    def _forget(self, size: int, place: int) -> None:
        self.now -= size
        self._live.discard(place)


def count_all() -> dict[str, tuple[bool, int, int, int]]:
    """By layout: whether this process sends, what it held at most and after, and bytes of the weights it sent."""
    counts = {}
    for name, keys in LAYOUTS.items():
        settings = dict(keys)
        placement, transport = settings.pop("placement"), settings.pop("transport")
        parallel = ParallelConfig(threads=1, **settings)
        runtime = initialize(parallel, seed=1)
        links = family_for(MODEL).links(MODEL, VOCAB)
        refit = Refit(
            build(parallel, runtime, MODEL),
            runtime,
            links,
            placement=placement,  # type: ignore[arg-type]
            receivers=1,
            transport=transport,  # type: ignore[arg-type]
            bucket_bytes=BUCKET,
            timeout=60.0,
            host="127.0.0.1",
        )
        updates = [Collector().update] if refit.is_sender else []
        refit.send(updates, 0)  # sets up buffers
        with Allocations() as allocations:
            stats = refit.send(updates, 1)
        counts[name] = (refit.is_sender, allocations.most, allocations.now, stats.nbytes)
        refit.close()
    return counts


@pytest.fixture(scope="module")
def counts() -> list[dict[str, tuple[bool, int, int, int]]]:
    return run_processes(2, count_all)


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_of_a_refit_is_bounded(counts: list[dict[str, tuple[bool, int, int, int]]], name: str) -> None:
    small = 2048  # counts and flags
    for rank in counts:
        is_sender, most, after, sent = rank[name]
        whole = LARGEST if is_sender else 0
        assert sent > 6 * LARGEST
        assert after <= small
        assert whole <= most <= whole + BUCKET + small


def test_allocations_are_counted() -> None:
    kept = torch.zeros(100)
    with Allocations() as allocations:
        one = torch.ones(1000)
        kept.view(10, 10).add_(1)
        assert (allocations.now, allocations.most) == (4000, 4000)
        two = one + 1
        assert (allocations.now, allocations.most) == (8000, 8000)
        del one
        assert (allocations.now, allocations.most) == (4000, 8000)
        parts = two.view(10, 100).unbind()
        del two
        assert allocations.now == 4000
        del parts
        assert allocations.now == 0
