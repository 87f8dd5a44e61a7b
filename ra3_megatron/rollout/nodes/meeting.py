"""Where rollout nodes find the trainer: a file in the folder that they share.

It holds the key with which both sides prove that they belong to the same attempt, so only its user may read it. A
trainer that is killed leaves it behind; nobody answers to its key any more, and the next attempt replaces it.
"""

import contextlib
import json
import os
import secrets
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

FILE = "meeting.json"


@dataclass(frozen=True)
class Meeting:
    """One attempt's."""

    attempt: str
    """Another one every time."""
    hosts: list[str]
    """Addresses of the trainer's node, the likeliest first."""
    port: int
    authkey: str = field(repr=False)
    """Hexadecimal."""

    @classmethod
    def new(cls, hosts: list[str], port: int) -> "Meeting":
        return cls(secrets.token_hex(8), hosts, port, secrets.token_hex(32))

    @property
    def key(self) -> bytes:
        return bytes.fromhex(self.authkey)

    def write(self, folder: Path) -> None:
        """Replace the folder's file atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{FILE}.", suffix=".tmp")  # mode 0600
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(asdict(self), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, folder / FILE)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def remove(self, folder: Path) -> None:
        """Take the file away, unless it is another attempt's by now."""
        there = read_meeting(folder)
        if there is not None and there.attempt == self.attempt:
            with contextlib.suppress(OSError):
                (folder / FILE).unlink(missing_ok=True)


def read_meeting(folder: Path) -> Meeting | None:
    """The folder's; None when there is none, or none that can be read."""
    try:
        return Meeting(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
