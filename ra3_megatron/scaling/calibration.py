"""The step-time model against what others measured (`data/published.yaml`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.scaling.memory import Work
from ra3_megatron.scaling.rates import RATES, Rates
from ra3_megatron.scaling.step import step_time
from ra3_megatron.scaling.tables import architecture_named, gpu_named, table

FITTED = ("bf16_matmul", "fp8_matmul", "exposed")


@dataclass(frozen=True)
class Published:
    """A measurement of others."""

    row: dict[str, Any]

    @property
    def fit(self) -> bool:
        """The model is fitted to it."""
        return bool(self.row.get("fit", False))

    @property
    def measured(self) -> float:
        """Tokens a second and GPU."""
        return float(self.row["tokens_per_second"])

    @property
    def source(self) -> str:
        """Who measured it."""
        return str(table("published")["sources"][self.row["source"]])

    @property
    def parallel(self) -> ParallelConfig:
        """Its layout, with what these measurements overlapped."""
        keys = {key: value for key, value in self.row["layout"].items() if key != "micro_batch"}
        size = keys.get("tensor", 1) * keys.get("pipeline", 1) * keys.get("context", 1)
        return ParallelConfig(
            **keys,
            data=self.row["gpus"] // size,
            sequence=keys.get("tensor", 1) > 1,
            distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        )

    @property
    def work(self) -> Work:
        """What was trained on; gradients were kept and reduced in bf16."""
        row = self.row
        return Work(row["sequence"], row["global_batch"], row["layout"]["micro_batch"], row["precision"], 2)

    def predicted(self, rates: Rates = RATES) -> float:
        """Tokens a second and GPU, as the model has it."""
        made = architecture_named(self.row["model"], self.row["sequence"])
        seconds = step_time(made.model, made.vocab_size, self.parallel, self.work, gpu_named(self.row["gpu"]), rates)
        return self.work.global_batch * self.work.sequence / seconds.total / int(self.row["gpus"])

    def error(self, rates: Rates = RATES) -> float:
        """predicted / measured - 1."""
        return self.predicted(rates) / self.measured - 1


def published() -> list[Published]:
    """Every row."""
    return [Published(row) for row in table("published")["rows"]]


def fit(rows: Sequence[Published] | None = None) -> Rates:
    """The fitted rates: least squares of log(predicted / measured) over the rows marked `fit`."""
    rows = [row for row in rows or published() if row.fit]

    def residuals(values: np.ndarray) -> list[float]:
        rates = replace(RATES, **dict(zip(FITTED, map(float, values), strict=True)))
        return [float(np.log(1 + row.error(rates))) for row in rows]

    found = least_squares(residuals, [0.7, 0.6, 0.3], bounds=([0.3, 0.3, 0.0], [1.0, 1.0, 1.0]))
    return replace(RATES, **dict(zip(FITTED, (round(float(value), 3) for value in found.x), strict=True)))
