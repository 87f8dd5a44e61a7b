"""How much memory a command and its descendants use, as the kernel tells of them in /proc."""

from __future__ import annotations

import os
from pathlib import Path

INODE = 1024
"""Bytes of kernel memory that a file in memory takes beside its contents (BOGO_INODE_SIZE of Linux)."""

COUNTED = (b"RssAnon:", b"RssShmem:", b"VmSwap:")


def descendants(pid: int) -> list[int]:
    """A process and all processes below it, as far as they still live."""
    found, waiting = [], [pid]
    while waiting:
        process = waiting.pop()
        found.append(process)
        try:
            for thread in os.listdir(f"/proc/{process}/task"):
                waiting += map(int, Path(f"/proc/{process}/task/{thread}/children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def memory_of(pids: list[int]) -> int:
    """Bytes of anonymous and shared memory that these processes hold. Pages that two of them share count twice."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/status").read_bytes().splitlines()  # a process's name may be any bytes
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(COUNTED))
    return total


def files_of(first: int, size: int) -> int:
    """Bytes of memory that the temporary files in the sandbox take.

    first: its first process, by its number here; size: of its file system in memory. Zero before that is there (for a
    moment the process may not be looked at), and when the process is gone.
    """
    try:
        place = os.statvfs(f"/proc/{first}/root/tmp")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    if place.f_blocks * place.f_frsize != size:
        return 0
    return (place.f_blocks - place.f_bfree) * place.f_frsize + (place.f_files - place.f_ffree) * INODE
