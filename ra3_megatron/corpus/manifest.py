"""`manifest.json` of a corpus: what it was made from, with what, what was left out, and the digest of every file.

Invariants: the manifest is written last, so a folder without one is no corpus; it holds no time and no path of this
machine beyond those in the configuration, so that two builds of the same data are the same bytes.
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import ra3_megatron
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.corpus.prepare import Counts

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_PACKAGES = ("megatron-core", "numpy", "sentencepiece", "tokenizers", "datasets", "pyarrow")
_CHUNK = 1 << 20


@dataclass
class StoreCounts:
    """One indexed data set."""

    documents: int = 0
    """Documents in it."""
    tokens: int = 0
    """Tokens, beginning and end of sequence included."""
    code_tokens: int = 0
    """Tokens of the expert's text alone."""
    lines: int = 0
    """Primitive actions."""
    observed_thoughts: int = 0
    """Lines whose human comment became a thought (`corpus.human_comments=as_thoughts`)."""
    too_long_cut: int = 0
    """Documents cut at a line boundary to fit `model.context_length`."""
    too_long_dropped: int = 0
    """Documents left out because they, or their first line, do not fit `model.context_length`."""


@dataclass(frozen=True)
class Manifest:
    """Everything that is known about a built corpus; the field names are the keys of `manifest.json`."""

    format: int
    """Layout of the folder."""
    config_hash: str
    """sha256 of `config`; a corpus is used again when it is the same."""
    config: dict[str, Any]
    """The sections and keys of the run configuration that decide the corpus."""
    counts: Counts
    """Documents used, and left out by reason."""
    text_bytes: dict[str, int]
    """UTF-8 bytes of the documents of each split."""
    tokenizer: dict[str, Any]
    """`vocab_size` and `fingerprint`."""
    stores: dict[str, StoreCounts]
    """Indexed data sets by name (`warm/train`, …)."""
    versions: dict[str, str | None]
    """Python, this package, and the packages that the corpus depends on (None: not installed)."""
    files: dict[str, dict[str, Any]]
    """`bytes` and `sha256` of every file of the corpus; `sources.jsonl` lists the source files and their digests."""


def corpus_config(config: RunConfig) -> dict[str, Any]:
    """The part of the configuration that decides what the corpus is."""
    return {
        "corpus": config.corpus.model_dump(mode="json"),
        "tokenizer": config.tokenizer.model_dump(mode="json"),
        "text": config.text.model_dump(mode="json"),
        "model.context_length": config.model.context_length,
    }


def config_hash(config: RunConfig) -> str:
    """sha256 of `corpus_config` and of the layout version."""
    content = json.dumps({"format": FORMAT_VERSION, **corpus_config(config)}, sort_keys=True)
    return hashlib.sha256(content.encode("utf-8")).hexdigest()


def versions(packages: list[str]) -> dict[str, str | None]:
    """Versions of Python, of this package and of what the corpus is made with; `packages` are import names."""
    distributions = metadata.packages_distributions()
    names = [*_PACKAGES, *(name for package in packages for name in distributions.get(package.partition(".")[0], []))]
    return {
        "python": platform.python_version(),
        "ra3_megatron": ra3_megatron.__version__,
        **{name: _version(name) for name in names},
    }


def file_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """`bytes` and `sha256` of each file below `folder`, by relative name."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` into `folder`."""
    text = json.dumps(asdict(manifest), indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in `folder`; None when there is none. UserError when it cannot be understood."""
    file = folder / MANIFEST
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT_VERSION:
            raise UserError(f"{file}: format {content['format']}, this version reads {FORMAT_VERSION}: delete {folder}")
        counts = Counts(**content.pop("counts"))
        stores = {name: StoreCounts(**store) for name, store in content.pop("stores").items()}
        return Manifest(counts=counts, stores=stores, **content)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not the manifest of a corpus: choose another folder, or delete {folder}") from error


def check_files(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """UserError naming the first file that is missing or has another size than the manifest says."""
    for name, entry in entries.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {entry['bytes']}"
            raise UserError(f"{file} {found}: delete {folder} to build the corpus again")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
