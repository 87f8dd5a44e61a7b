"""How the tensors of a Hugging Face checkpoint and those of the Megatron model make each other up.

A `Slot` is one whole tensor of the Megatron model, independent of any layout: the name and place that checkpoints give
it (there, layers and experts are stacked in leading axes). A `Link` names the Hugging Face tensors that make up a slot
and says how: they are joined on import, and split on export and refit. Joins copy numbers and compute nothing, so a
round trip is exact.

Nothing here loads torch: shapes are known from the architecture alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


@dataclass(frozen=True)
class Slot:
    """One whole tensor of the Megatron model."""

    key: str
    """Name in checkpoints, `decoder.layers.self_attention.linear_qkv.weight` say (those of Transformer Engine)."""
    place: Shape
    """Indices in the stacked leading axes: (), (layer,) or (layer, expert)."""
    shape: Shape
    """Shape of the tensor itself, without the padding of the vocabulary."""

    @property
    def padded(self) -> bool:
        """Whether rows are added to it behind the last, so that they divide evenly: the vocabulary's tensors."""
        return self.key in (EMBEDDING, OUTPUT)


@dataclass(frozen=True)
class Link:
    """Hugging Face tensors that make up a slot."""

    slot: Slot
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    join: "Callable[[Sequence[Tensor]], Tensor]"
    """The slot's tensor, of tensors in the order of `names`."""
    split: "Callable[[Tensor], list[Tensor]]"
    """The inverse. What it returns may share memory with what it was given."""


def manifest(links: Sequence[Link]) -> dict[str, Shape]:
    """Names and shapes of all Hugging Face tensors of these links, in order."""
    return {name: shape for link in links for name, shape in zip(link.names, link.shapes, strict=True)}


def same(slot: Slot, name: str) -> Link:
    """One tensor that both have alike."""
    return Link(slot, (name,), (slot.shape,), lambda tensors: tensors[0], lambda whole: [whole])


def concatenated(slot: Slot, names: Sequence[str]) -> Link:
    """Equal parts, one behind the other in the first dimension: gate and up projection of a gated layer."""
    part = (slot.shape[0] // len(names), *slot.shape[1:])

    def join(tensors: "Sequence[Tensor]") -> "Tensor":
        import torch

        return torch.cat(list(tensors))

    return Link(slot, tuple(names), (part,) * len(names), join, lambda whole: list(whole.chunk(len(names))))


def query_key_value(slot: Slot, names: Sequence[str], heads: int, groups: int) -> Link:
    """Query, key and value projections (or their biases): Megatron has them key/value head by key/value head.

    The slot's rows are, for each of the `groups` key/value heads: its heads / groups query heads, its key, its value.
    """
    rows, rest = slot.shape[0], slot.shape[1:]
    channels = rows // (heads + 2 * groups)
    counts = (heads // groups * channels, channels, channels)

    def join(tensors: "Sequence[Tensor]") -> "Tensor":
        import torch

        parts = [t.reshape(groups, count, *rest) for t, count in zip(tensors, counts, strict=True)]
        return torch.cat(parts, dim=1).reshape(slot.shape)

    def split(whole: "Tensor") -> "list[Tensor]":
        parts = whole.reshape(groups, sum(counts), *rest).split(counts, dim=1)
        return [part.reshape(groups * part.shape[1], *rest) for part in parts]

    return Link(slot, tuple(names), tuple((groups * count, *rest) for count in counts), join, split)


def by_name(links: Sequence[Link]) -> Iterator[tuple[str, Link, int]]:
    """Every Hugging Face tensor: its name, its link and its place in it."""
    for link in links:
        for place, name in enumerate(link.names):
            yield name, link, place
