"""What a model has in its context when it reads a token of a transcript.

With `text.keep_latents` (the default) a transcript is one sequence, in which every latent stays. Without it the only
latent in the context is the one in force: the state s_t is the expert's lines alone. Such a transcript is read as
several sequences, one for each latent in force. With thoughts at lines u and w (raw: without latents):

    sequence 0    lines 0 … u - 1, the thought of u
    sequence 1    raw lines 0 … u - 1, the thought of u | lines u … w - 1, the thought of w
    sequence 2    raw lines 0 … w - 1, the thought of w | lines w …

What stands before "|" has been read already, as a part of another sequence: here it is context (role CONTEXT), neither
scored nor trained on. The rest of all sequences is the transcript, every token exactly once. A new thought is still
chosen with the old one in the context: q(z_t | s_t, z_{t-1}).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ra3_megatron.corpus.indexed import to_document
from ra3_megatron.text.latents import LatentFormat, raw
from ra3_megatron.text.tokenizer import Tokenizer
from ra3_megatron.text.transcript import Role, Transcript

Value = TypeVar("Value", bound=np.generic)


@dataclass(frozen=True)
class _Part:
    """Tokens `begin … end` of a transcript, behind `before` tokens of context."""

    transcript: int
    before: int
    begin: int
    end: int


class Contexts:
    """Transcripts, and the sequences as which a model reads them."""

    def __init__(
        self, transcripts: Sequence[Transcript], sequences: list[Transcript], parts: list[_Part] | None = None
    ) -> None:
        """parts: where the tokens of each sequence stand; None: every sequence is the transcript."""
        self._lengths = [t.num_tokens for t in transcripts]
        self.sequences = sequences
        """Each with the role CONTEXT where another sequence scores the token."""
        self._parts = parts or []
        self.whole = parts is None

    def split(self, values: Sequence[npt.NDArray[Value]], fill: float = 0) -> list[npt.NDArray[Value]]:
        """Values of the tokens of each sequence, from those of each transcript; `fill` for context."""
        if self.whole:
            return list(values)
        out = []
        for sequence, part in zip(self.sequences, self._parts, strict=True):
            mine = np.full(sequence.num_tokens, fill, dtype=values[part.transcript].dtype)
            mine[part.before :] = values[part.transcript][part.begin : part.end]
            out.append(mine)
        return out

    def join(self, values: Sequence[npt.NDArray[Value]]) -> list[npt.NDArray[Value]]:
        """The inverse of `split`."""
        if self.whole:
            return list(values)
        dtype = values[0].dtype if len(values) else np.dtype(np.float32)
        out: list[npt.NDArray[Any]] = [np.zeros(length, dtype=dtype) for length in self._lengths]
        for mine, part in zip(values, self._parts, strict=True):
            out[part.transcript][part.begin : part.end] = mine[part.before :]
        return out


def whole(transcripts: Sequence[Transcript]) -> Contexts:
    """Every transcript as one sequence."""
    return Contexts(transcripts, list(transcripts))


def contexts_of(
    transcripts: Sequence[Transcript], keep_latents: bool, latents: LatentFormat, tokenizer: Tokenizer
) -> Contexts:
    """The transcripts as a model reads them. keep_latents: see the top of this module."""
    if keep_latents:
        return whole(transcripts)
    sequences: list[Transcript] = []
    parts: list[_Part] = []
    for number, transcript in enumerate(transcripts):
        for sequence, before, begin in _sequences(transcript, latents, tokenizer):
            sequences.append(sequence)
            parts.append(_Part(number, before, begin, begin + sequence.num_tokens - before))
    return Contexts(transcripts, sequences, parts)


class InForceOnly(Sequence[Transcript]):
    """Documents of a store as the sequences in which the latent in force is the only one; `lengths` in tokens.

    Making one reads the whole store.
    """

    def __init__(self, documents: Any, latents: LatentFormat, tokenizer: Tokenizer) -> None:
        self._documents, self._latents, self._tokenizer = documents, latents, tokenizer
        self._places: list[tuple[int, int]] = []
        lengths: list[int] = []
        for index in range(len(documents)):
            for number, (sequence, _, _) in enumerate(_sequences(documents[index], latents, tokenizer)):
                self._places.append((index, number))
                lengths.append(sequence.num_tokens)
        self.lengths: npt.NDArray[np.int32] = np.array(lengths, dtype=np.int32)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Transcript:  # type: ignore[override]
        document, number = self._places[index]
        return _sequences(self._documents[document], self._latents, self._tokenizer)[number][0]


def _sequences(
    transcript: Transcript, latents: LatentFormat, tokenizer: Tokenizer
) -> list[tuple[Transcript, int, int]]:
    """(sequence, its tokens of context, where its other tokens begin in the transcript) for each latent in force."""
    thinking = np.flatnonzero(transcript.think)
    if not len(thinking):
        return [(transcript, 0, 0)]
    plain = raw(to_document(transcript, latents, tokenizer), latents, tokenizer)
    starts, ends = transcript.decision_positions[thinking], [_end_of_latent(transcript, int(t)) for t in thinking]
    begins, stops = [0, *ends], [*ends, transcript.num_tokens]
    found = []
    for number, (begin, stop) in enumerate(zip(begins, stops, strict=True)):
        context = transcript.ids[:0]
        if number:
            lines_before = plain.ids[: plain.decision_positions[thinking[number - 1]]]
            context = np.concatenate([lines_before, transcript.ids[starts[number - 1] : begin]])
        before = len(context)
        sequence = replace(
            transcript,
            ids=np.concatenate([context, transcript.ids[begin:stop]]),
            roles=np.concatenate([np.full(before, Role.CONTEXT, np.uint8), transcript.roles[begin:stop]]),
            lines=np.concatenate([np.full(before, -1, np.int32), transcript.lines[begin:stop]]),
            log_probs=None,
        )
        found.append((sequence, before, begin))
    return found


def _end_of_latent(transcript: Transcript, line: int) -> int:
    """Index behind the last token that the latent of `line` wrote, the repeated indentation included."""
    written = np.isin(transcript.roles, (Role.DECISION, Role.THOUGHT, Role.FORCED))
    return int(np.flatnonzero(written & (transcript.lines == line))[-1]) + 1
