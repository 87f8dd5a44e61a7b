"""What this machine has to compute with: the GPU, Transformer Engine, apex, and which kernels Megatron-Core takes."""

import importlib
import importlib.metadata
import os
import re
import shutil
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ra3_megatron.config.precision import Hardware


@dataclass(frozen=True)
class Package:
    """A package that is used where it is found."""

    version: str | None
    """None: it does not load."""
    why_not: str = ""


def hardware_of(device: torch.device) -> Hardware:
    """What processes on this device have. Transformer Engine is looked for beside a GPU alone: it needs CUDA."""
    if device.type != "cuda":
        return Hardware("the CPU", None)
    engine = package("transformer_engine", "transformer_engine.pytorch")
    return Hardware(
        device=torch.cuda.get_device_name(device),
        capability=torch.cuda.get_device_capability(device),
        cuda=numbers(torch.version.cuda),
        transformer_engine=numbers(engine.version),
        why_not=engine.why_not,
    )


def package(name: str, module: str) -> Package:
    """A package by its name on the index, and the module whose import tells whether it works."""
    try:
        loaded = importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return Package(None, str(error).split("\n")[0] or type(error).__name__)
    try:
        return Package(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Package(str(getattr(loaded, "__version__", "unknown")))


def numbers(version: str | None) -> tuple[int, int] | None:
    """The first two numbers of a version; None when it has none."""
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found else None


@cache
def has_compiler() -> bool:
    """Whether there is a C compiler, and Python's headers, which kernels that torch compiles for a GPU are started
    through: looked for where Triton does, which fails where one of them is missing."""
    named = os.environ.get("CC")
    compilers = ("gcc", "clang") if named is None else (named,)
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = Path(sysconfig.get_paths(scheme=scheme)["include"])
    return any(map(shutil.which, compilers)) and (headers / "Python.h").is_file()


@cache
def has_triton() -> bool:
    """Whether the kernels of `triton_kernels` can be made here: a GPU, Triton, and a C compiler."""
    return torch.cuda.is_available() and has_compiler() and package("triton", "triton").version is not None


def has_transformer_engine(device: torch.device) -> bool:
    """Whether layers on this device are Transformer Engine's."""
    return device.type == "cuda" and package("transformer_engine", "transformer_engine.pytorch").version is not None
