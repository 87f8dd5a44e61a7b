"""The order in which documents are taken: one permutation an epoch, and a position that can be saved.

Invariants: each epoch takes every document exactly once; the order depends on the seed and on the number of documents
alone (not on the layout of processes, nor on how many are taken at a time); a restored state goes on exactly.
"""

from typing import TypedDict

import numpy as np
import numpy.typing as npt


class SamplerState(TypedDict):
    """Where a sampler stands."""

    epoch: int
    """Finished passes over the documents."""
    position: int
    """Documents taken in the current pass."""


class DocumentSampler:
    """Infinite order of document indices, epoch after epoch."""

    def __init__(self, num_documents: int, seed: int) -> None:
        if num_documents < 1:
            raise ValueError(f"num_documents={num_documents}: there must be at least one document")
        self.num_documents = num_documents
        self.seed = seed
        self._epoch = 0
        self._position = 0
        self._order = self._permutation(0)

    def next(self, count: int) -> list[int]:
        """The next `count` document indices; a new epoch begins where one ends."""
        taken: list[int] = []
        while len(taken) < count:
            if self._position == self.num_documents:
                self._epoch += 1
                self._position = 0
                self._order = self._permutation(self._epoch)
            part = self._order[self._position : self._position + count - len(taken)]
            self._position += len(part)
            taken.extend(part.tolist())
        return taken

    def state_dict(self) -> SamplerState:
        """What `load_state_dict` of a sampler with the same arguments needs to go on from here."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: SamplerState) -> None:
        """Go on from `state`. ValueError when it cannot be of these documents."""
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or not 0 <= position <= self.num_documents:
            raise ValueError(f"sampler state {state} does not fit {self.num_documents} documents")
        self._epoch, self._position = epoch, position
        self._order = self._permutation(epoch)

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
        return generator.permutation(self.num_documents)


class SequentialSampler(DocumentSampler):
    """Documents in the order in which they are stored, epoch after epoch."""

    def __init__(self, num_documents: int) -> None:
        super().__init__(num_documents, seed=0)

    def _permutation(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.arange(self.num_documents)
