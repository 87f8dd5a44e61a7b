"""The choice of tokens inside vLLM: a logits processor that decides itself, and makes vLLM write down its decision.

vLLM's own sampler knows neither the uniforms of a request nor token sets of thousands of ids, and its log-probabilities
are not those of the events that the trainer scores. So every request carries an `Instruction`; this processor
evaluates the event or samples the token with the functions that every engine uses (rollout/choice.py), keeps token and
log-probability, and raises the logit of the token to be written, which greedy decoding then takes.

Invariant: a result is kept under (request, number of tokens before it). Positions that vLLM computes more than once
(a prompt in pieces, a preempted request) overwrite it with the same position's value.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from ra3_megatron.rollout.choice import choose, last_of_sets, set_log_probs

if TYPE_CHECKING:
    from vllm import SamplingParams

KEY = "ra3"
"""Where a request's `extra_args` hold its instruction."""

NO_TOKEN = -1
"""Stands for the token of an event, which samples none."""


@dataclass(frozen=True)
class Instruction:
    """What to do at every position of one request."""

    number: int
    """Identifies the request among those of one call."""
    temperature: float
    first: tuple[int, int]
    """Rows of the table: of a sampled token (allowed, universe), of an event (numerator, denominator)."""
    later: tuple[int, int] = (0, 0)
    uniforms: tuple[float, ...] = ()
    """One for each token; none: the request asks for an event."""
    stop_row: int | None = None
    stop: frozenset[int] = frozenset()
    written_end: int | None = None
    """The token that is written for any that ends the request: one at which vLLM stops."""
    greedy: bool = False
    top_p: float = 1.0

    def __deepcopy__(self, _: dict[int, Any]) -> "Instruction":
        return self  # nothing in it changes, and vLLM copies the parameters of every request


@dataclass
class _Row:
    instruction: Instruction
    written: list[int]
    """vLLM's list of the request's tokens so far, which it extends."""


@dataclass
class Stash:
    """Results of one call: tokens and log-probabilities of each request, by position."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    log_probs: dict[int, list[float]] = field(default_factory=dict)

    def put(self, number: int, position: int, token: int, log_prob: float) -> None:
        tokens, log_probs = self.tokens.setdefault(number, []), self.log_probs.setdefault(number, [])
        if position > len(tokens):
            raise RuntimeError(f"request {number}: position {position} was computed before {len(tokens)}")
        del tokens[position:], log_probs[position:]
        tokens.append(token)
        log_probs.append(log_prob)


class Choices(LogitsProcessor):
    """See the module's docstring. Requests without an instruction (vLLM's warm-up) are left alone."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.device = device
        self.stash = Stash()
        self._rows: dict[int, _Row] = {}

    def set_table(self, sets: npt.NDArray[np.bool_]) -> None:
        """The table of token sets, bool [rows, vocabulary]."""
        self._table = sets
        self._sets = torch.as_tensor(sets, device=self.device)
        self._last = last_of_sets(self._sets)

    def take(self) -> Stash:
        """Everything kept since the last call of this."""
        stash, self.stash = self.stash, Stash()
        return stash

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, _row)

    def apply(self, logits: Tensor) -> Tensor:
        events = [(place, row) for place, row in self._rows.items() if not row.instruction.uniforms]
        samples = [(place, row) for place, row in self._rows.items() if row.instruction.uniforms]
        if events:
            self._events(logits, events)
        if samples:
            self._samples(logits, samples)
        return logits

    def _events(self, logits: Tensor, rows: list[tuple[int, _Row]]) -> None:
        asked = [row.instruction.first for _, row in rows]
        values = set_log_probs(self._scaled(logits, rows), self._sets, *self._columns(asked))
        for (_, row), value in zip(rows, values.tolist(), strict=True):
            self.stash.put(row.instruction.number, len(row.written), NO_TOKEN, value)

    def _samples(self, logits: Tensor, rows: list[tuple[int, _Row]]) -> None:
        positions = [len(row.written) for _, row in rows]
        asked = [
            row.instruction.later if position else row.instruction.first
            for (_, row), position in zip(rows, positions, strict=True)
        ]
        draws = [row.instruction.uniforms[position] for (_, row), position in zip(rows, positions, strict=True)]
        tokens, values = choose(
            self._scaled(logits, rows),
            self._sets,
            self._last,
            *self._columns(asked),
            torch.tensor(draws, dtype=torch.float64, device=self.device),
            [row.instruction.greedy for _, row in rows],
            [row.instruction.top_p for _, row in rows],
        )
        written = []
        for (_, row), position, token, value in zip(rows, positions, tokens.tolist(), values.tolist(), strict=True):
            self.stash.put(row.instruction.number, position, token, value)
            written.append(self._write(row.instruction, token))
        places = torch.tensor([place for place, _ in rows], device=logits.device)
        logits[places, torch.tensor(written, device=logits.device)] = torch.finfo(logits.dtype).max

    def _scaled(self, logits: Tensor, rows: list[tuple[int, _Row]]) -> Tensor:
        places = torch.tensor([place for place, _ in rows], device=logits.device)
        temperatures = torch.tensor([row.instruction.temperature for _, row in rows], device=logits.device)
        return logits[places].float() / temperatures[:, None]

    def _columns(self, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        first, second = torch.tensor(pairs, device=self.device).unbind(1)
        return first, second

    def _write(self, instruction: Instruction, token: int) -> int:
        if self.ends(instruction, token):
            assert instruction.written_end is not None
            return instruction.written_end
        return token

    def ends(self, instruction: Instruction, token: int) -> bool:
        """Whether the token ends the request."""
        if instruction.stop_row is not None and self._table[instruction.stop_row, token]:
            return True
        return token in instruction.stop


def _row(params: "SamplingParams", _: list[int] | None, written: list[int]) -> _Row | None:
    instruction = (params.extra_args or {}).get(KEY)
    return None if instruction is None else _Row(instruction, written)
