"""From source texts to the documents of a corpus: cleaning, filters, de-duplication, limit, split.

Invariants: two functions of one file are never in different splits (rows, and parts of a text, are drawn each by
itself); no two documents have the same text, whichever split they are in, full-line comments left out unless both
training texts keep them; a document's split and its place in the limit depend on its own path and text alone; every
text that is left out is counted with the reason. Memory holds one digest a document (two where there is a limit),
never the texts.
"""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ra3_megatron.config.data import CorpusConfig
from ra3_megatron.config.errors import UserError
from ra3_megatron.corpus.sources import Source, iter_texts
from ra3_megatron.corpus.splits import SPLITS, Split, split_of
from ra3_megatron.text.segment import WHITESPACE, drop_leading_blank_lines, strip_comment_lines

_DIGEST_BYTES = 16


@dataclass(frozen=True)
class Text:
    """A cleaned document."""

    name: str
    """`Source.path`."""
    code: str
    """The text: no blank line at either end, one line break at the end."""
    prompt: str = ""
    """What stands before it and is given, unchanged."""


@dataclass
class SourceFile:
    """What one file (or data set) contributed."""

    file: str
    texts: int
    """Texts that it held, before any filter."""
    sha256: str
    """Over the digests of these texts, in order."""


@dataclass
class Counts:
    """What became of the texts of the source."""

    texts: int = 0
    """Texts that the source gave."""
    too_few_lines: int = 0
    """Left out: fewer than `corpus.min_lines` non-blank lines (see `count_lines`)."""
    too_many_lines: int = 0
    """Left out: more than `corpus.max_lines` non-blank lines."""
    duplicates: int = 0
    """Left out: the same text as an earlier one, full-line comments aside that are not trained on (see `compared`)."""
    over_limit: int = 0
    """Left out: beyond `corpus.max_documents`."""
    train: int = 0
    """Documents of the training split."""
    valid: int = 0
    """Documents of the held-out split."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Files and functions that the source itself left out, by reason."""

    @property
    def documents(self) -> int:
        """Documents of both splits."""
        return self.train + self.valid

    def summary(self) -> str:
        """All counts that are not zero, in one line."""
        counts: dict[str, Any] = {key: value for key, value in asdict(self).items() if isinstance(value, int)}
        return ", ".join(f"{key} {value}" for key, value in {**counts, **self.skipped}.items() if value) or "texts 0"


def clean(text: str) -> str:
    """`text` without blank lines at its ends and with one line break at its end; trailing spaces of lines are kept."""
    code = drop_leading_blank_lines(text)
    visible = len(code.rstrip(WHITESPACE))
    line_end = code.find("\n", visible)
    return (code if line_end < 0 else code[:line_end]) + "\n" if visible else ""


def compared(code: str, config: CorpusConfig) -> str:
    """What decides whether two documents are the same: `code` without full-line comments, unless both training texts
    keep them. Otherwise one of these could be read in training and, with another comment, be held out."""
    keep = config.human_comments == config.warm_start_comments == "keep"
    return code if keep or "#" not in code else strip_comment_lines(code)


def count_lines(code: str, config: CorpusConfig) -> int:
    """Non-blank lines of `code`, full-line comments left out unless both training texts keep them."""
    return sum(1 for line in compared(code, config).split("\n") if line.strip(WHITESPACE))


def prepare(
    config: CorpusConfig, folder: Path, on_text: Callable[[], None] = lambda: None
) -> tuple[Counts, list[SourceFile]]:
    """Write the documents of both splits to `folder`/{train,valid}.jsonl, in the order of the source.

    `on_text` is called for each text read. Returns the counts and one entry for each source file. UserError when a
    split ends up empty.
    """
    counts = Counts()
    files: list[SourceFile] = []
    spool = folder / "all.jsonl"
    limit = _spool(config, spool, counts, files, on_text)
    outputs = {split: (folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") for split in SPLITS}
    try:
        with spool.open(encoding="utf-8", newline="\n") as stream:
            for line in stream:
                row = json.loads(line)
                if limit is not None and row["digest"] > limit:
                    counts.over_limit += 1
                    continue
                split: Split = row["split"]
                setattr(counts, split, getattr(counts, split) + 1)
                kept = {key: row[key] for key in ("name", "code", "prompt") if row[key] or key != "prompt"}
                outputs[split].write(json.dumps(kept, ensure_ascii=False) + "\n")
    finally:
        for output in outputs.values():
            output.close()
    spool.unlink()
    _check_not_empty(config, counts)
    return counts, files


def read_texts(file: Path) -> Iterator[Text]:
    """Documents of one split, as `prepare` wrote them."""
    with file.open(encoding="utf-8", newline="\n") as stream:
        for line in stream:
            yield Text(**json.loads(line))


def _spool(
    config: CorpusConfig, spool: Path, counts: Counts, files: list[SourceFile], on_text: Callable[[], None]
) -> str | None:
    """Write all documents that pass the filters; return the largest digest within `max_documents` (None: no limit)."""
    skipped: Counter[str] = Counter()
    seen: set[bytes] = set()
    limited: list[bytes] = []  # by the whole text, so that a limit keeps the same documents whatever comments are for
    with spool.open("w", encoding="utf-8", newline="\n") as stream:
        for source in _with_file_entries(iter_texts(config, skipped), files):
            counts.texts += 1
            on_text()
            code = clean(source.text)
            lines = count_lines(code, config)
            same = _digest(source.prompt + compared(code, config))
            if lines < config.min_lines:
                counts.too_few_lines += 1
            elif lines > config.max_lines:
                counts.too_many_lines += 1
            elif same in seen:
                counts.duplicates += 1
            else:
                seen.add(same)
                digest = _digest(source.prompt + code)
                if config.max_documents is not None:
                    limited.append(digest)
                split = split_of(source.split_key, config.valid_fraction)
                row = {
                    "name": source.path,
                    "code": code,
                    "prompt": source.prompt,
                    "split": split,
                    "digest": digest.hex(),
                }
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    counts.skipped = dict(sorted(skipped.items()))
    if config.max_documents is None or len(seen) <= config.max_documents:
        return None
    return heapq.nsmallest(config.max_documents, limited)[-1].hex()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()[:_DIGEST_BYTES]


def _with_file_entries(sources: Iterable[Source], files: list[SourceFile]) -> Iterator[Source]:
    """The same sources; an entry is appended to `files` for each run of sources of one file."""
    running = hashlib.sha256()
    for source in sources:
        if not files or files[-1].file != source.file:
            running = hashlib.sha256()
            files.append(SourceFile(file=source.file, texts=0, sha256=""))
        running.update(bytes.fromhex(source.digest))
        files[-1].texts += 1
        files[-1].sha256 = running.hexdigest()
        yield source


def _check_not_empty(config: CorpusConfig, counts: Counts) -> None:
    if not counts.documents:
        raise UserError(
            f"the corpus is empty after filtering ({counts.summary()}): check corpus.path, "
            f"corpus.min_lines={config.min_lines} and corpus.max_lines={config.max_lines}"
        )
    for split in SPLITS:
        if not getattr(counts, split):
            raise UserError(
                f"the {split} split is empty ({counts.summary()}): it is drawn by hash of the path with "
                f"corpus.valid_fraction={config.valid_fraction}; use more files or another fraction"
            )
