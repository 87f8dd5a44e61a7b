"""Files of a checkpoint: sizes, checksums, and which of them are missing or damaged."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

ALGORITHM = "sha256"


class FileFacts(TypedDict):
    """What a checkpoint's record says of one of its files."""

    bytes: int
    sha256: str


def facts_of(path: Path) -> FileFacts:
    """Size and checksum of a file (read at one to two GB/s where the processor has SHA instructions)."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, ALGORITHM).hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def wrong_sizes(folder: Path, files: dict[str, FileFacts]) -> dict[str, str]:
    """Files that are missing or shorter or longer than they were, and what is wrong with each. Reads no data."""
    found = {}
    for name, facts in sorted(files.items()):
        try:
            size = (folder / name).stat().st_size
        except OSError:
            found[name] = "is missing"
            continue
        if size != facts["bytes"]:
            kind = "truncated" if size < facts["bytes"] else "damaged"
            found[name] = f"is {kind}: {size} bytes instead of {facts['bytes']}"
    return found


def wrong_contents(folder: Path, files: dict[str, FileFacts], names: Iterable[str]) -> dict[str, str]:
    """Those of `names` whose checksum is not what it was, or that cannot be read, and what is wrong with each."""
    found = {}
    for name in names:
        try:
            digest = facts_of(folder / name)["sha256"]
        except OSError as problem:
            found[name] = f"cannot be read: {problem.strerror or problem}"
            continue
        if digest != files[name]["sha256"]:
            found[name] = "is damaged: its checksum is not the one that was recorded"
    return found


def force_to_disk(folder: Path, recursive: bool = True) -> None:
    """fsync a folder and, if `recursive`, everything below it."""
    for path in [folder, *folder.rglob("*")] if recursive else [folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
