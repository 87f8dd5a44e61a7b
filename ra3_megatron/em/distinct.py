"""Equal transcripts are scored and trained on once: the G transcripts of a document are often the same.

The gradient is that of all of them, because a transcript's term is linear in its advantage and equal transcripts have
the same log-probabilities: the copies' advantages are added up, and counts say how many copies a transcript stands
for. The more certain q becomes, the less an update costs.

With a clip range the term is linear only among advantages of one sign: which side is clipped depends on it. Copies in
one group have one sign (their returns are the same); those of a document that a batch holds twice may not, and are
kept apart there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ra3_megatron.text.transcript import Transcript

Lines = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Distinct:
    """The different ones among transcripts, in the order in which they first occur."""

    transcripts: list[Transcript]
    which: list[int]
    """For each of all transcripts, the place in `transcripts` of the one that is equal to it."""

    @property
    def copies(self) -> list[int]:
        """How many of all transcripts each one stands for."""
        return np.bincount(self.which, minlength=len(self.transcripts)).tolist()

    def summed(self, values: Sequence[Lines]) -> list[Lines]:
        """Values of all transcripts, [lines] each, added up over equal ones."""
        total = [np.zeros(t.num_lines, dtype=np.float32) for t in self.transcripts]
        for place, value in zip(self.which, values, strict=True):
            total[place] += value
        return total


def distinct(transcripts: Sequence[Transcript], group_size: int | None = None) -> Distinct:
    """Equal: the same tokens in the same roles, and the same choices. group_size: transcripts of different groups of so
    many are different; None: wherever they stand."""
    places: dict[tuple[int, bytes, bytes, bytes], int] = {}
    found: list[Transcript] = []
    which = []
    for number, transcript in enumerate(transcripts):
        group = number // group_size if group_size else 0
        key = (group, transcript.ids.tobytes(), transcript.roles.tobytes(), transcript.offered.tobytes())
        if key not in places:
            places[key] = len(found)
            found.append(transcript)
        which.append(places[key])
    return Distinct(found, which)
