"""Token sequences -> rows of micro-batches: which stands where, and the tensors that hold them.

A value of token j of a sequence belongs to the position that *predicts* it: row position `offset + j - 1`. All
processes build the same plan from the same sequences and take their share of its micro-batches, so every data-parallel
rank has the same number of them. All rows of a plan have one length, which pipelines and the splits of sequences need.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ra3_megatron.config.compatibility import length_multiple
from ra3_megatron.config.run import RunConfig
from ra3_megatron.corpus.packing import pack
from ra3_megatron.mcore.batch import TokenBatch
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.training.balance import DocumentCost, deal_out, round_up

ROW_MULTIPLE = 64
"""Rows are as long as the fullest one, rounded up to this."""


class Tokens(Protocol):
    """A sequence of tokens, such as a transcript."""

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """Token ids, [tokens]."""
        ...

    @property
    def num_tokens(self) -> int:
        """How many."""
        ...


@dataclass(frozen=True)
class Plan:
    """Which sequence stands where. `rows[r]` holds (sequence, offset) pairs; empty rows fill the last batches."""

    rows: list[list[tuple[int, int]]]
    length: int
    """Positions of every row."""
    micro_batch_size: int
    """Rows of every micro-batch."""
    tokens: int
    """Tokens of all sequences."""

    @property
    def fill_rate(self) -> float:
        """Share of the positions that hold a token (0 without rows)."""
        return self.tokens / (len(self.rows) * self.length) if self.rows else 0.0

    def mine(self, runtime: Runtime) -> list[list[int]]:
        """Rows of each of this process's micro-batches; micro-batch k goes to data-parallel rank k mod data."""
        size = self.micro_batch_size
        batches = [list(range(start, start + size)) for start in range(0, len(self.rows), size)]
        return batches[runtime.data_rank :: runtime.data_size]


def plan_rows(
    lengths: Sequence[int],
    row_length: int,
    micro_batch_size: int,
    runtime: Runtime,
    rows: Sequence[Sequence[int]] | None = None,
    sequence_multiple: int = 1,
) -> Plan:
    """Micro-batches of `micro_batch_size` rows, in which sequences of these lengths are packed first-fit.

    row_length: tokens of a row at most; rows: indices of the sequences of each row, if they are chosen already;
    sequence_multiple: the length of rows is a multiple of it (and so may exceed `row_length`, by padding).
    The number of micro-batches is a multiple of what the layout needs.
    """
    packed = [list(row) for row in rows] if rows is not None else pack(lengths, row_length)
    packed += [[] for _ in range(-len(packed) % (micro_batch_size * runtime.micro_batch_multiple))]
    return _place(packed, lengths, row_length, micro_batch_size, sequence_multiple)


def plan_tokens(
    lengths: Sequence[int],
    budget: int,
    cost: DocumentCost,
    runtime: Runtime,
    sequence_multiple: int = 1,
) -> Plan:
    """Micro-batches of one row each, about equal in cost, of at most `budget` positions (see `deal_out`).

    sequence_multiple: as in `plan_rows`, but rows never exceed the budget.
    Raises ValueError when a sequence is longer than the budget rounded down to `sequence_multiple`.
    """
    budget -= budget % sequence_multiple
    packed = deal_out(lengths, budget, runtime.micro_batch_multiple, cost)
    return _place(packed, lengths, budget, 1, sequence_multiple)


def _place(
    packed: Sequence[Sequence[int]], lengths: Sequence[int], row_length: int, micro_batch_size: int, multiple: int
) -> Plan:
    """The plan in which the sequences of a row stand behind each other; rows as long as the fullest one needs."""
    placed = []
    for row in packed:
        offsets = np.cumsum([0] + [lengths[i] for i in row])[:-1]
        placed.append([(i, int(offset)) for i, offset in zip(row, offsets, strict=True)])
    longest = max((sum(lengths[i] for i in row) for row in packed), default=1)
    length = round_up(min(row_length, round_up(longest, ROW_MULTIPLE)), multiple)
    return Plan(placed, length, micro_batch_size, int(sum(lengths)))


class Section(Protocol):
    """The part of a configuration that says how a phase deals out its tokens."""

    @property
    def micro_batch_size(self) -> int:
        """Rows a forward pass."""
        ...

    @property
    def micro_batch_tokens(self) -> int | None:
        """Tokens a forward pass; None: by rows."""
        ...


class Planner:
    """How one phase deals out sequences to micro-batches: by tokens or by rows, as its section of `config` says."""

    def __init__(self, config: RunConfig, section: Section, runtime: Runtime) -> None:
        self.row_length = config.model.context_length
        self.section = section
        self.runtime = runtime
        self.cost = DocumentCost.of(config.model)
        self.sequence_multiple = length_multiple(config.model, config.parallel)

    def plan(self, sequences: Sequence[Tokens], rows: Sequence[Sequence[int]] | None = None) -> Plan:
        """The plan of these sequences; rows: indices of each row of `micro_batch_size` rows, if chosen already."""
        lengths = [t.num_tokens for t in sequences]
        budget, size, multiple = self.section.micro_batch_tokens, self.section.micro_batch_size, self.sequence_multiple
        if budget is not None:
            return plan_tokens(lengths, budget, self.cost, self.runtime, multiple)
        return plan_rows(lengths, self.row_length, size, self.runtime, rows, multiple)


class RowWriter:
    """Fills the tensors of one micro-batch from per-token arrays of sequences."""

    def __init__(self, plan: Plan, rows: Sequence[int], sequences: Sequence[Tokens]) -> None:
        self.plan = plan
        self.places = [(b, i, offset) for b, r in enumerate(rows) for i, offset in plan.rows[r]]
        self.sequences = sequences
        self.shape = (len(rows), plan.length)

    def base(self) -> TokenBatch:
        """The tokens alone: ids, positions, segments and targets."""
        ids, positions, targets = (np.zeros(self.shape, dtype=np.int64) for _ in range(3))
        segments = np.full(self.shape, -1, dtype=np.int64)
        for number, (b, i, offset) in enumerate(self.places):
            tokens = self.sequences[i].ids
            here = slice(offset, offset + len(tokens))
            ids[b, here] = tokens
            positions[b, here] = np.arange(len(tokens))
            segments[b, here] = number
            targets[b, offset : offset + len(tokens) - 1] = tokens[1:]
        return TokenBatch(
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            segments=torch.from_numpy(segments),
            targets=torch.from_numpy(targets),
        )

    def spread(self, values: Sequence[npt.NDArray[np.generic]], fill: float = 0) -> Tensor:
        """[b, s] of per-token values (`values[i]`: [tokens] of sequence i), each at the position that predicts it."""
        dtype = values[0].dtype if len(values) else np.dtype(np.float32)
        out = np.full(self.shape, fill, dtype=dtype)
        for b, i, offset in self.places:
            out[b, offset : offset + len(values[i]) - 1] = values[i][1:]
        return torch.from_numpy(out)

    def collect(self, out: Tensor) -> dict[int, npt.NDArray[np.float32]]:
        """The inverse of `spread`: sequence index -> [tokens] (0 for the first token, which nothing predicts)."""
        rows = out.float().cpu().numpy()
        found = {}
        for b, i, offset in self.places:
            values = np.zeros(len(self.sequences[i].ids), dtype=np.float32)
            values[1:] = rows[b, offset : offset + len(values) - 1]
            found[i] = values
        return found
