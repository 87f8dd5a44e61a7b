"""One cuDNN in a process.

torch brings its own cuDNN; Transformer Engine looks for one on the system first. Where both are there and differ, parts
of the one get mixed with parts of the other: torch refuses its own cuDNN ("version incompatibility") and takes its
slower attention, or Transformer Engine does not load. So Transformer Engine is pointed to the one that torch has
loaded, and the parts of that one are loaded before it can load others.
"""

import ctypes
import os
import re
from collections.abc import Iterable, MutableMapping
from pathlib import Path

import torch

NAMED = "CUDNN_HOME"
"""The variable that Transformer Engine looks at before all else."""


def share_cudnn(environment: MutableMapping[str, str] = os.environ) -> Path | None:
    """Name the folder of torch's cuDNN in the environment, and load its parts; None when torch has none that it can
    use.

    Before Transformer Engine is imported. Nothing is changed where the environment names that folder, or one around it.
    """
    version, _ = cudnn_version()  # loads it, where torch has not yet
    folder = loaded_from(_maps())
    if folder is None or version is None:  # no cuDNN, or another one was loaded before: too late
        return None
    named = environment.get(NAMED)
    if named is None or not folder.is_relative_to(Path(named).resolve()):
        environment[NAMED] = str(folder)
    for library in sorted(folder.glob("libcudnn*.so.*")):
        ctypes.CDLL(str(library))
    return folder


def cudnn_version() -> tuple[str | None, str]:
    """The version that torch runs with, or None and why there is none that it can run with."""
    try:
        number = torch.backends.cudnn.version()
    except RuntimeError as error:  # another one was loaded first
        return None, str(error).split(". ")[0]
    if number is None:
        return None, "this torch has none"
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}", ""


def loaded_from(maps: Iterable[str]) -> Path | None:
    """The folder of libcudnn.so among the files that a process has mapped. maps: lines of /proc/self/maps."""
    for line in maps:
        found = re.search(r"(/\S*)/libcudnn\.so[.\d]*$", line.strip())
        if found:
            return Path(found[1]).resolve()
    return None


def _maps() -> list[str]:
    try:
        return Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
