"""Which split a text belongs to."""

import hashlib
from typing import Literal

Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")


def split_of(split_key: str, valid_fraction: float) -> Split:
    """The split of all texts that share `split_key` (a file, or a row), by its sha256."""
    digest = hashlib.sha256(split_key.encode("utf-8")).digest()
    return "valid" if int.from_bytes(digest[:8], "big") < valid_fraction * 2**64 else "train"
