"""Transcripts -> packed TokenBatches, for training on them, scoring them, and the policy gradient.

A value of token j of a transcript belongs to the position that *predicts* it: row position `offset + j - 1`. All
processes build the same plan from the same transcripts and take their share of its micro-batches, so every
data-parallel rank has the same number of them. All rows of a plan have one length, which pipelines and the splits of
sequences need.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.training import EStepConfig, PackedTraining
from ra3_megatron.corpus.packing import pack
from ra3_megatron.em.balance import DocumentCost, deal_out, round_up
from ra3_megatron.em.latent_context import Contexts, whole
from ra3_megatron.mcore.batch import Events, TokenBatch
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.vocab_parallel import ALL, TARGET
from ra3_megatron.text.latents import LatentFormat
from ra3_megatron.text.transcript import Role, Transcript

ROW_MULTIPLE = 64
"""Rows are as long as the fullest one, rounded up to this."""


@dataclass(frozen=True)
class Plan:
    """Which transcript stands where. `rows[r]` holds (transcript, offset) pairs; empty rows fill the last batches."""

    rows: list[list[tuple[int, int]]]
    length: int
    """Positions of every row."""
    micro_batch_size: int
    """Rows of every micro-batch."""
    tokens: int
    """Tokens of all transcripts."""

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
    """Micro-batches of `micro_batch_size` rows, in which transcripts of these lengths are packed first-fit.

    row_length: tokens of a row at most; rows: indices of the transcripts of each row, if they are chosen already;
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
    Raises ValueError when a transcript is longer than the budget rounded down to `sequence_multiple`.
    """
    budget -= budget % sequence_multiple
    packed = deal_out(lengths, budget, runtime.micro_batch_multiple, cost)
    return _place(packed, lengths, budget, 1, sequence_multiple)


def _place(
    packed: Sequence[Sequence[int]], lengths: Sequence[int], row_length: int, micro_batch_size: int, multiple: int
) -> Plan:
    """The plan in which the transcripts of a row stand behind each other; rows as long as the fullest one needs."""
    placed = []
    for row in packed:
        offsets = np.cumsum([0] + [lengths[i] for i in row])[:-1]
        placed.append([(i, int(offset)) for i, offset in zip(row, offsets, strict=True)])
    longest = max((sum(lengths[i] for i in row) for row in packed), default=1)
    length = round_up(min(row_length, round_up(longest, ROW_MULTIPLE)), multiple)
    return Plan(placed, length, micro_batch_size, int(sum(lengths)))


class Planner:
    """How one phase deals out transcripts to micro-batches: by tokens or by rows, as its section of `config` says."""

    def __init__(self, config: RunConfig, section: PackedTraining | EStepConfig, runtime: Runtime) -> None:
        self.row_length = config.model.context_length
        self.section = section
        self.runtime = runtime
        self.cost = DocumentCost.of(config.model)
        self.sequence_multiple = config.parallel.sequence_multiple * config.model.row_multiple

    def plan(self, transcripts: Sequence[Transcript], rows: Sequence[Sequence[int]] | None = None) -> Plan:
        """The plan of these transcripts; rows: indices of each row of `micro_batch_size` rows, if chosen already."""
        lengths = [t.num_tokens for t in transcripts]
        budget, size, multiple = self.section.micro_batch_tokens, self.section.micro_batch_size, self.sequence_multiple
        if budget is not None:
            return plan_tokens(lengths, budget, self.cost, self.runtime, multiple)
        return plan_rows(lengths, self.row_length, size, self.runtime, rows, multiple)


class RowWriter:
    """Fills the tensors of one micro-batch from per-token arrays of transcripts."""

    def __init__(self, plan: Plan, rows: Sequence[int], transcripts: Sequence[Transcript]) -> None:
        self.plan = plan
        self.places = [(b, i, offset) for b, r in enumerate(rows) for i, offset in plan.rows[r]]
        self.transcripts = transcripts
        self.shape = (len(rows), plan.length)

    def base(self) -> TokenBatch:
        """The tokens alone: ids, positions, segments and targets."""
        ids, positions, targets = (np.zeros(self.shape, dtype=np.int64) for _ in range(3))
        segments = np.full(self.shape, -1, dtype=np.int64)
        for number, (b, i, offset) in enumerate(self.places):
            tokens = self.transcripts[i].ids
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
        """[b, s] of per-token values (`values[i]`: [tokens] of transcript i), each at the position that predicts it."""
        dtype = values[0].dtype if len(values) else np.dtype(np.float32)
        out = np.full(self.shape, fill, dtype=dtype)
        for b, i, offset in self.places:
            out[b, offset : offset + len(values[i]) - 1] = values[i][1:]
        return torch.from_numpy(out)

    def collect(self, out: Tensor) -> dict[int, npt.NDArray[np.float32]]:
        """The inverse of `spread`: transcript index -> [tokens] (0 for the first token, which nothing predicts)."""
        rows = out.float().cpu().numpy()
        found = {}
        for b, i, offset in self.places:
            values = np.zeros(len(self.transcripts[i].ids), dtype=np.float32)
            values[1:] = rows[b, offset : offset + len(values) - 1]
            found[i] = values
        return found


def training_batches(
    transcripts: Sequence[Transcript], plan: Plan, runtime: Runtime, thought_weight: float = 1.0
) -> list[TokenBatch]:
    """Next-token prediction: code tokens weigh 1, tokens of latents `thought_weight`, those of a prompt nothing."""
    thought = [~(t.is_code | t.is_given) for t in transcripts]
    weight = [
        np.where(t.is_given, np.float32(0), np.where(is_thought, np.float32(thought_weight), np.float32(1)))
        for t, is_thought in zip(transcripts, thought, strict=True)
    ]
    batches = []
    for rows in plan.mine(runtime):
        writer = RowWriter(plan, rows, transcripts)
        batches.append(replace(writer.base(), ce_weight=writer.spread(weight), is_thought=writer.spread(thought)))
    return batches


def scoring_batches(
    transcripts: Sequence[Transcript],
    plan: Plan,
    runtime: Runtime,
    latents: LatentFormat,
    everything: bool = False,
    contexts: Contexts | None = None,
) -> list[TokenBatch]:
    """log pi of the scored tokens (role EXPERT; with `everything`, of all tokens).

    A line's first visible token is renormalised over the tokens that start no thought, where it carries the decision.
    contexts: the sequences as which the transcripts are read, which `plan` places; None: one each.
    """
    contexts = contexts or whole(transcripts)
    masks, denominators = [], []
    for transcript in transcripts:
        mask = np.ones(transcript.num_tokens, dtype=bool) if everything else transcript.roles == Role.EXPERT
        masks.append(mask)
        denominators.append(scoring_denominators(transcript, latents))
    masks, denominators = contexts.split(masks), contexts.split(denominators, ALL)
    batches = []
    for rows in plan.mine(runtime):
        writer = RowWriter(plan, rows, contexts.sequences)
        events = Events(mask=writer.spread(masks), denominator=writer.spread(denominators))
        batches.append(replace(writer.base(), choices=events))
    return batches


def scoring_denominators(transcript: Transcript, latents: LatentFormat) -> npt.NDArray[np.int64]:
    """Row of the token sets over which each token's log-probability is normalised when it is scored, [tokens]."""
    rows = np.full(transcript.num_tokens, ALL, dtype=np.int64)
    if latents.implicit_decision:
        first = transcript.first_expert
        tokens = transcript.ids[first]
        sets = latents.think_set_of_token[tokens]
        sets = np.where(latents.sets[sets, tokens], ALL, sets)  # the line is a comment itself: no decision there
        rows[first] = [latents.act_set(int(row)) for row in sets]
    return rows


@dataclass(frozen=True)
class Choices:
    """The events that q chose in one transcript, at the tokens that show them, [tokens] each."""

    mask: npt.NDArray[np.bool_]
    numerator: npt.NDArray[np.int64]
    denominator: npt.NDArray[np.int64]
    merged: npt.NDArray[np.int64]
    decision: npt.NDArray[np.bool_]


def choices_of(transcript: Transcript, latents: LatentFormat) -> Choices:
    """Events whose log-probabilities add up to log q(z | s) of a sampled transcript (method.md, E-step).

    <act>: log q(no thought starts here), one event. <think>: the thought's first token among all, then each further
    token among those that a thought may hold. Expert and forced tokens, and lines without a choice, are no events.
    """
    tokens = transcript.num_tokens
    mask = np.zeros(tokens, dtype=bool)
    numerator = np.full(tokens, TARGET, dtype=np.int64)
    denominator = np.full(tokens, ALL, dtype=np.int64)
    merged = np.full(tokens, TARGET, dtype=np.int64)
    lines = np.flatnonzero(transcript.offered)
    decisions = transcript.decision_positions[lines]
    sets = latents.think_set_of_token[transcript.ids[transcript.first_expert[lines]]]
    act = np.array([latents.act_set(int(row)) for row in sets], dtype=np.int64)
    mask[decisions] = True
    denominator[decisions] = latents.universe
    merged[decisions] = act
    acting = ~transcript.think[lines]
    numerator[decisions[acting]] = act[acting]
    decision = mask.copy()
    inner = (transcript.roles == Role.THOUGHT) & ~decision
    inner &= transcript.offered[np.maximum(transcript.lines, 0)]
    mask |= inner
    denominator[inner] = latents.thought_set
    return Choices(mask, numerator, denominator, merged, decision)


def policy_batches(
    transcripts: Sequence[Transcript],
    advantages: Sequence[npt.NDArray[np.float32]],
    plan: Plan,
    runtime: Runtime,
    latents: LatentFormat,
    entropy_coefficient: float,
    temperature: float,
    contexts: Contexts | None = None,
    copies: Sequence[int] | None = None,
) -> list[TokenBatch]:
    """The policy-gradient stream: advantages[i] is A_t of transcript i, [lines].

    contexts: as in `scoring_batches`. copies: how many equal transcripts each one stands for, whose advantages are
    added up already; None: 1 each.
    """
    contexts = contexts or whole(transcripts)
    copies = copies or [1] * len(transcripts)
    chosen = [choices_of(t, latents) for t in transcripts]
    weights = [
        np.where(c.mask, a[np.maximum(t.lines, 0)], 0).astype(np.float32)
        for t, c, a in zip(transcripts, chosen, advantages, strict=True)
    ]
    behaviour = [t.log_probs for t in transcripts if t.log_probs is not None]
    number = [c.mask.astype(np.float32) * np.float32(n) for c, n in zip(chosen, copies, strict=True)]
    bonus = [n * np.float32(entropy_coefficient) for n in number]
    streams: dict[str, Sequence[npt.NDArray[Any]]] = {
        "mask": contexts.split([c.mask for c in chosen]),
        "numerator": contexts.split([c.numerator for c in chosen], TARGET),
        "denominator": contexts.split([c.denominator for c in chosen], ALL),
        "merged": contexts.split([c.merged for c in chosen], TARGET),
        "decision": contexts.split([c.decision for c in chosen]),
        "advantage": contexts.split(weights),
        "entropy_weight": contexts.split(bonus),
        "copies": contexts.split(number),
    }
    fills = {"numerator": TARGET, "denominator": ALL, "merged": TARGET}
    sampled = contexts.split(behaviour) if len(behaviour) == len(transcripts) else None
    batches = []
    for rows in plan.mine(runtime):
        writer = RowWriter(plan, rows, contexts.sequences)
        spread = {name: writer.spread(values, fills.get(name, 0)) for name, values in streams.items()}
        events = Events(
            mask=spread["mask"],
            numerator=spread["numerator"],
            denominator=spread["denominator"],
            merged=spread["merged"],
            temperature=temperature,
        )
        batches.append(
            replace(
                writer.base(),
                choices=events,
                advantage=spread["advantage"],
                entropy_weight=spread["entropy_weight"],
                copies=spread["copies"],
                behaviour=None if sampled is None else writer.spread(sampled),
                decision=spread["decision"],
            )
        )
    return batches
