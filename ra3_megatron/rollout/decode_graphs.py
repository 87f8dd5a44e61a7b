"""Decoding on a GPU by CUDA graphs: one launch a pass where the host would start each kernel by itself.

While transcripts grow by a token a pass, rows and slots of their key/value caches lie in buffers that stay where they
are, padded to a few sizes, and the pass is a graph that reads its tokens from, and leaves its hidden states in, memory
that stays as well. A size is recorded the first time that it comes; a graph is good as long as the buffers and the
model's weights stay where they are (that training changes their values does not matter).

Without graphs the same loop runs on the session itself (`PlainDecoding`).
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.runtime import RolloutConfig
from ra3_megatron.mcore.attention import CacheView, LayerCache, RowGroup
from ra3_megatron.mcore.batch import TokenBatch
from ra3_megatron.rollout.kv_session import GROWTH, KVSession, Longs
from ra3_megatron.rollout.stage_pass import StagePass

SLOTS = 256
"""Slots are padded to a multiple of this."""
GRAPHS = 32
"""At most so many are kept."""

Recorder = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""Runs a function so that it can be run again: what it returned, and what runs it again into the same memory."""


class Decoding(Protocol):
    """Rows of a session that grow by a token a pass."""

    def feed(self, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
        """As `KVSession.feed`, with at most one token a row."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; each at most once."""
        ...

    def close(self) -> None:
        """The session holds the rows again."""
        ...


class PlainDecoding:
    """On the session itself."""

    def __init__(self, session: KVSession) -> None:
        self.feed, self.select = session.feed, session.select

    def close(self) -> None:
        """Nothing to do."""


class DecodeGraphs:
    """Buffers and graphs of one model."""

    def __init__(self, stage: StagePass, record: Recorder | None = None) -> None:
        """record: none: of CUDA."""
        if stage.runtime.tensor_size * stage.runtime.pipeline_size * stage.runtime.expert_size > 1:
            raise ValueError("a pass over several processes is not recorded")
        self._stage, self._record = stage, record or CudaRecorder()
        self._rows = self._slots = 0
        self._caches: list[LayerCache] = []
        self._graphs: dict[tuple[int, int], _Pass] = {}
        self._weights: tuple[int, ...] = ()

    @property
    def recorded(self) -> list[tuple[int, int]]:
        """Rows and slots of the graphs there are, oldest first."""
        return list(self._graphs)

    def decoding(self, session: KVSession, more: int) -> "GraphDecoding":
        """The rows of a session, to grow by at most `more` tokens each. It holds nothing until they are given back."""
        rows = 1 << (session.rows - 1).bit_length()
        # a row that has all its tokens writes where the next one would stand
        slots = -(-(max(session.lengths) + more + 1) // SLOTS) * SLOTS
        weights = tuple(p.data_ptr() for chunk in self._stage.chunks for p in chunk.parameters())
        if weights != self._weights:
            self._graphs, self._weights = {}, weights
        if rows > self._rows or slots > self._slots:
            self._grow(max(rows, self._rows), max(slots, self._slots))
        return GraphDecoding(self, session, rows, slots)

    def caches(self, rows: int) -> list[LayerCache]:
        """The first rows of the buffers."""
        return [LayerCache(cache.keys[:rows], cache.values[:rows]) for cache in self._caches]

    def forward(self, inputs: Longs, rows: int, slots: int) -> tuple[Tensor, Tensor]:
        """Hidden states [rows, hidden] of a token of each row, and the inputs on the device, long [3, rows].

        inputs: token and position of each row, and what else is to cross with them. What is returned is valid until the
        next pass.
        """
        found = self._graphs.get((rows, slots))
        if found is None:
            if len(self._graphs) >= GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            found = self._graphs[rows, slots] = _Pass(self._stage, self.caches(rows), rows, slots)
            found.begin(inputs, self._record)
        else:
            found.again(inputs)
        return found.hidden, found.inputs

    def _grow(self, rows: int, slots: int) -> None:
        self._graphs, self._caches = {}, []
        self._rows, self._slots = rows, slots
        config, device = self._stage.config, self._stage.runtime.device
        shape = (rows, config.num_query_groups, slots, config.kv_channels)
        self._caches = [
            LayerCache(*(torch.zeros(shape, dtype=config.params_dtype, device=device) for _ in range(2)))
            for _ in self._stage.attentions
        ]


class GraphDecoding:
    """Rows in the buffers of `DecodeGraphs`."""

    def __init__(self, graphs: DecodeGraphs, session: KVSession, rows: int, slots: int) -> None:
        self._graphs, self._session, self._rows, self._slots = graphs, session, rows, slots
        self._places = list(range(session.rows))
        self._lengths = list(session.lengths)
        used = max(self._lengths)
        for buffer, cache in zip(graphs.caches(session.rows), session.caches, strict=True):
            buffer.keys[:, :, :used] = cache.keys[:, :, :used]
            buffer.values[:, :, :used] = cache.values[:, :, :used]
            # what earlier rows left is masked, but 0 times NaN is NaN: a model that diverged would outlive its repair
            buffer.keys[:, :, used:slots] = 0
            buffer.values[:, :, used:slots] = 0
        session.open(0)

    @torch.no_grad()
    def feed(self, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
        if any(len(new) > 1 for new in tokens):
            raise ValueError("a row grows by one token a pass")
        inputs = np.zeros((3, self._rows), dtype=np.int64)
        fed = [row for row, new in enumerate(tokens) if new]
        for row, new in enumerate(tokens):
            place = self._places[row]
            inputs[1, place] = self._lengths[row]
            if new:
                inputs[0, place] = new[0]
        inputs[2, : len(fed)] = [self._places[row] for row in fed]
        hidden, there = self._graphs.forward(inputs, self._rows, self._slots)
        for row in fed:
            self._lengths[row] += 1
        begins = np.cumsum([0, *(len(new) for new in tokens)])[:-1].tolist()
        return hidden.index_select(0, there[2, : len(fed)]), begins

    def select(self, rows: Sequence[int]) -> None:
        if len(set(rows)) != len(rows):
            raise ValueError("a row is kept once")
        self._places = [self._places[row] for row in rows]
        self._lengths = [self._lengths[row] for row in rows]

    def close(self) -> None:
        if not self._places:
            return
        slots = -(-max(self._lengths) // GROWTH) * GROWTH
        index = torch.tensor(self._places, device=self._session.device)
        self._session.lengths = self._lengths
        self._session.caches = [
            LayerCache(
                cache.keys[:, :, :slots].index_select(0, index), cache.values[:, :, :slots].index_select(0, index)
            )
            for cache in self._graphs.caches(self._rows)
        ]


class _Pass:
    """A pass over rows with one token each."""

    hidden: Tensor

    def __init__(self, stage: StagePass, caches: list[LayerCache], rows: int, slots: int) -> None:
        self._stage, self._caches, self._rows, self._slots = stage, caches, rows, slots
        device = stage.runtime.device
        self.inputs = torch.zeros(3, rows, dtype=torch.long, device=device)
        self._again: Callable[[], None] | None = None

    def begin(self, inputs: Longs, record: Recorder) -> None:
        """The first time."""
        self._move(inputs)
        self.hidden, self._again = record(self._forward)

    def again(self, inputs: Longs) -> None:
        """Every other time."""
        assert self._again is not None
        self._move(inputs)
        self._again()

    def _move(self, inputs: Longs) -> None:
        host = torch.from_numpy(inputs)
        self.inputs.copy_(host.pin_memory() if self.inputs.is_cuda else host, non_blocking=True)

    def _forward(self) -> Tensor:
        ids, positions = self.inputs[0], self.inputs[1]
        every = torch.arange(self._rows, device=ids.device)
        group = RowGroup(None, every[:, None], every, every, self._slots, positions[:, None])
        batch = TokenBatch(ids[None], positions[None], every[None], ids[None])
        return self._stage(batch, self._caches, CacheView(every, positions, [group]))


class CudaRecorder:
    """Records into graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """What `function` returned, and what runs its kernels again."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up, which cannot be recorded
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads, as NCCL's that watches, go on with what they do
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = function()
        graph.replay()  # recording computes nothing
        return out, graph.replay


def require_cuda_graphs(rollout: RolloutConfig, device: torch.device) -> None:
    """Raise UserError when graphs are asked for and this is no GPU."""
    if rollout.cuda_graphs and device.type != "cuda":
        raise UserError("rollout.cuda_graphs=true: needs an NVIDIA GPU, and this process runs on the CPU: leave it out")
