"""From the texts of a split to an indexed data set of transcripts, in shards that bound the memory used."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ra3_megatron.config.data import HumanComments
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.corpus.indexed import TranscriptWriter
from ra3_megatron.corpus.manifest import StoreCounts
from ra3_megatron.corpus.prepare import Text
from ra3_megatron.text.latents import Document, LatentFormat, compose, cut, encode_document, raw
from ra3_megatron.text.tokenizer import Tokenizer
from ra3_megatron.text.transcript import Transcript


def write_store(
    prefix: Path,
    texts: Iterable[Text],
    config: RunConfig,
    human_comments: HumanComments,
    tokenizer: Tokenizer,
    format: LatentFormat,
    on_shard: Callable[[int, int], None] = lambda documents, tokens: None,
) -> StoreCounts:
    """Tokenize `texts` and write them below `prefix`; `on_shard` hears the documents and tokens of each shard.

    UserError when no text fits the context, or the tokenizer cannot encode one.
    """
    counts = StoreCounts()
    context = config.model.context_length
    with TranscriptWriter(prefix) as writer:
        for shard in _shards(texts, config.corpus.shard_documents):
            before = counts.tokens
            for text in shard:
                try:
                    document = encode_document(
                        text.code, text.name, tokenizer, format, config.text, human_comments, text.prompt
                    )
                except ValueError as error:
                    raise UserError(f"the tokenizer cannot encode {text.name}: {error}") from error
                transcript = _fit(document, config, format, tokenizer, counts)
                if transcript is not None:
                    writer.add(transcript)
                    _count(transcript, counts)
            on_shard(len(shard), counts.tokens - before)
        if not counts.documents:
            raise UserError(
                f"no document fits model.context_length={context} ({counts.too_long_dropped} dropped): "
                "raise it, lower corpus.max_lines, or set corpus.too_long=cut"
            )
    return counts


def _fit(
    document: Document, config: RunConfig, format: LatentFormat, tokenizer: Tokenizer, counts: StoreCounts
) -> Transcript | None:
    """The transcript with its observed thoughts, at most `model.context_length` tokens long; None: dropped."""
    context = config.model.context_length
    transcript = compose(document, document.observed, format, tokenizer)
    if transcript.num_tokens <= context:
        return transcript
    fitting = int((_line_starts(transcript)[1:] <= context).sum())
    if config.corpus.too_long == "drop" or not fitting:
        counts.too_long_dropped += 1
        return None
    counts.too_long_cut += 1
    room = int(_line_starts(raw(document, format, tokenizer))[fitting])
    shorter = cut(document, room, format)
    assert shorter is not None and len(shorter.lines) == fitting
    return compose(shorter, shorter.observed, format, tokenizer)


def _line_starts(transcript: Transcript) -> npt.NDArray[np.int64]:
    """Index of the first token of each line, and the number of tokens, [lines + 1]."""
    return np.searchsorted(transcript.lines, np.arange(transcript.num_lines + 1))


def _count(transcript: Transcript, counts: StoreCounts) -> None:
    counts.documents += 1
    counts.tokens += transcript.num_tokens
    counts.code_tokens += int(transcript.is_code.sum())
    counts.lines += transcript.num_lines
    counts.observed_thoughts += int(transcript.think.sum())


def _shards(texts: Iterable[Text], size: int) -> Iterator[list[Text]]:
    iterator = iter(texts)
    while shard := list(islice(iterator, size)):
        yield shard
