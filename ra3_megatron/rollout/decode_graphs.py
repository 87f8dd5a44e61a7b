"""Decoding on a GPU by CUDA graphs: one launch a pass where the host would start each kernel by itself.

While transcripts grow by a token a pass, rows and slots of their key/value caches lie in buffers that stay where they
are, padded to a few sizes, and the pass is a graph that reads its tokens from, and leaves its hidden states in, memory
that stays as well. The choice of the next tokens is part of it where nothing but sampling is asked for. A size is
recorded the first time that it comes; a graph is good as long as the buffers and the model's weights stay where they
are (that training changes their values does not matter).

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
from ra3_megatron.rollout.cuda_recorder import CudaRecorder, Recorder
from ra3_megatron.rollout.kv_session import GROWTH, KVSession, Longs
from ra3_megatron.rollout.protocol import Uniforms
from ra3_megatron.rollout.stage_pass import StagePass

SLOTS = 256
"""Slots are padded to a multiple of this."""
GRAPHS = 32
"""At most so many are kept."""
INPUTS = 5
"""Of each row: its token, its position, the row of which the hidden state is asked for, the set of tokens that may
follow, the uniform."""

Chooser = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of hidden states [n, hidden], sets that are allowed, sets that log-probabilities are of, uniforms (fp64 seen as
long), [n] each: the tokens that follow and their log-probabilities, fp64 [2, n]."""


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

    def __init__(self, stage: StagePass, choose: Chooser | None = None, record: Recorder | None = None) -> None:
        """choose: what is recorded behind a pass for `GraphDecoding.draw`; record: none: of CUDA."""
        if stage.runtime.tensor_size * stage.runtime.pipeline_size * stage.runtime.expert_size > 1:
            raise ValueError("a pass over several processes is not recorded")
        self._stage, self._choose, self._record = stage, choose, record or CudaRecorder()
        self._rows = self._slots = 0
        self._caches: list[LayerCache] = []
        self._graphs: dict[tuple[int, int, bool], _Pass] = {}
        self._weights: tuple[int, ...] = ()
        self.draws = choose is not None

    @property
    def recorded(self) -> list[tuple[int, int]]:
        """Rows and slots of the graphs there are, oldest first."""
        return [(rows, slots) for rows, slots, _ in self._graphs]

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

    def run(self, inputs: Longs, rows: int, slots: int, draws: bool) -> tuple[Tensor, Tensor]:
        """Hidden states [rows, hidden] behind a token of each row, or (`draws`) what is chosen behind it, fp64
        [2, rows]; and the inputs on the device.

        inputs: long [INPUTS, rows]. What is returned is valid until the next pass.
        """
        key = (rows, slots, draws)
        found = self._graphs.get(key)
        if found is None:
            if len(self._graphs) >= GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            choose = self._choose if draws else None
            found = _Pass(self._stage, self.caches(rows), rows, slots, choose)
            found.begin(inputs, self._record)
            self._graphs[key] = found
        else:
            found.again(inputs)
        return found.out, found.inputs

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
        self.draws = graphs.draws
        """Whether choices are recorded, which `draw` needs."""
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

    def feed(self, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
        fed, inputs = self._inputs(tokens)
        inputs[2, : len(fed)] = [self._places[row] for row in fed]
        hidden, there = self._run(inputs, fed, draws=False)
        begins = np.cumsum([0, *(len(new) for new in tokens)])[:-1].tolist()
        return hidden.index_select(0, there[2, : len(fed)]), begins

    def draw(
        self, tokens: Sequence[Sequence[int]], sets: Sequence[int], uniforms: Uniforms
    ) -> tuple[list[int], list[float]]:
        """Feed, and sample the token behind each row that is fed: tokens and log-probabilities, in their order.

        sets: rows of the table of token sets, uniforms: fp64, one of each row that is fed.
        """
        fed, inputs = self._inputs(tokens)
        places = [self._places[row] for row in fed]
        inputs[3] = sets[0]  # a choice behind other rows is made, too, and left
        inputs[3, places], inputs[4, places] = sets, uniforms.view(np.int64)
        ids, values = self._run(inputs, fed, draws=True)[0].tolist()
        return [int(ids[place]) for place in places], [values[place] for place in places]

    def _inputs(self, tokens: Sequence[Sequence[int]]) -> tuple[list[int], Longs]:
        """Rows that are fed, and the inputs of a pass as far as they are known."""
        if any(len(new) > 1 for new in tokens):
            raise ValueError("a row grows by one token a pass")
        inputs = np.zeros((INPUTS, self._rows), dtype=np.int64)
        inputs[1, self._places] = self._lengths
        fed = [row for row, new in enumerate(tokens) if new]
        inputs[0, [self._places[row] for row in fed]] = [tokens[row][0] for row in fed]
        return fed, inputs

    @torch.no_grad()
    def _run(self, inputs: Longs, fed: Sequence[int], draws: bool) -> tuple[Tensor, Tensor]:
        found = self._graphs.run(inputs, self._rows, self._slots, draws)
        for row in fed:
            self._lengths[row] += 1
        return found

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
    """A pass over rows with one token each, and the choice of the next ones where it is given."""

    out: Tensor

    def __init__(
        self, stage: StagePass, caches: list[LayerCache], rows: int, slots: int, choose: Chooser | None
    ) -> None:
        self._stage, self._caches, self._rows, self._slots, self._choose = stage, caches, rows, slots, choose
        device = stage.runtime.device
        self.inputs = torch.zeros(INPUTS, rows, dtype=torch.long, device=device)
        self._again: Callable[[], None] | None = None

    def begin(self, inputs: Longs, record: Recorder) -> None:
        """The first time."""
        self._move(inputs)
        self.out, self._again = record(self._forward)

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
        group = RowGroup(None, every[:, None], every, every, self._slots, positions[:, None], whole=True)
        batch = TokenBatch(ids[None], positions[None], every[None], ids[None])
        hidden = self._stage(batch, self._caches, CacheView(every, positions, [group]))
        return hidden if self._choose is None else self._choose(hidden, self.inputs[3], self.inputs[3], self.inputs[4])


def require_cuda_graphs(rollout: RolloutConfig, device: torch.device) -> None:
    """Raise UserError when graphs are asked for and this is no GPU."""
    if rollout.cuda_graphs and device.type != "cuda":
        raise UserError("rollout.cuda_graphs=true: needs an NVIDIA GPU, and this process runs on the CPU: leave it out")
