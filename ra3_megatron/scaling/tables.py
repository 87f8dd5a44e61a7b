"""Tables of this room (`data/*.yaml`): GPUs and architectures by name, or from the user's files."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from ra3_megatron.config.base import Section
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ModelConfig
from ra3_megatron.config.problems import path_problem, problems
from ra3_megatron.config.yaml_io import parse
from ra3_megatron.scaling.rates import CONTEXT_GIB, MAY_BE_ZERO, Rates


class Gpu(Section):
    """Data sheet of a GPU in its node. Rates are dense peaks; bandwidths are per GPU and, of links, per direction."""

    name: str = ""
    """How it is called."""
    memory_gib: float = Field(gt=0)
    """Memory of the device, GiB."""
    bf16_tflops: float = Field(gt=0)
    """Matrix products in bf16, TFLOP/s."""
    fp8_tflops: float | None = Field(default=None, gt=0)
    """Matrix products in FP8, TFLOP/s; none: the GPU has no FP8."""
    fp32_tflops: float | None = Field(default=None, gt=0)
    """Matrix products in fp32, TFLOP/s; none: nothing is planned in fp32."""
    memory_gb_s: float = Field(gt=0)
    """Bandwidth of the memory, GB/s."""
    nvlink_gb_s: float = Field(gt=0)
    """Between the GPUs of a node, GB/s."""
    gpus_per_node: int = Field(default=8, ge=1)
    """GPUs that NVLink connects."""
    network_gb_s: float = Field(gt=0)
    """Each GPU's share of the network between nodes, GB/s."""
    context_gib: float = Field(default=CONTEXT_GIB, ge=0)
    """What a process takes before it holds a model, GiB: context, buffers and workspaces of libraries."""
    rates: dict[str, float] = {}
    """Shares of these peaks that are reached on it, by their names in `scaling/rates.py`, where they are others than
    there."""

    @model_validator(mode="after")
    def _check(self) -> Gpu:
        known = [field.name for field in fields(Rates)]
        unknown = [name for name in self.rates if name not in known]
        if unknown:
            raise ValueError(f"rates.{unknown[0]}: is no rate; they are {', '.join(known)}")
        for name, rate in self.rates.items():
            if rate < 0 or (rate == 0 and name not in MAY_BE_ZERO):
                raise ValueError(f"rates.{name}={rate:g}: must be {'at least' if name in MAY_BE_ZERO else 'above'} 0")
        return self

    def own(self, rates: Rates) -> Rates:
        """These rates with the device's own in their place."""
        return replace(rates, **self.rates)


@dataclass(frozen=True)
class Architecture:
    """A model to plan for."""

    name: str
    model: ModelConfig
    vocab_size: int


@cache
def table(name: str) -> dict[str, Any]:
    """`data/NAME.yaml`."""
    text = (resources.files("ra3_megatron.scaling") / "data" / f"{name}.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def gpu_named(name: str) -> Gpu:
    """A GPU of the table, or of a YAML file with the keys of `Gpu`. Raises UserError."""
    known = table("gpus")
    if name.lower() in known:
        return Gpu(name=name.lower(), **known[name.lower()])
    file = Path(name)
    if not file.is_file():
        raise UserError(f"--gpu {name}: neither a file nor one of {', '.join(known)}{_near(name, known)}")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--gpu {path_problem(name, error)}") from error
    values = parse(text, name)
    if not isinstance(values, dict):
        raise UserError(f"--gpu {file}: holds no keys such as memory_gib")
    try:
        return Gpu.model_validate({"name": file.stem, **values})
    except ValidationError as error:
        raise UserError("\n".join(f"--gpu {file}: {line}" for line in problems(error))) from error


def architecture_named(name: str, sequence: int | None = None) -> Architecture:
    """An architecture of the table, or of a Hugging Face folder; its rows are `sequence` tokens long. UserError."""
    known = table("models")
    if name.lower() in known:
        keys = dict(known[name.lower()])
        source = name.lower()
    else:
        folder = Path(name)
        if not folder.is_dir():
            raise UserError(
                f"--model {name}: neither a folder with config.json nor one of {', '.join(known)}{_near(name, known)}"
            )
        from ra3_megatron.hf.families import read_folder  # reads JSON only

        _, keys, longest = read_folder(folder)
        if sequence is not None and sequence > longest:
            raise UserError(f"--sequence={sequence}: --model {name} reads at most {longest} tokens")
        keys = {**keys, "context_length": min(longest, 8192)}
        source = str(folder)
    if sequence is not None:
        keys["context_length"] = sequence
    vocabulary = keys.pop("vocab_size")
    try:
        return Architecture(source, ModelConfig(**keys, precision="bf16"), int(vocabulary))
    except ValidationError as error:
        raise UserError("\n".join(f"--model {name}: {line}" for line in problems(error))) from error


def _near(name: str, known: dict[str, Any]) -> str:
    close = difflib.get_close_matches(name.lower(), known, 1)
    return f" (did you mean {close[0]}?)" if close else ""
