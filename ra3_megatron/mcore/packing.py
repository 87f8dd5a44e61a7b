"""Where the documents of packed rows stand, worked out once a batch and not once a layer."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class Bucket:
    """Documents of like length, padded to the longest of them."""

    index: Tensor
    """Places in the flattened rows, long [documents, longest]; 0 behind the end of a document."""
    inside: Tensor
    """bool [documents, longest], False behind the end of a document."""

    @cached_property
    def places(self) -> Tensor:
        """Places of the documents' tokens in the flattened rows, long [tokens]."""
        return self.index[self.inside]

    @cached_property
    def sources(self) -> Tensor:
        """Places of the same tokens in the flattened bucket, long [tokens]."""
        return torch.nonzero(self.inside.flatten()).flatten()


@dataclass(frozen=True)
class Packing:
    """Documents of packed rows, flattened row after row."""

    begin: Tensor
    """Place of each document's first token, long [documents]."""
    length: Tensor
    """Tokens of each document, long [documents]."""
    longest: int
    """Tokens of the longest document; 0 when there is none."""
    bounds: Tensor
    """Where each document begins among the tokens of all documents, and their number, int [documents + 1]."""
    real: Tensor | None
    """Places of the documents' tokens, long; None: there is no padding between and behind them."""

    def to(self, device: torch.device) -> "Packing":
        """The same on `device`."""
        return Packing(
            self.begin.to(device),
            self.length.to(device),
            self.longest,
            self.bounds.to(device),
            None if self.real is None else self.real.to(device),
        )

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The documents, grouped so that none is padded to more than twice its length (or to 16)."""
        size = torch.ceil(torch.log2(self.length.clamp_min(16).float())).long()
        buckets = []
        for group in size.unique().tolist():
            members = size == group
            place = torch.arange(int(self.length[members].max()), device=size.device)
            inside = place[None] < self.length[members][:, None]
            index = torch.where(inside, self.begin[members][:, None] + place[None], 0)
            buckets.append(Bucket(index, inside))
        return buckets


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packing_of(segments: Tensor) -> Packing:
    """The documents of packed rows. segments: long [b, s], runs of one number are documents, negative ones padding.

    The answer is kept as long as the tensor, whose values must not change. It is also that of other tensors in the same
    memory: layers that are computed again are given such.
    """
    found: Packing | None = _known.get(segments)
    if found is None:
        found = next((packing for known, packing in _known.items() if _is_same(known, segments)), None)
        found = _known[segments] = read_packing(segments) if found is None else found
    return found


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory, seen alike."""
    seen = ((x.device, x.dtype, x.shape, x.stride(), x.data_ptr()) for x in (one, other))
    return next(seen) == next(seen)


def remember(segments: Tensor, packing: Packing) -> None:
    """Let `packing_of` answer this: what was read on the host need not be read on a GPU, which would have to be waited
    for."""
    _known[segments] = packing


def read_packing(segments: Tensor) -> Packing:
    """The documents of packed rows, long [b, s], worked out where the tensor is."""
    flat = segments.flatten()
    starts = torch.ones_like(flat, dtype=torch.bool)
    starts[1:] = flat[1:] != flat[:-1]
    starts[:: segments.shape[1]] = True
    begin = torch.nonzero(starts).flatten()
    length = torch.diff(begin, append=torch.tensor([len(flat)], device=flat.device))
    inside = flat[begin] >= 0
    begin, length = begin[inside], length[inside]
    count = int(length.sum())
    bounds = torch.cat((length.new_zeros(1), length.cumsum(0)))
    real = None
    if count < len(flat):
        shift = (begin - bounds[:-1]).repeat_interleave(length, output_size=count)
        real = torch.arange(count, device=flat.device) + shift
    return Packing(begin, length, int(length.max()) if len(length) else 0, bounds.int(), real)
