"""Controls: infused documents with as many latents as q sampled, but other contents or other places.

If RA3 gains by what its thoughts say where it says it, each of these must lose it:

    shuffled   every thought stands in the place of another one (of the same batch and indentation)
    filler     every thought is replaced by one of the same length that says nothing
    moved      each document thinks as often, at random lines; q writes the thoughts there

Invariants: the expert's tokens are unchanged; each document has as many thoughts as q sampled (fewer where the context
has no room); the outcome depends on the transcripts and their keys alone.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from ra3_megatron.corpus.indexed import to_document
from ra3_megatron.em.policy import LatentPolicy
from ra3_megatron.rollout.randomness import generator
from ra3_megatron.text.latents import Document, LatentFormat, compose
from ra3_megatron.text.transcript import Transcript

Control = Literal["shuffled", "filler", "moved"]
Thoughts = list[dict[int, tuple[int, ...]]]
"""Of each document: line -> ids of its thought."""

FILLER = "."


def control_latents(
    how: Control,
    transcripts: Sequence[Transcript],
    originals: Sequence[Transcript],
    keys: Sequence[Sequence[int]],
    policy: LatentPolicy,
    max_tokens: int,
    filler: str = FILLER,
) -> list[Transcript]:
    """The transcripts with other latents. Collective.

    transcripts: one of each of `originals`, which were sampled under `keys`; max_tokens: the longest that may result;
    filler: text of the token that says nothing.
    """
    if how == "moved":
        rngs = [generator((*key, 1)) for key in keys]
        decisions = [_elsewhere(t, rng) for t, rng in zip(transcripts, rngs, strict=True)]
        return policy.sample(originals, keys, group=1, decisions=decisions)
    latents, tokenizer = policy.latents, policy.tokenizer
    documents = [to_document(t, latents, tokenizer) for t in transcripts]
    if how == "filler":
        (nothing, *_) = tokenizer.encode(filler)
        thoughts = [_silenced(d, t, nothing, latents) for d, t in zip(documents, transcripts, strict=True)]
    else:
        thoughts = _shuffled(documents, transcripts, generator((*keys[0], 1)) if keys else None)
    return [
        _composed(document, mine, transcript, policy, max_tokens)
        for document, mine, transcript in zip(documents, thoughts, transcripts, strict=True)
    ]


def _elsewhere(transcript: Transcript, rng: np.random.Generator) -> np.ndarray:
    """As many decisions to think, at random lines at which there was a choice, bool [lines]."""
    offered = np.flatnonzero(transcript.offered)
    count = int((transcript.think & transcript.offered).sum())
    decisions = np.zeros(transcript.num_lines, dtype=bool)
    decisions[rng.choice(offered, count, replace=False)] = True
    return decisions


def _by_q(document: Document, sampled: Transcript) -> list[int]:
    """Lines whose thought q wrote: a human's was not offered."""
    return [line for line in sorted(document.observed) if sampled.offered[line]]


def _silenced(
    document: Document, sampled: Transcript, nothing: int, latents: LatentFormat
) -> dict[int, tuple[int, ...]]:
    """The thoughts with every token `nothing`, but for the first one and the end; human ones stay."""
    thoughts = dict(document.observed)
    for line in _by_q(document, sampled):
        ids = thoughts[line]
        end = ids[-1:] if len(ids) > 1 and latents.ends_thought(ids[-1]) else ()
        thoughts[line] = (*ids[:1], *[nothing] * (len(ids) - 1 - len(end)), *end)
    return thoughts


def _shuffled(
    documents: Sequence[Document], transcripts: Sequence[Transcript], rng: np.random.Generator | None
) -> Thoughts:
    """The thoughts of all documents, each in the place of another one with which it can change places; human ones
    stay."""
    places: Mapping[int, list[tuple[int, int]]] = defaultdict(list)
    for number, (document, sampled) in enumerate(zip(documents, transcripts, strict=True)):
        for line in _by_q(document, sampled):
            places[document.lines[line].think_set].append((number, line))
    thoughts: Thoughts = [dict(document.observed) for document in documents]
    for group in places.values():
        assert rng is not None
        order = rng.permutation(len(group))
        for place, source in zip(order, np.roll(order, 1), strict=True):  # one cycle: no thought keeps its place
            number, line = group[place]
            other, row = group[source]
            thoughts[number][line] = documents[other].observed[row]
    return thoughts


def _composed(
    document: Document,
    thoughts: Mapping[int, tuple[int, ...]],
    sampled: Transcript,
    policy: LatentPolicy,
    max_tokens: int,
) -> Transcript:
    """The document with these thoughts, `sampled` otherwise; the last ones are left out where it gets too long, but
    none that a human wrote."""
    kept = dict(thoughts)
    spare = _by_q(document, sampled)
    transcript = compose(document, kept, policy.latents, policy.tokenizer)
    while transcript.num_tokens > max_tokens:
        del kept[spare.pop()]
        transcript = compose(document, kept, policy.latents, policy.tokenizer)
    return Transcript(
        ids=transcript.ids,
        roles=transcript.roles,
        lines=transcript.lines,
        offered=sampled.offered,
        weight_version=sampled.weight_version,
        document=sampled.document,
    )
