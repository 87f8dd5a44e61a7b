"""Graphs that come and go: where their memory lies.

Without a GPU, torch's allocator is a model of its rule for pools: one whose graphs are all gone is not taken back into
use while it holds memory, and cuBLAS's workspace of a stream, made when it first multiplies there, is never given back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ra3_megatron.rollout.cuda_recorder import CudaRecorder


class Allocator:
    """Stands for `torch.cuda`'s part in recording."""

    def __init__(self) -> None:
        self.uses: Counter[int] = Counter()
        self.workspaces: dict[Any, int | None] = {}
        self._handles = self._streams = 0
        allocator = self

        class Graph:
            pool = 0

            def replay(self) -> None:
                pass

            def __del__(self) -> None:
                allocator.uses[self.pool] -= 1

        self.Graph = Graph
        self.now: tuple[Any, int | None] = (0, None)

    def handle(self) -> int:
        self._handles += 1
        return self._handles

    def new_stream(self) -> SimpleNamespace:
        self._streams += 1
        return SimpleNamespace(number=self._streams, wait_stream=lambda other: None)

    @contextmanager
    def on(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.now = self.now, (stream.number, None)
        yield
        self.now = before

    @contextmanager
    def record(self, graph: Any, pool: int, stream: SimpleNamespace, capture_error_mode: str) -> Iterator[None]:
        held = pool in self.workspaces.values()
        assert not held or self.uses[pool] > 0, "INTERNAL ASSERT FAILED: use_count > 0"
        graph.pool = pool
        self.uses[pool] += 1
        before, self.now = self.now, (stream.number, pool)
        yield
        self.now = before

    def product(self) -> Tensor:
        stream, pool = self.now
        self.workspaces.setdefault(stream, pool)
        return torch.zeros(1)


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    found = Allocator()
    monkeypatch.setattr(torch.cuda, "Stream", found.new_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "stream", found.on)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", found.handle)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", found.Graph)
    monkeypatch.setattr(torch.cuda, "graph", found.record)
    return found


def test_after_all_graphs_are_gone_the_next_one_is_recorded(allocator: Allocator) -> None:
    record = CudaRecorder()
    for graphs in (1, 3, 2):
        kept = [record(allocator.product) for _ in range(graphs)]
        assert sum(allocator.uses.values()) == graphs and max(allocator.uses.values()) == graphs, "they share a pool"
        kept.clear()
        assert not sum(allocator.uses.values())


def test_streams_are_the_recorders_own_and_always_the_same(allocator: Allocator) -> None:
    """A stream that products run on costs a workspace for good."""
    first, second = CudaRecorder(), CudaRecorder()
    kept = [record(allocator.product) for record in (first, second, first, second)]
    assert len(kept) == len(allocator.workspaces) == 4


@pytest.mark.gpu
def test_on_a_gpu_after_all_graphs_are_gone_the_next_one_is_recorded() -> None:
    draw = torch.Generator(device="cuda").manual_seed(1)
    weight = torch.randn(512, 512, device="cuda", generator=draw)
    record = CudaRecorder()
    for rows in (1, 4, 32):
        x = torch.randn(rows, 512, device="cuda", generator=draw)
        kept = [record(lambda x=x: x @ weight) for _ in range(2)]  # type: ignore[misc]
        expected = (2 * x) @ weight
        x.mul_(2)
        for out, again in kept:
            again()
            torch.testing.assert_close(out, expected)
        kept.clear()
        del out, again
