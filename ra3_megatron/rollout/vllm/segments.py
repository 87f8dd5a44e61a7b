"""Shared memory of processes that are about to be killed.

vLLM's workers talk through segments in /dev/shm, hundreds of MiB of them. They have names, so they outlive processes
that are killed; who kills them removes them.
"""

import contextlib
import os
from pathlib import Path

SHARED = "/dev/shm/"

Segment = tuple[str, int]
"""Path and inode: another's segment may have taken the name."""


def segments_of(group: int) -> set[Segment]:
    """The named segments that processes of a process group have in their memory."""
    found: set[Segment] = set()
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if os.getpgid(pid) == group:
                found |= _mapped(Path(f"/proc/{pid}/maps").read_text())
    return found


def remove(segments: set[Segment]) -> None:
    """Remove those that are still there."""
    for path, inode in segments:
        with contextlib.suppress(OSError):
            if os.stat(path).st_ino == inode:
                os.unlink(path)


def _mapped(maps: str) -> set[Segment]:
    """Segments in the text of /proc/PID/maps: address, rights, offset, device, inode, path."""
    columns = [line.split(maxsplit=5) for line in maps.splitlines()]
    return {
        (path, int(inode))
        for *_, inode, path in (each for each in columns if len(each) == 6)
        if path.startswith(SHARED) and not path.endswith(" (deleted)")
    }
