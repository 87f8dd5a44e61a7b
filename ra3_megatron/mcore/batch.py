"""What a forward pass takes: packed token rows, and the events whose log-probability is wanted.

Shapes: b rows, s tokens a row. Position j of a row *predicts* `targets[:, j]`, the next token of the same segment.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Events:
    """Events over the next token (see vocab_parallel); only positions in `mask` are computed, the rest are 0."""

    mask: Tensor
    """bool [b, s]."""
    numerator: Tensor | None = None
    """Rows of the table of sets, long [b, s]; None: the target token everywhere."""
    denominator: Tensor | None = None
    """Rows of the table of sets, long [b, s]; None: every token everywhere."""
    merged: Tensor | None = None
    """Rows of the table of sets, long [b, s]; None: no merged outcome."""
    temperature: float = 1.0
    """Logits are divided by this."""


@dataclass(frozen=True)
class TokenBatch:
    """Packed sequences and the streams of per-token weights that a train step turns into one loss.

    The cross-entropy stream is  sum ce_weight * -log p(target);
    the policy-gradient stream is  sum -objective(ratio, advantage) - entropy_weight * H  over `choices`.
    """

    ids: Tensor
    """Token ids, long [b, s]."""
    positions: Tensor
    """Position of each token within its segment, long [b, s]."""
    segments: Tensor
    """Which document of the row a token belongs to, long [b, s]; padding has a segment of its own."""
    targets: Tensor
    """Next token of the segment, long [b, s]; 0 where there is none (weights are 0 there)."""
    ce_weight: Tensor | None = None
    """Weights of the cross-entropy stream, fp32 [b, s]."""
    choices: Events | None = None
    """Events of the policy-gradient stream (or of a scoring pass)."""
    advantage: Tensor | None = None
    """Advantage of each choice, fp32 [b, s]."""
    entropy_weight: Tensor | None = None
    """Weight of each choice's entropy bonus, fp32 [b, s]."""
    behaviour: Tensor | None = None
    """Log-probability of each choice when it was made, fp32 [b, s] (ratios; None: on-policy)."""
    decision: Tensor | None = None
    """Choices that are decisions (one a line), bool [b, s]; their global number normalises the stream."""
    is_thought: Tensor | None = None
    """Targets that are not the expert's document, bool [b, s] (metrics are split by it)."""

    def to(self, device: torch.device) -> "TokenBatch":
        """The same batch on `device`."""
        moved: dict[str, Any] = {}
        for name, value in _fields(self).items():
            if isinstance(value, Events):
                inner: dict[str, Any] = {k: v.to(device) for k, v in _fields(value).items() if isinstance(v, Tensor)}
                value = replace(value, **inner)
            moved[name] = value.to(device) if isinstance(value, Tensor) else value
        return TokenBatch(**moved)

    @property
    def packing(self) -> Tensor | None:
        """Segments, when rows hold anything but one document from their start; None: plain causal attention will do."""
        return None if bool((self.segments == self.segments[:, :1]).all()) else self.segments


def _fields(item: Any) -> dict[str, Any]:
    return {field.name: getattr(item, field.name) for field in fields(item)}
