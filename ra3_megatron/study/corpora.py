"""One corpus for all cells that would build the same one: hard links to the files of a cell that has it.

Files of a built corpus are never written in place: `build_corpus` makes a new folder and removes the old one, which
only takes this cell's links away. The links appear as a whole, by one rename.
"""

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.corpus.manifest import config_hash, read_manifest

CORPUS = "corpus"


def share_corpus(folder: Path, config: RunConfig, others: Iterable[Path]) -> Path | None:
    """Give the cell in `folder` the corpus of one of the `others`, if it is the one that `config` describes.

    Returns the folder of the one that had it; None when the cell has a corpus, or none of them has this one.
    """
    target, wanted = folder / CORPUS, config_hash(config)
    if target.exists():
        return None
    for other in others:
        if other != folder and _has(other / CORPUS, wanted):
            _link(other / CORPUS, target)
            return other
    return None


def _has(corpus: Path, wanted: str) -> bool:
    try:
        manifest = read_manifest(corpus)
    except UserError:  # damaged: the cell builds its own
        return False
    return manifest is not None and manifest.config_hash == wanted


def _link(source: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.linking")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(source, partial, copy_function=_link_or_copy)
        partial.rename(target)
    finally:
        with suppress(OSError):
            shutil.rmtree(partial)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)
