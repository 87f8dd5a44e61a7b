"""From a study to its cells: names, folders, what each waits for, and the resolved configuration of each.

A cell is one run: an arm at one point of its grid with one seed. Its folder is `<study>/cells/<name>`. Later settings
win: the configuration file, the study's settings, the base run to start from, the arm, the grid point.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import load_config
from ra3_megatron.config.run import RunConfig
from ra3_megatron.study.settings import flatten, overrides, value_text
from ra3_megatron.study.spec import BASE, PLACEHOLDER, SEED, StudyConfig

CELLS = "cells"
LONGEST = 255
"""Characters of a folder's name; those of a cell's are ASCII."""


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    name: str
    """Name of its folder: `arm,key=value,seed=1`."""
    group: str
    """The name without the seed: cells of one group differ in their seed only."""
    arm: str
    """Name of the arm; `base` for the run that the others start from."""
    seed: int
    """Seed of the run."""
    point: Mapping[str, Any] = field(default_factory=dict)
    """The grid point: dotted keys and values."""
    after: tuple[str, ...] = ()
    """Names of the cells that must be done before."""
    equal_flops: str | None = None
    """Name of the cell whose FLOPs this one spends."""
    folders: Mapping[str, str] = field(default_factory=dict)
    """Name of the cell that each placeholder stands for."""

    def folder(self, study: Path) -> Path:
        """Its folder in that of the study."""
        return study / CELLS / self.name


def cells_of(study: StudyConfig) -> list[Cell]:
    """All cells, seed by seed, each behind those that it waits for.

    Raises UserError when `after` or a placeholder fits no cell, or several, and for names that two cells or no folder
    can have.
    """
    short = _short_keys({key for arm in study.arms for key in study.grid_of(arm)})
    cells: dict[tuple[str, int], list[Cell]] = {}
    for seed in study.seeds:
        if study.base is not None and not (study.shared_base and seed != study.seeds[0]):
            cells[BASE, seed] = [Cell(name=f"{BASE},seed={seed}", group=BASE, arm=BASE, seed=seed)]
        for arm in _in_order(study):
            cells[arm, seed] = [_cell(study, arm, seed, point, short, cells) for point in points(study.grid_of(arm))]
    found = [cell for group in cells.values() for cell in group]
    twice = {cell.name for cell in found if sum(other.name == cell.name for other in found) > 1}
    if twice:
        raise UserError(f"grid: different values give cells of the same name: {', '.join(sorted(twice))}")
    if longest := max((cell.name for cell in found if len(cell.name) > LONGEST), key=len, default=None):
        raise UserError(
            f"cell {longest}: its name has {len(longest)} characters, and that of a folder at most {LONGEST}: use "
            "shorter names of arms, or arms with settings instead of a grid"
        )
    return found


def points(grid: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """All points of a grid."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def _in_order(study: StudyConfig) -> list[str]:
    """Arms, each behind those that it waits for, otherwise in their order."""
    placed: list[str] = []

    def place(arm: str) -> None:
        for other in study.needs(arm):
            if other != BASE:
                place(other)
        if arm not in placed:
            placed.append(arm)

    for arm in study.arms:
        place(arm)
    return placed


def _cell(
    study: StudyConfig,
    arm: str,
    seed: int,
    point: dict[str, Any],
    short: Mapping[str, str],
    cells: Mapping[tuple[str, int], list[Cell]],
) -> Cell:
    group = ",".join([arm, *(f"{short[key]}={_safe(value)}" for key, value in point.items())])
    name = f"{group},seed={seed}"
    folders: dict[str, str] = {}
    for other in study.needs(arm):
        if other == BASE:
            folders[BASE] = cells[BASE, study.seeds[0] if study.shared_base else seed][0].name
            continue
        match = match_point(point, cells[other, seed])
        if match is None:
            raise UserError(
                f"arms.{arm}: {name} needs one cell of {other}, at the same grid point, and there are "
                f"{len(cells[other, seed])}: give both arms the same grid"
            )
        folders[other] = match.name
    equal = study.arms[arm].equal_flops
    return Cell(
        name=name,
        group=group,
        arm=arm,
        seed=seed,
        point=point,
        after=tuple(folders.values()),
        equal_flops=None if equal is None else folders[equal],
        folders=folders,
    )


def match_point(point: Mapping[str, Any], candidates: Sequence[Cell]) -> Cell | None:
    """The only candidate, or the one whose grid point agrees with `point`; None when not just one does."""
    if len(candidates) == 1:
        return candidates[0]
    fitting = [c for c in candidates if all(key in point and point[key] == value for key, value in c.point.items())]
    return fitting[0] if len(fitting) == 1 else None


def _short_keys(keys: Iterable[str]) -> dict[str, str]:
    """The last part of each key, or as many as tell it from the others."""
    found: dict[str, str] = {}
    keys = sorted(keys)
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            short = ".".join(parts[-count:])
            if not any(other != key and f".{other}".endswith(f".{short}") for other in keys):
                break
        found[key] = short
    return found


def _safe(value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", value_text(value)).strip("-") or "none"


def resolve(study: StudyConfig, cells: Sequence[Cell]) -> dict[str, RunConfig]:
    """The configuration of each cell by its name; `mstep.steps` of an arm with `equal_flops` is not multiplied yet.

    Raises UserError with one line for each problem; a cell is named when not all have it.
    """
    common = flatten(study.settings)
    configs: dict[str, RunConfig] = {}
    problems: dict[str, list[str]] = {}
    for cell in cells:
        try:
            if cell.arm == BASE and study.base is not None:
                configs[cell.name] = _base_config(study, cell, common)
            elif BASE not in cell.folders or cell.folders[BASE] in configs:
                configs[cell.name] = _config(study, cell, common, configs)
        except UserError as error:
            for line in str(error).splitlines():
                problems.setdefault(line, []).append(cell.name)
    for cell in cells:
        if cell.equal_flops is not None and {cell.name, cell.equal_flops} <= configs.keys():
            for line in _uncomparable(cell, configs[cell.name], configs[cell.equal_flops]):
                problems.setdefault(line, []).append(cell.name)
    if problems:
        tried = len(cells)
        raise UserError(
            "\n".join(
                line if len(names) == tried or tried == 1 else f"cell {names[0]}{_more(names)}: {line}"
                for line, names in problems.items()
            )
        )
    return configs


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _load(study: StudyConfig, cell: Cell, settings: Mapping[str, Any]) -> RunConfig:
    file = None if study.config is None else Path(study.config)
    folders = {arm: str(study.path / CELLS / name) for arm, name in cell.folders.items()} | {SEED: str(cell.seed)}
    values = {key: _replace(value, folders) for key, value in settings.items()}
    own: dict[str, Any] = {"seed": cell.seed, "run_dir": str(cell.folder(study.path))}
    if study.verb == "rlvr":
        own["method"] = "rlvr"
    config = load_config(file, overrides({**values, **own}))
    if study.verb == "rlvr" and not config.rlvr.problems.held_out:
        raise UserError("rlvr.problems.held_out=0: must be at least 1: a study of RLVR compares held-out pass@1")
    return config


def _replace(value: Any, folders: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return PLACEHOLDER.sub(lambda found: folders[found[1]], value)
    return [_replace(item, folders) for item in value] if isinstance(value, list) else value


def _base_config(study: StudyConfig, cell: Cell, common: Mapping[str, Any]) -> RunConfig:
    config = _load(study, cell, {**common, **flatten(study.base or {}), "em.iterations": 0})
    if config.model.hf is not None:
        raise UserError(
            f"base: does not go with model.hf={config.model.hf}, whose weights all cells start from: leave it out"
        )
    return config


def _config(study: StudyConfig, cell: Cell, common: Mapping[str, Any], configs: Mapping[str, RunConfig]) -> RunConfig:
    own = {**flatten(study.arms[cell.arm].settings), **cell.point}
    if BASE not in cell.folders:
        return _load(study, cell, {**common, **own})
    base = cell.folders[BASE]
    start = {"warm_start.checkpoint": f"{{{BASE}}}/checkpoints/warm_start/final", "warm_start.steps": 0}
    tokenizer = configs[base].tokenizer
    given = {f"tokenizer.{key}": value for key, value in tokenizer.model_dump().items()}
    config = _load(study, cell, {**common, **start, **given, **own})
    if same_corpus(config, configs[base]) or tokenizer.path is not None:
        return config
    # another corpus, and the tokenizer that the base's weights were trained with
    trained = {"tokenizer.kind": tokenizer.kind, "tokenizer.path": f"{{{BASE}}}/corpus/tokenizer"}
    return _load(study, cell, {**common, **start, **given, **trained, **own})


def same_corpus(one: RunConfig, other: RunConfig) -> bool:
    """Whether two configurations describe the same corpus."""
    from ra3_megatron.corpus.manifest import config_hash

    return config_hash(one) == config_hash(other)


def _uncomparable(cell: Cell, config: RunConfig, reference: RunConfig) -> list[str]:
    """What makes a step of an M-step cost other FLOPs than one of the reference's."""
    pairs = [
        ("mstep.global_batch_size", config.mstep.global_batch_size, reference.mstep.global_batch_size),
        ("model.context_length", config.model.context_length, reference.model.context_length),
        ("model.num_layers", config.model.num_layers, reference.model.num_layers),
        ("model.hidden_size", config.model.hidden_size, reference.model.hidden_size),
    ]
    lines = [
        f"{key}={value}: with equal_flops it must be that of {cell.equal_flops}, {other}"
        for key, value, other in pairs
        if value != other
    ]
    if config.em.iterations == 0:
        lines.append("em.iterations=0: with equal_flops there must be M-steps")
    return lines
