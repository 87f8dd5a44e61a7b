"""Transcripts -> packed TokenBatches (`training/rows.py`): to train on, to score, for the policy gradient."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ra3_megatron.em.latent_context import Contexts, whole
from ra3_megatron.mcore.batch import Events, Kind, TokenBatch
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.vocab_parallel import ALL, TARGET
from ra3_megatron.text.latents import LatentFormat
from ra3_megatron.text.transcript import Role, Transcript
from ra3_megatron.training.rows import Plan, RowWriter

_KIND_OF_ROLE = np.full(len(Role), Kind.CODE, dtype=np.uint8)
_KIND_OF_ROLE[[Role.DECISION, Role.THOUGHT, Role.FORCED]] = Kind.DECISION, Kind.THOUGHT, Kind.FORCED


def training_batches(
    transcripts: Sequence[Transcript], plan: Plan, runtime: Runtime, thought_weight: float = 1.0
) -> list[TokenBatch]:
    """Next-token prediction: code tokens and decision markers weigh 1, tokens of thoughts `thought_weight` (with what
    the format writes around them), those of a prompt nothing."""
    by_role = np.ones(len(Role), dtype=np.float32)
    by_role[[Role.THOUGHT, Role.FORCED]], by_role[Role.CONTEXT] = thought_weight, 0
    weight = [by_role[t.roles] for t in transcripts]
    kind = [_KIND_OF_ROLE[t.roles] for t in transcripts]
    batches = []
    for rows in plan.mine(runtime):
        writer = RowWriter(plan, rows, transcripts)
        batches.append(replace(writer.base(), ce_weight=writer.spread(weight), kind=writer.spread(kind)))
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
