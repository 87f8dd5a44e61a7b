"""What a forward pass takes: packed token rows, and the events whose log-probability is wanted.

Shapes: b rows, s tokens a row. Position j of a row *predicts* `targets[:, j]`, the next token of the same segment.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from ra3_megatron.mcore.packing import Packing, read_packing
from ra3_megatron.mcore.sequence_split import places


class Kind(IntEnum):
    """What a target is to the metrics of the cross-entropy stream."""

    CODE = 0
    """A token of the expert's document."""
    THOUGHT = 1
    """A token of a thought."""
    DECISION = 2
    """A marker that holds a decision and nothing else."""
    FORCED = 3
    """Written by the format without a choice: no metric is of it."""


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
    places: Tensor | None = None
    """Flat places of `mask`, long (see `TokenBatch.placed`)."""

    def where(self) -> Tensor:
        """Flat places of `mask`, long."""
        return torch.nonzero(self.mask.flatten()).flatten() if self.places is None else self.places


@dataclass(frozen=True)
class TokenBatch:
    """Packed sequences and the streams of per-token weights that a train step turns into one loss.

    The cross-entropy stream is  sum ce_weight * -log p(target);
    the policy-gradient stream is  sum -objective(ratio, advantage) - entropy_weight * H + kl_weight * k3  over
    `choices`.
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
    proximal: Tensor | None = None
    """Log-probability of each choice under the policy before the first update on it, fp32 [b, s] (None: this is the
    first)."""
    reference: Tensor | None = None
    """Log-probability of each choice under the model that the policy is kept close to, fp32 [b, s]."""
    kl_weight: Tensor | None = None
    """Weight of each choice's divergence from `reference`, fp32 [b, s]."""
    decision: Tensor | None = None
    """Choices that are decisions (one a line; in RLVR, what the loss is a mean over), bool [b, s]; their global number
    normalises the stream."""
    copies: Tensor | None = None
    """How many equal choices each one stands for, fp32 [b, s] (advantages and entropy weights are their sums); None: 1
    each."""
    kind: Tensor | None = None
    """`Kind` of each target, uint8 [b, s] (metrics are split by it); None: all are CODE."""
    whole_segments: Tensor | None = None
    """Segments of the whole rows, long [b, S], when this is one context-parallel rank's share of them."""
    weighted: Tensor | None = None
    """Flat places where `ce_weight` is not 0, long (see `placed`)."""
    plain: bool | None = None
    """Whether each row is one document (see `placed`)."""
    documents: Packing | None = None
    """Where the documents of rows stand that are not plain (see `placed`)."""

    def to(self, device: torch.device) -> "TokenBatch":
        """The same batch on `device`."""
        moved = self._map(lambda tensor: tensor.to(device))
        return moved if self.documents is None else replace(moved, documents=self.documents.to(device))

    def share(self, rank: int, size: int) -> "TokenBatch":
        """What context-parallel rank `rank` of `size` holds of this batch: [b, s] becomes [b, s / size]."""
        if size == 1:
            return self
        if self.plain is not None:
            raise ValueError("a batch is shared out before it is `placed`")
        mine = places(self.ids.shape[1], rank, size).to(self.ids.device)
        return replace(self._map(lambda tensor: tensor.index_select(1, mine)), whole_segments=self.segments)

    def placed(self) -> "TokenBatch":
        """The same batch, which says where its tokens stand: found out on the host, before it is moved to a GPU, which
        would have to finish all earlier work to answer."""
        if self.plain is not None:
            return self
        packing = self.packing
        return replace(
            self,
            weighted=None if self.ce_weight is None else self.where_weighted(),
            choices=None if self.choices is None else replace(self.choices, places=self.choices.where()),
            plain=packing is None,
            documents=None if packing is None else read_packing(packing),
        )

    def where_weighted(self) -> Tensor:
        """Flat places where `ce_weight` is not 0, long."""
        assert self.ce_weight is not None
        return torch.nonzero(self.ce_weight.flatten()).flatten() if self.weighted is None else self.weighted

    @property
    def packing(self) -> Tensor | None:
        """Segments of whole rows, for attention. None: plain causal attention of whole rows will do."""
        if self.whole_segments is not None:
            return self.whole_segments
        plain = self.plain
        if plain is None:
            plain = bool((self.segments == self.segments[:, :1]).all())
        return None if plain else self.segments

    def _map(self, function: Callable[[Tensor], Tensor]) -> "TokenBatch":
        """The batch with `function` applied to each tensor."""
        mapped: dict[str, Any] = {}
        for name, value in _fields(self).items():
            if isinstance(value, Events):
                inner: dict[str, Any] = {k: function(v) for k, v in _fields(value).items() if isinstance(v, Tensor)}
                value = replace(value, **inner)
            mapped[name] = function(value) if isinstance(value, Tensor) else value
        return TokenBatch(**mapped)


def _fields(item: Any) -> dict[str, Any]:
    return {field.name: getattr(item, field.name) for field in fields(item)}
