"""Where and with what the suite ran: `python -m tests.gpu.machine` prints it as JSON.

In a process of its own, so that the one that starts the parts holds no memory of the GPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from tests.gpu.evidence import say

ASKED = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "transformer-engine": "transformer_engine",
    "transformers": "transformers",
    "triton": "triton",
    "pydantic": "pydantic",
    "sentencepiece": "sentencepiece",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "psutil": "psutil",
    "matplotlib": "matplotlib",
    "vllm": "vllm",
    "pytest": "pytest",
}
"""Packages that parts use: name on the index -> module."""


def packages() -> dict[str, str | None]:
    """Version of each package; None: it is not there. Nothing is imported."""
    return {name: _version(name, module) for name, module in ASKED.items()}


def compiler() -> str | None:
    """The C compiler that Triton would take; None: there is none."""
    named = os.environ.get("CC")
    return next(filter(None, (shutil.which(each) for each in filter(None, (named, "gcc", "clang", "cc")))), None)


def _version(name: str, module: str) -> str | None:
    try:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            return None
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def describe() -> dict[str, Any]:
    """Hardware, driver, versions, date, commit."""
    import torch

    from ra3_megatron.report.versions import collect_versions

    versions = collect_versions()
    git = versions["git"]
    found: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": os.environ.get("RA3_COMMIT") or (None if git is None else git["commit"]),
        "modified": None if git is None else git["modified"],
        "gpu": None,
        "processor": versions["processor"],
        "cores": versions["cores"],
        "python": versions["python"],
        "cuda": torch.version.cuda,
        "compiler": compiler(),
        "packages": packages(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
            "cudnn": _cudnn(),
            "driver": _driver(),
        }
    return found


def _cudnn() -> str:
    """What torch runs with, beside Transformer Engine where that is there."""
    from ra3_megatron.mcore.libraries import cudnn_version

    with contextlib.suppress(ImportError, OSError, RuntimeError):
        import transformer_engine.pytorch  # noqa: F401
    version, why = cudnn_version()
    return version or why


def _driver() -> str | None:
    """Version of NVIDIA's driver, and the clocks and power limit that it reports."""
    asked = "driver_version,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


if __name__ == "__main__":
    say(json.dumps(describe()))
