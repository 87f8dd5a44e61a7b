"""The output layer with its logits kept where they are: they become their own gradient there.

Logits are in the type of the weights. `keep`: those of all positions are held for the backward pass; else they are
computed again there, a few positions at a time. Shapes: n positions, V_local = this rank's share of the vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class HeldLogits:
    """Of one pass, forward and backward, once each."""

    def __init__(self, hidden: Tensor, weight: Tensor, keep: bool, positions: int) -> None:
        """hidden: [n, hidden]; weight: [V_local, hidden]; positions: how many are worked on at once."""
        n = hidden.shape[0]
        self._parts = [slice(start, min(n, start + positions)) for start in range(0, n, positions)]
        self._rows, self._keep = n if keep else min(n, positions), keep
        self._memory: Tensor | None = hidden.new_empty(self._rows, weight.shape[0])
        self._spent = False

    def forward(self, hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Positions, and their logits until the next ones come."""
        assert self._memory is not None
        for part in self._parts:
            yield part, self._product(self._memory, part, hidden, weight)
        if not self._keep:
            self._memory = None

    def backward(
        self, hidden: Tensor, weight: Tensor, differentiate: Callable[[slice, Tensor], object]
    ) -> tuple[Tensor, Tensor]:
        """Gradients of `hidden` and `weight`. differentiate: replaces the logits of these positions by their gradient.

        Raises RuntimeError the second time.
        """
        if self._spent:
            raise RuntimeError("can be differentiated once: the logits became the gradient")
        self._spent = True
        memory, self._memory = self._memory, None
        if memory is None:
            memory = hidden.new_empty(self._rows, weight.shape[0])
        of_hidden, of_weight = torch.empty_like(hidden), None
        for part in self._parts:
            logits = memory[part] if self._keep else self._product(memory, part, hidden, weight)
            differentiate(part, logits)
            torch.mm(logits, weight, out=of_hidden[part])
            if self._keep:
                continue
            if of_weight is None:
                of_weight = logits.t() @ hidden[part]
            else:
                of_weight.addmm_(logits.t(), hidden[part])
        return of_hidden, memory.t() @ hidden if of_weight is None else of_weight

    def _product(self, memory: Tensor, part: slice, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = memory[part] if self._keep else memory[: part.stop - part.start]
        return torch.mm(hidden[part], weight.t(), out=logits)
