"""The check for NaN and infinite numbers that everything which passes weights on makes.

On a GPU a verdict costs a wait for the device, in which nothing else is told to it: whoever has many tensors to check
asks for the verdict once (`first_not_finite`, `FiniteStream`).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinite numbers: one pass at the speed of memory, without a copy."""
    if tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())  # NaN is both the least and the greatest


def first_not_finite(names: Sequence[str], tensors: Sequence[Tensor]) -> str | None:
    """Name of the first tensor that holds such numbers. Tensors of one device, none empty; one wait for all."""
    if not tensors:
        return None
    largest = torch.stack(torch._foreach_norm(list(tensors), math.inf)).tolist()  # of a tensor with NaN: NaN
    return next((name for name, value in zip(names, largest, strict=True) if not math.isfinite(value)), None)


class FiniteStream:
    """Checks tensors that come one after another. On a GPU it says later which one is not finite, and keeps none."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._extremes: list[Tensor] = []

    def add(self, name: str, tensor: Tensor) -> str | None:
        """The name of a tensor that is not finite, if that is known without a wait for the device."""
        if not tensor.is_cuda:
            return None if is_finite(tensor) else name
        if tensor.numel():
            self._names.append(name)
            self._extremes.append(torch.stack(torch.aminmax(tensor)))
        return None

    def finish(self) -> str | None:
        """The name of a tensor that is not finite, among those of which `add` could not say it."""
        if not self._names:
            return None
        finite = torch.isfinite(torch.stack(self._extremes)).all(dim=1).tolist()
        return next((name for name, good in zip(self._names, finite, strict=True) if not good), None)
