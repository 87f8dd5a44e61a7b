"""Recording kernels as CUDA graphs."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Recorder = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""Runs a function so that it can be run again: what it returned, and what runs it again into the same memory."""


class CudaRecorder:
    """Records into graphs that share a pool of memory.

    cuBLAS keeps a workspace for each stream that it multiplies on, for as long as the process lives, and the one of the
    stream that is recorded on lies in the pool. Two things follow. A pool whose graphs are all gone is not empty then,
    and the allocator does not take one with memory but without graphs back into use: the next graph gets a new pool.
    And the streams are the recorder's own, always the same two: another recorder's graphs, whose end gives their
    stream's workspace back from torch 2.12 on, do not share it, and no workspaces are left behind.
    """

    def __init__(self) -> None:
        self._warm_up, self._stream = torch.cuda.Stream(), torch.cuda.Stream()
        self._pool: Any = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """What `function` returned, and what runs its kernels again."""
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
        self._warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._warm_up):  # libraries set themselves up, which cannot be recorded
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(self._warm_up)
        graph = torch.cuda.CUDAGraph()
        # other threads, as NCCL's that watches, go on with what they do
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            out = function()
        self._graphs.add(graph)
        graph.replay()  # recording computes nothing
        return out, graph.replay
