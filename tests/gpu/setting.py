"""What parts are told, and what they share: sizes, the process, models, batches, the recipes that this GPU has."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import ra3_megatron.mcore  # noqa: F401
from ra3_megatron.config.compatibility import hardware_problems
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.config.precision import RECIPES
from ra3_megatron.config.training import OptimizerConfig
from ra3_megatron.mcore.batch import TokenBatch
from ra3_megatron.mcore.hardware import hardware_of
from ra3_megatron.mcore.model import build_model
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import Trainer
from tests.gpu.evidence import Evidence

T = TypeVar("T")

NEEDS_GPU = "needs a GPU"


@dataclass(frozen=True)
class Setting:
    """How large a part is, and where it runs."""

    small: bool
    """Tiny shapes, to exercise the code: figures are no evidence."""
    folder: Path
    """For files that this part needs for itself."""
    out: Path
    """For files beside its results."""
    parallel: ParallelConfig
    runtime: Runtime

    def pick(self, full: T, small: T) -> T:
        """The size of something."""
        return small if self.small else full

    @property
    def device(self) -> torch.device:
        """What this process computes on."""
        return self.runtime.device

    @property
    def cuda(self) -> bool:
        """Whether that is a GPU."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def recipes(self, model: ModelConfig, evidence: Evidence) -> list[str]:
        """FP8 precisions that this machine has; the others are named as missing."""
        found = []
        for name in RECIPES:
            problems = list(hardware_problems(model.model_copy(update={"precision": name}), hardware_of(self.device)))
            if problems:
                evidence.missing(name, NEEDS_GPU if not self.cuda else problems[0])
            else:
                found.append(name)
        return found

    def build(self, model: ModelConfig, vocab_size: int, precision: str, seed: int = 1) -> torch.nn.Module:
        """A model with the same initial weights in every precision, before rounding."""
        config = with_precision(model, precision)
        return build_model(config, self.parallel, self.runtime, vocab_size, np.ones((1, vocab_size), dtype=bool), seed)

    def trainer(
        self, model: ModelConfig, vocab_size: int, precision: str, optimizer: OptimizerConfig | None = None
    ) -> Trainer:
        """A trainer of a new model."""
        network = self.build(model, vocab_size, precision)
        return Trainer(network, optimizer or OptimizerConfig(), self.parallel, self.runtime, steps=1000)


def with_precision(model: ModelConfig, precision: str) -> ModelConfig:
    """The same architecture in another precision, with all checks."""
    return ModelConfig(**{**model.model_dump(), "precision": precision})


def full_rows(count: int, length: int, vocab_size: int, seed: int) -> TokenBatch:
    """A micro-batch of rows that one document fills each: random tokens, every one predicted."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, (count, length), generator=generator)
    weight = torch.ones(count, length)
    weight[:, -1] = 0.0
    positions = torch.arange(length).expand(count, length).contiguous()
    return TokenBatch(ids, positions, torch.zeros_like(ids), ids.roll(-1, 1), ce_weight=weight)


def packed_rows(count: int, length: int, vocab_size: int, seed: int, documents: tuple[int, int]) -> TokenBatch:
    """A micro-batch of rows that are filled with documents of any length between two, every token but the last of each
    predicted."""
    batch = full_rows(count, length, vocab_size, seed)
    draw = np.random.default_rng(seed)
    segments, positions = torch.zeros(count, length, dtype=torch.long), torch.zeros(count, length, dtype=torch.long)
    weight = torch.ones(count, length)
    for row in range(count):
        begin = number = 0
        while begin < length:
            end = min(length, begin + int(draw.integers(documents[0], documents[1] + 1)))
            segments[row, begin:end], positions[row, begin:end] = number, torch.arange(end - begin)
            weight[row, end - 1] = 0.0
            begin, number = end, number + 1
    return replace(batch, segments=segments, positions=positions, ce_weight=weight)


def release(*_: Any) -> None:
    """Free what nothing holds any more: models refer to their hooks in circles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference by the norm of what is expected, in fp64."""
    expected = expected.detach().double()
    return float((found.detach().double() - expected).norm() / expected.norm())


def mean(values: Sequence[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)
