"""Suites of tasks that a model is evaluated on while it trains."""

from typing import Literal

from pydantic import Field, model_validator

from ra3_megatron.config.base import Section

SuiteName = Literal[
    "humaneval", "humaneval+", "mbpp", "mbpp+", "mbpp-500-3shot", "gsm8k", "livecodebench", "codeforces"
]
PhaseName = Literal["warm_start", "estep", "mstep", "ntp", "rlvr"]


class BenchmarksConfig(Section):
    """Suites of tasks that the model is evaluated on while it trains, as `ra3 eval` does it (docs/evaluation.md)."""

    suites: list[SuiteName] = []
    """Names of suites; none: no evaluation of this kind."""

    data: str | None = None
    """Folder with the suites' tasks; none: what is installed, cached or on the hub."""

    interval: int = Field(default=100, ge=1)
    """Updates between evaluations (one is always made before the first update of a phase and at its end)."""

    phases: list[PhaseName] = ["mstep", "ntp", "rlvr"]
    """Phases that are evaluated in."""

    limit: int | None = Field(default=32, ge=1)
    """Tasks of each suite, the first ones; none: all."""

    mode: Literal["think", "no-think", "both"] = "think"
    """`think`: the model may write thoughts, which are dropped; `no-think`: tokens that start one are never sampled."""

    samples: int = Field(default=1, ge=1)
    """Samples of each task. 1: greedy; more: at `rollout.temperature`, and figures are means over them."""

    max_new_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a sample at most; none: as the suite says."""

    workers: int | None = Field(default=None, ge=1)
    """Programs executed at once; none: one fewer than the cores of the main process."""

    @model_validator(mode="after")
    def _check(self) -> "BenchmarksConfig":
        for name in ("suites", "phases"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={','.join(values)} names one twice")
        return self
