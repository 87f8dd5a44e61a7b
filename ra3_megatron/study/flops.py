"""Equal FLOPs: how many steps of plain M-steps cost what another cell spent on E-steps, infusions and M-steps."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import load_config
from ra3_megatron.config.run import RunConfig
from ra3_megatron.report.run_folder import RunFolder, read_json

SPENT = {"ra3": ("estep-", "infuse-", "mstep-"), "ntp": ("ntp-",)}
"""Phases of a method, by the beginning of their names."""
TRAINING = {"ra3": "mstep-", "ntp": "ntp-"}
"""Phases that are M-steps."""


def with_equal_flops(config: RunConfig, reference: Path) -> RunConfig:
    """`config` with as many M-step steps as the FLOPs of the run in the folder `reference` pay for: in all of its
    M-steps, or in each where each starts from the base (`mstep.start`), so that a model has seen one alone.

    What the run was like is read from its own `config.yaml`: its steps may be those of a third run's FLOPs. Raises
    UserError when that file or its summary does not hold them.
    """
    ran = load_config(RunFolder(reference).config, [], resolved=True)
    seen = 1 if config.mstep.start == "base" else config.em.iterations
    steps = equal_steps(reference, ran, seen)
    return config.model_copy(update={"mstep": config.mstep.model_copy(update={"steps": steps})})


def equal_steps(folder: Path, reference: RunConfig, iterations: int) -> int:
    """Steps of each of `iterations` M-steps that together cost what the run in `folder` did, rounded up.

    The cost of a step is that of the run's own M-steps. Raises UserError when FLOPs are missing.
    """
    file = RunFolder(folder).summary
    phases = phase_flops(file)
    spent = sum(flops for name, flops in phases.items() if name.startswith(SPENT[reference.method]))
    trained = [flops for name, flops in phases.items() if name.startswith(TRAINING[reference.method])]
    if not sum(trained) or not reference.mstep.steps:
        raise UserError(f"{file}: holds no M-step, so that nothing says what a step costs (equal_flops)")
    step = sum(trained) / (len(trained) * reference.mstep.steps)
    return math.ceil(spent / (step * iterations) * (1 - 1e-12))


def phase_flops(summary: Path) -> dict[str, float]:
    """FLOPs of each phase of a run. UserError, naming the file, when one is missing."""
    phases = read_json(summary).get("phases") or {}
    for name, phase in phases.items():
        if not isinstance(phase.get("flops"), int | float):
            raise UserError(f"{summary}: phases.{name}.flops is missing, and equal_flops needs it")
    return {name: float(phase["flops"]) for name, phase in phases.items()}


def known_flops(phases: Mapping[str, Any], method: str, iteration: int) -> float | None:
    """FLOPs of a method up to an EM iteration (0: the warm start alone); None when a phase does not say."""
    if iteration == 0:
        names = ["warm_start"]
    else:
        names = [n for n in phases if n.startswith(SPENT[method]) and int(n.rpartition("-")[2]) <= iteration]
    values = [phases[name].get("flops") for name in names if name in phases]
    return sum(values) if values and all(isinstance(value, int | float) for value in values) else None
