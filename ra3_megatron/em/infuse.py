"""Infusion: sample a latent path for every document that the M-step will read, and store the infused documents.

Documents are infused in chunks; a chunk is whole or absent, so a killed infusion goes on behind its last chunk. The
latents of a document depend on the seed, the iteration and its place in the order alone. The main process alone looks
for files that may not be there yet: other nodes may believe for a while that one is still absent.
"""

import json
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ra3_megatron.config.errors import UserError
from ra3_megatron.corpus.indexed import TranscriptStore, TranscriptWriter
from ra3_megatron.em.latent_stats import BlankTokens, latent_stats
from ra3_megatron.em.policy import LatentPolicy
from ra3_megatron.mcore import watchdog
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.report.run_folder import read_json, write_json
from ra3_megatron.text.transcript import Transcript

CHUNK = 512
"""Documents a chunk at least."""
MAX_CHUNKS = 200
"""Chunks of one infusion at most: each is an open data set."""
RECORD = "infused.json"

Arrange = Callable[[Sequence[Transcript], Sequence[Transcript], Sequence[Sequence[int]]], list[Transcript]]
"""(transcripts, the documents, their keys) -> other transcripts of the same documents."""


class InfusedCorpus:
    """The infused documents of a folder, in order; `lengths` in tokens. UserError naming the file that is damaged."""

    def __init__(self, folder: Path) -> None:
        remedy = f"delete {folder} to infuse again"
        self.record: dict[str, Any] = read_json(folder / RECORD, remedy)
        try:
            prefixes = [folder / name for name in self.record["chunks"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / RECORD}: not the record of an infusion: {remedy}") from error
        self._stores = [TranscriptStore(prefix, remedy) for prefix in prefixes]
        self._ends = list(accumulate(len(store) for store in self._stores))
        self.lengths: npt.NDArray[np.int32] = np.concatenate([store.lengths for store in self._stores])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Transcript:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        chunk = bisect_right(self._ends, index)
        return self._stores[chunk][index - (self._ends[chunk - 1] if chunk else 0)]


def is_infused(folder: Path) -> bool:
    """Whether an infusion into `folder` is complete."""
    return (folder / RECORD).is_file()


def infuse(
    policy: LatentPolicy,
    documents: Any,
    key: Sequence[int],
    folder: Path,
    runtime: Runtime,
    blank: BlankTokens,
    advance: Callable[[int, int], None] = lambda documents, tokens: None,
    arrange: Arrange | None = None,
) -> InfusedCorpus:
    """Sample one transcript of each of `documents` into `folder`. Collective; skips what is there already.

    arrange: what controls make of a chunk's transcripts (`em/controls.py`); None: they stay as they were sampled.

    key: names the random streams (document number k uses `(*key, k)`). advance: told documents and tokens done.
    """
    if runtime.broadcast(runtime.is_main and is_infused(folder)):
        return InfusedCorpus(folder)
    size = max(CHUNK, -(-len(documents) // MAX_CHUNKS))
    starts = range(0, len(documents), size)
    names = [f"chunk_{number:05d}" for number in range(len(starts))]
    for start, name in zip(starts, names, strict=True):
        numbers = range(start, min(start + size, len(documents)))
        stats_file = folder / f"{name}.stats.json"  # written behind the chunk: it is whole
        if not runtime.broadcast(runtime.is_main and stats_file.is_file()):
            begin = time.perf_counter()
            originals = [documents[k] for k in numbers]
            keys = [(*key, k) for k in numbers]
            transcripts = policy.sample(originals, keys, group=1)
            if arrange is not None:
                transcripts = arrange(transcripts, originals, keys)
            if runtime.is_main:
                _write(folder / name, transcripts)
                stats = latent_stats(transcripts, blank)
                timing = {
                    "seconds": time.perf_counter() - begin,
                    "tokens": sum(t.num_tokens for t in transcripts),
                    "lines": stats.lines,
                    "thoughts": stats.thoughts,
                    "thought_tokens": stats.thought_tokens,
                }
                write_json(stats_file, timing)
            runtime.barrier()
        watchdog.beat(f"{numbers.stop} of {len(documents)} documents infused")
        advance(len(numbers), runtime.on_main(partial(_tokens, stats_file)))
    if runtime.is_main:
        parts = [read_json(folder / f"{name}.stats.json") for name in names]
        total = {field: sum(part[field] for part in parts) for field in parts[0]}
        version = policy.weight_version
        record = {"chunks": names, "documents": len(documents), "weight_version": version, **total}
        write_json(folder / RECORD, record)
    runtime.barrier()
    watchdog.rest()
    return InfusedCorpus(folder)


def _tokens(stats_file: Path) -> int:
    return int(read_json(stats_file)["tokens"])


def _write(prefix: Path, transcripts: Sequence[Transcript]) -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with TranscriptWriter(prefix) as writer:
        for transcript in transcripts:
            writer.add(transcript)


def export_jsonl(corpus: InfusedCorpus, path: Path, text_of: Callable[[Transcript], tuple[str, str]]) -> None:
    """Write the infused documents as text: {"name", "code", "infused"} a line. text_of: (code, infused text)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for index in range(len(corpus)):
            transcript = corpus[index]
            code, infused = text_of(transcript)
            row = {"name": transcript.document, "code": code, "infused": infused}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    partial.rename(path)
