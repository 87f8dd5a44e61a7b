"""From a scaling study to what is measured: its points, and the arms whose cells they are.

A point is a mode, size, layout and number of processes. Points whose trainings are the same (all layouts are the same
on one process; strong and weak scaling begin with the same rows) share an arm, so that it is measured once.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import load_config
from ra3_megatron.config.run import RunConfig
from ra3_megatron.study.plan import Cell, cells_of, resolve
from ra3_megatron.study.scaling.layouts import AXES, layout_tag
from ra3_megatron.study.scaling.spec import ScalingConfig
from ra3_megatron.study.settings import flatten, overrides
from ra3_megatron.study.spec import StudyConfig, make_study


@dataclass(frozen=True)
class Point:
    """A place in the tables and figures."""

    mode: str
    """strong or weak."""
    size: str
    layout: str
    """The family, as it was written."""
    processes: int
    batch: int
    """Rows a step."""
    arm: str
    """Name of the arm that is measured for it."""

    @property
    def series(self) -> tuple[str, str, str]:
        """Points of one series differ in the number of processes."""
        return self.mode, self.size, self.layout


@dataclass(frozen=True)
class Measured:
    """All that a study measures."""

    points: list[Point]
    study: StudyConfig
    """The arms and repeats, as cells of an ordinary study."""
    cells: list[Cell]
    configs: dict[str, RunConfig]
    """Of each cell by its name."""

    def of_arm(self, arm: str) -> list[Cell]:
        """Its repeats."""
        return [cell for cell in self.cells if cell.arm == arm]


def measured(scaling: ScalingConfig) -> Measured:
    """Points, cells and resolved configurations. UserError with one line for each problem."""
    points: list[Point] = []
    arms: dict[str, dict[str, Any]] = {}
    threads = scaling.threads or default_threads(scaling)
    for size, own in scaling.sized.items():
        shared = {**flatten(scaling.settings), **own}
        config = load_config(None if scaling.config is None else Path(scaling.config), overrides(shared))
        batch = scaling.batch or config.warm_start.global_batch_size
        for family in scaling.families:
            for processes in sorted(scaling.processes):
                keys = family.at(processes)
                if keys is None:
                    continue
                for mode in ("strong", "weak") if scaling.mode == "both" else (scaling.mode,):
                    rows = batch if mode == "strong" else _weak(batch, processes, min(scaling.processes))
                    arm = f"{size}-{layout_tag(keys, family.micro_batch)}-b{rows}"
                    arms[arm] = {**own, **_settings(scaling, config, keys, rows, family.micro_batch, threads)}
                    points.append(Point(mode, size, family.text, processes, rows, arm))
    study = make_study(
        {
            "name": scaling.name,
            "folder": scaling.folder,
            "config": scaling.config,
            "settings": scaling.settings,
            "seeds": list(range(1, scaling.repeats + 1)),
            "arms": {arm: {"settings": settings} for arm, settings in arms.items()},
        },
        "scaling",
    )
    cells = cells_of(study)
    cells.sort(key=lambda cell: cell.seed)  # all of the first repeat, then the next: a busy hour hits them all
    return Measured(points, study, cells, resolve(study, cells))


def default_threads(scaling: ScalingConfig) -> int:
    """Threads of a process, the same at every number of processes: a process is to the study what a GPU is."""
    if scaling.processes_per_node is not None:
        return 1
    return max(1, len(os.sched_getaffinity(0)) // max(scaling.processes))


def rows_of_corpora(configs: Iterable[RunConfig]) -> dict[str, RunConfig]:
    """One configuration for each different corpus, by its hash."""
    from ra3_megatron.corpus.manifest import config_hash

    return {config_hash(config)[:16]: config for config in configs}


def _weak(batch: int, processes: int, smallest: int) -> int:
    rows, rest = divmod(batch * processes, smallest)
    if rest:
        raise UserError(f"batch={batch}: {batch} * {processes} / {smallest} rows are no whole number (weak scaling)")
    return rows


def _settings(
    scaling: ScalingConfig, config: RunConfig, keys: dict[str, Any], rows: int, micro_batch: int | None, threads: int
) -> dict[str, Any]:
    """What a cell trains. The warm start's section is that of the steps; nothing is evaluated."""
    micro = micro_batch or config.warm_start.micro_batch_size
    settings: dict[str, Any] = {f"parallel.{key}": value for key, value in {**dict.fromkeys(AXES, 1), **keys}.items()}
    for section in ("warm_start", "mstep"):
        settings[f"{section}.global_batch_size"] = rows
        settings[f"{section}.micro_batch_size"] = micro
        settings[f"{section}.micro_batch_tokens"] = None
    settings["warm_start.steps"] = scaling.warmup + scaling.steps
    settings["em.iterations"] = 0
    settings["parallel.threads"] = threads
    if scaling.estep:
        settings["estep.steps"] = scaling.estep + 2  # one before them, and one that is not taken: the last one reports
    return settings
