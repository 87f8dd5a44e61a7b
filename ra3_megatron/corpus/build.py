"""`build_corpus`: sources → cleaned texts → tokenizer → indexed data sets → manifest, in one folder.

    text/{train,valid}.jsonl     the documents: name, code
    tokenizer/                   trained on the training split, or a copy of the one given
    warm/{train,valid}*          transcripts for the warm start (`corpus.warm_start_comments`)
    mid/{train,valid}*           transcripts for mid-training (`corpus.human_comments`)
    sources.jsonl                every source file: texts it held, digest
    manifest.json                configuration, counts, versions, digest of every file

Invariants: the folder appears as a whole, by one rename, and is used again only when its manifest names the same
configuration; what an interrupted build leaves is cleared by the next one; the same data, configuration and versions
give the same bytes. The sources are read once: to take up changed data, delete the folder. One process builds.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from ra3_megatron.config.data import HumanComments
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.corpus.encode import write_store
from ra3_megatron.corpus.indexed import TranscriptStore
from ra3_megatron.corpus.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    StoreCounts,
    check_files,
    config_hash,
    corpus_config,
    file_entries,
    read_manifest,
    versions,
    write_manifest,
)
from ra3_megatron.corpus.prepare import SourceFile, Text, prepare, read_texts
from ra3_megatron.corpus.splits import SPLITS, Split
from ra3_megatron.tasks.families import build_family
from ra3_megatron.text.latents import LatentFormat, build_format
from ra3_megatron.text.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

Kind = Literal["warm", "mid"]
KINDS: tuple[Kind, ...] = ("warm", "mid")


class ProgressTask(Protocol):
    """One line of work that is shown."""

    def advance(self, steps: int = 1, units: int = 0) -> None:
        """`steps` more steps are done, in which `units` units were processed."""

    def close(self) -> None:
        """The work is done."""


class Progress(Protocol):
    """What shows the progress of a build."""

    def task(self, name: str, total: int | None = None, unit: str = "steps") -> ProgressTask:
        """A new line of work of `total` steps (None: not known)."""


@dataclass(frozen=True)
class Corpus:
    """A built corpus, open for reading."""

    folder: Path
    """Where it is."""
    manifest: Manifest
    """What is known about it."""
    tokenizer: Tokenizer
    """Its tokenizer."""
    format: LatentFormat
    """How latents are written, for this tokenizer."""

    def store(self, kind: Kind, split: Split) -> TranscriptStore:
        """The transcripts of a split: `warm` for the warm start, `mid` for mid-training."""
        return TranscriptStore(self.folder / kind / split)

    def texts(self, split: Split) -> Iterator[Text]:
        """The documents of a split as cleaned text, comments included, before anything was cut."""
        return read_texts(self.folder / "text" / f"{split}.jsonl")


def build_corpus(config: RunConfig, folder: Path, progress: Progress | None = None) -> Corpus:
    """The corpus that `config` describes, in `folder`: taken as it is when it is there, built otherwise.

    A corpus of another configuration is replaced. UserError for whatever the user can mend: sources, an empty
    result, a tokenizer that cannot be trained or does not go with the latent format, a folder that cannot be written
    or holds something else, a corpus with damaged files.
    """
    manifest = read_manifest(folder)
    if manifest is None and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is no corpus: choose another folder, or delete it")
    if manifest is None or manifest.config_hash != config_hash(config):
        partial = folder.with_name(f".{folder.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _build(config, partial, progress or _NoProgress())
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
        except OSError as error:
            raise UserError(f"{error.filename or folder}: the corpus cannot be written ({error.strerror})") from error
        finally:
            with suppress(OSError):
                shutil.rmtree(partial)
    return open_corpus(config, folder)


def open_corpus(config: RunConfig, folder: Path) -> Corpus:
    """The corpus that `build_corpus` left in `folder`. UserError when it is not there, damaged, or of another
    configuration."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: no corpus here ({MANIFEST} is missing)")
    if manifest.config_hash != config_hash(config):
        raise UserError(f"{folder}: the corpus of another configuration (see {MANIFEST} there)")
    check_files(folder, manifest.files)
    tokenizer = load_tokenizer(config.tokenizer, folder / "tokenizer", config.model.vocab_size)
    return Corpus(folder, manifest, tokenizer, build_format(config.text, tokenizer))


def _build(config: RunConfig, folder: Path, progress: Progress) -> None:
    if config.tokenizer.path is not None:  # a mistake is found before the sources are read
        load_tokenizer(config.tokenizer, folder / "tokenizer", config.model.vocab_size)
    texts = folder / "text"
    texts.mkdir()
    reading = progress.task("reading sources", unit="texts")
    counts, source_files = prepare(config.corpus, texts, on_text=reading.advance)
    reading.close()
    _write_sources(folder / "sources.jsonl", source_files)

    text_bytes: dict[str, int] = {split: _text_bytes(texts / f"{split}.jsonl") for split in SPLITS}
    tokenizer = _make_tokenizer(config, folder, text_bytes["train"], progress)
    format = build_format(config.text, tokenizer)

    comments: dict[Kind, HumanComments] = {
        "warm": config.corpus.warm_start_comments,
        "mid": config.corpus.human_comments,
    }
    stores: dict[str, StoreCounts] = {}
    encoding = progress.task("tokenizing", total=len(KINDS) * counts.documents, unit="tokens")
    for kind in KINDS:
        for split in SPLITS:
            stores[f"{kind}/{split}"] = write_store(
                folder / kind / split,
                read_texts(texts / f"{split}.jsonl"),
                config,
                comments[kind],
                tokenizer,
                format,
                on_shard=encoding.advance,
            )
    encoding.close()

    manifest = Manifest(
        format=FORMAT_VERSION,
        config_hash=config_hash(config),
        config=corpus_config(config),
        counts=counts,
        text_bytes=text_bytes,
        tokenizer={"vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint},
        stores=stores,
        versions=versions(config.corpus.packages),
        files=file_entries(folder),
    )
    write_manifest(folder, manifest)


def _make_tokenizer(config: RunConfig, folder: Path, train_bytes: int, progress: Progress) -> Tokenizer:
    target = folder / "tokenizer"
    if config.tokenizer.path is not None:
        tokenizer = load_tokenizer(config.tokenizer, target, config.model.vocab_size)
        tokenizer.save(target)
        return tokenizer
    task = progress.task("training the tokenizer", total=1)
    texts = read_texts(folder / "text" / "train.jsonl")
    share = min(1.0, config.tokenizer.train_bytes / train_bytes)
    settings = config.tokenizer
    words = build_family(config.corpus.tasks).words if config.corpus.source == "tasks" else ()
    sample = _sample(texts, share)
    tokenizer = train_sentencepiece(sample, settings.vocab_size, target, settings.superwords, words)
    task.advance()
    return tokenizer


def _sample(texts: Iterator[Text], share: float) -> Iterator[str]:
    """About `share` of the texts, drawn by hash, so that no part of the source is preferred."""
    for text in texts:
        digest = hashlib.sha256(text.code.encode("utf-8")).digest()
        if int.from_bytes(digest[-8:], "big") < share * 2**64:
            yield text.prompt + text.code


def _text_bytes(file: Path) -> int:
    return sum(len((text.prompt + text.code).encode("utf-8")) for text in read_texts(file))


def _write_sources(file: Path, entries: list[SourceFile]) -> None:
    with file.open("w", encoding="utf-8", newline="\n") as stream:
        for entry in entries:
            stream.write(json.dumps(asdict(entry), ensure_ascii=False) + "\n")


class _NoProgress:
    """Shows nothing."""

    def task(self, name: str, total: int | None = None, unit: str = "steps") -> "_NoProgress":
        return self

    def advance(self, steps: int = 1, units: int = 0) -> None:
        pass

    def close(self) -> None:
        pass
