"""Responses -> packed TokenBatches: the policy-gradient stream of RLVR, and passes that score responses.

Every sampled token is a choice among all tokens. The stream is normalised by `decision`: all tokens that count (loss
per token), or one token of each response (loss per response); the weights of the tokens do the rest.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ra3_megatron.mcore.batch import Events, TokenBatch
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import forward
from ra3_megatron.mcore.vocab_parallel import ALL
from ra3_megatron.rlvr.advantages import Loss, token_weight
from ra3_megatron.rlvr.responses import Response
from ra3_megatron.training.rows import Plan, RowWriter

Floats = npt.NDArray[np.float32]


def policy_batches(
    responses: Sequence[Response],
    advantages: Sequence[float],
    plan: Plan,
    runtime: Runtime,
    loss: Loss,
    max_tokens: int,
    temperature: float,
    entropy_coefficient: float = 0.0,
    kl_coefficient: float = 0.0,
    reference: Sequence[Floats] | None = None,
    allowed: int = ALL,
) -> list[TokenBatch]:
    """This process's micro-batches. reference: see `log_probs_of`; allowed: row of the table of token sets that each
    token was sampled from."""
    masks, weights, decisions = [], [], []
    for response in responses:
        mask = response.sampled
        weight = token_weight(loss, max(response.response_tokens, 1), max_tokens)
        decision = mask.copy()
        if loss != "token":
            decision[:-1] = False
        masks.append(mask)
        weights.append(mask * np.float32(weight))
        decisions.append(decision)
    streams: dict[str, Sequence[npt.NDArray[np.generic]]] = {
        "advantage": [w * np.float32(a) for w, a in zip(weights, advantages, strict=True)],
        "entropy_weight": [w * np.float32(entropy_coefficient) for w in weights],
        "decision": decisions,
        "behaviour": [r.log_probs for r in responses],
    }
    if reference is not None:
        streams |= {"reference": reference, "kl_weight": [w * np.float32(kl_coefficient) for w in weights]}
    batches = []
    for rows in plan.mine(runtime):
        writer = RowWriter(plan, rows, responses)
        spread = {name: writer.spread(values) for name, values in streams.items()}
        given: dict[str, Any] = {"choices": _choices(writer, masks, allowed, temperature), **spread}
        batches.append(replace(writer.base(), **given))
    return batches


def log_probs_of(
    model: torch.nn.Module,
    responses: Sequence[Response],
    plan: Plan,
    runtime: Runtime,
    temperature: float,
    allowed: int = ALL,
) -> list[Floats]:
    """log p of each sampled token under `model` at `temperature`, [tokens] of each response, 0 for prompts. Collective.

    The same on every process.
    """
    batches = []
    masks = [r.sampled for r in responses]
    for rows in plan.mine(runtime):
        writer = RowWriter(plan, rows, responses)
        batches.append(replace(writer.base(), choices=_choices(writer, masks, allowed, temperature)))
    found: dict[int, Floats] = {}
    for rows, out in zip(plan.mine(runtime), forward(model, batches, runtime), strict=True):
        found |= RowWriter(plan, rows, responses).collect(out[1])
    for part in runtime.gather_data(found):
        found |= part
    return [found[i] for i in range(len(responses))]


def _choices(writer: RowWriter, masks: Sequence[npt.NDArray[np.bool_]], allowed: int, temperature: float) -> Events:
    """Each sampled token among those that could have been sampled."""
    denominator = None
    if allowed != ALL:
        denominator = writer.spread([np.where(mask, allowed, ALL).astype(np.int64) for mask in masks], ALL)
    return Events(mask=writer.spread(masks), denominator=denominator, temperature=temperature)
