"""Room on the file systems that a run writes to."""

import shutil
import tempfile
from pathlib import Path

from ra3_megatron.cluster.results import Limits, Result, State

CHECK = "free room"
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_GIB = 1.0
"""Weights reach engines of the same node through it."""


def check(node: str, run_dir: Path, limits: Limits) -> list[Result]:
    """Free room for the run folder, for temporary files and in shared memory."""
    run, temporary = existing(run_dir), Path(tempfile.gettempdir())
    found = [
        room(node, "run folder", run, limits.min_free_gib, "--min-free-gib"),
        room(node, "temp folder", temporary, limits.min_tmp_gib, "--min-tmp-gib"),
    ]
    if SHARED_MEMORY.is_dir():
        found.append(room(node, str(SHARED_MEMORY), SHARED_MEMORY, SHARED_MEMORY_GIB, "vLLM's weights", "warn"))
    return found


def room(node: str, name: str, folder: Path, least: float, why: str, lacking: State = "bad") -> Result:
    """Whether `folder` has `least` GiB for an ordinary user. Quotas are not seen."""
    free = shutil.disk_usage(folder).free / 2**30
    text = f"{free:.1f} GiB free in {folder}"
    if free < least:
        return Result(node, name, lacking, f"{text}, should be {least:g} ({why})", f"{free:.1f}")
    return Result(node, name, "ok", text, f"{free:.1f}")


def existing(path: Path) -> Path:
    """The nearest folder above a path (or itself) that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
