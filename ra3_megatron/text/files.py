"""Writing small files so that a reader never sees half of one, and locks that say who may write to a folder."""

import fcntl
import os
import tempfile
import time
from pathlib import Path
from typing import IO


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, then rename it into place; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def force_to_disk(path: Path) -> None:
    """Return when the content of a file is on the disk (fsync): what is written behind it may rely on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock_file(path: Path, wait: float = 0.0) -> IO[bytes] | None:
    """Lock a file; None: another process has it. On a file system without locks there is none, and nobody is refused.

    The open file that is returned holds the lock, and so does a child that inherits it; the same file, opened and
    closed once more, releases nothing (flock). wait: seconds to wait for a process that is about to end.
    """
    file = path.open("ab")  # not even its time changes
    until = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= until:
                file.close()
                return None
            time.sleep(0.05)
        except OSError:  # a file system without locks
            return file
