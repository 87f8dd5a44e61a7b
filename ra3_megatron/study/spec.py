"""The YAML file of a study: which runs, over what, compared with which, drawn how.

Everything that can be known without the runs' configuration is checked here; `study/plan.py` checks the rest.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from ra3_megatron.config.base import Section
from ra3_megatron.config.describe import field_of
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.problems import dotted, path_problem, unknown_key
from ra3_megatron.config.yaml_io import dump, parse, parse_override, scalar_text
from ra3_megatron.study.measures import MEASURES
from ra3_megatron.study.settings import flatten

STUDY_FILE = "study.yaml"
"""The resolved study in its folder."""
BASE = "base"
"""Name of the base run, as an arm."""
ITERATION = "iteration"
"""x axis of plots over EM iterations."""
_ARM_KEYS = frozenset({"settings", "after", "equal_flops", "grid"})
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
PLACEHOLDER = re.compile(rf"\{{({_NAME.pattern})\}}")
"""`{arm}` in a text of the settings."""
SEED = "seed"
"""`{seed}` in a text of an arm's settings is the seed of the cell."""


class ArmConfig(Section):
    """One arm: settings of its own, and what it needs of other arms."""

    settings: dict[str, Any] = {}
    """Settings over those of all cells. `{arm}` in a text is the folder of that arm's cell with the same seed, `{seed}`
    the seed."""

    after: list[str] = []
    """Arms whose cell of the same seed must be done before."""

    equal_flops: str | None = None
    """Arm whose FLOPs (E-steps, infusions and M-steps) this arm's M-steps spend: `mstep.steps` is set accordingly."""

    grid: dict[str, list[Any]] = {}
    """Dotted keys and the values that they take in turn; several keys are crossed."""

    @model_validator(mode="before")
    @classmethod
    def _plain_settings(cls, value: Any) -> Any:
        """Plain settings are an arm too; one name stands for a list of it."""
        if value is None:
            return {}
        if not isinstance(value, dict):
            return value
        if not value.keys() & _ARM_KEYS:
            return {"settings": value}
        return {**value, "after": [value["after"]]} if isinstance(value.get("after"), str) else value


class PlotConfig(Section):
    """One figure: measures against a key of the grid, another measure, or the EM iteration."""

    x: str
    """A dotted key of the grid, a measure, or `iteration`."""

    y: list[str] = Field(min_length=1)
    """Measures, one panel each."""

    optimum: bool = False
    """Mark the best point of each panel."""


class StudyConfig(Section):
    """All of a study."""

    name: str = Field(min_length=1)
    """Shown in the report."""

    folder: str = Field(min_length=1)
    """Folder of the study; the cells are below it."""

    verb: Literal["train", "rlvr"] = "train"
    """What runs a cell: `ra3 train` or `ra3 rlvr`."""

    config: str | None = None
    """Configuration that all cells share; none: the defaults."""

    settings: dict[str, Any] = {}
    """Settings over it for all cells, dotted or nested."""

    seeds: list[int] = Field(default=[1], min_length=1)
    """One cell of each arm and grid point for each."""

    base: dict[str, Any] | None = None
    """Settings of a base run that only warm-starts, from whose weights all cells of its seed start; none: every cell
    does its own warm start."""

    shared_base: bool = False
    """One base run, of the first seed, for all seeds."""

    arms: dict[str, ArmConfig] = Field(default={"ra3": ArmConfig()}, min_length=1)
    """Arms by name."""

    grid: dict[str, list[Any]] = {}
    """Grid that is crossed with all arms."""

    reference: str | None = None
    """Arm, or arm and grid point as cells are named (`ra3,latent_price=inf`), that the others are compared with."""

    plots: list[PlotConfig] | None = None
    """Figures; none: every key of the grid."""

    sections: Literal["hopprog", "code"] | None = None
    """Further sections of the report. `hopprog`: gate, ground truth, verdicts of predictions; `code`: thoughts by kind
    of line."""

    @model_validator(mode="before")
    @classmethod
    def _plain_arms(cls, value: Any) -> Any:
        """An arm without settings may be left empty."""
        if isinstance(value, dict) and isinstance(value.get("arms"), dict):
            return {**value, "arms": {name: {} if arm is None else arm for name, arm in value["arms"].items()}}
        return value

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder)

    def grid_of(self, arm: str) -> dict[str, list[Any]]:
        """Keys and values that an arm is crossed with."""
        return {**self.grid, **self.arms[arm].grid}

    def needs(self, arm: str) -> list[str]:
        """Arms (and `base`) whose cells an arm's cells wait for: `after`, `equal_flops` and those named in texts."""
        own = self.arms[arm]
        named = [name for name in placeholders([own.settings, own.grid]) if name != SEED]
        first = [BASE] if self.base is not None else []
        return list(dict.fromkeys([*first, *own.after, *([own.equal_flops] if own.equal_flops else []), *named]))


def placeholders(value: Any) -> list[str]:
    """Names in braces in all texts of settings."""
    if isinstance(value, str):
        return PLACEHOLDER.findall(value)
    if isinstance(value, Mapping):
        return placeholders(list(value.values()))
    return [name for item in value for name in placeholders(item)] if isinstance(value, list) else []


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """The study in a YAML file. Overrides change its own keys (`folder=…`) or settings of all cells (`estep.steps=5`).

    Raises UserError with one line for each problem.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(path_problem(str(path), error).replace("configuration file", "study file")) from error
    values = parse(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}:1: must be a mapping with name, folder, config, arms, …")
    return make_study(values, str(path), overrides)


def make_study(values: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> StudyConfig:
    """The study that parsed YAML describes; `source` stands in front of each line of a UserError."""
    try:
        study = StudyConfig.model_validate(settings_with_overrides(dict(values), overrides, StudyConfig))
    except ValidationError as error:
        lines = [problem_line(details, StudyConfig) for details in error.errors(include_url=False)]
        raise UserError("\n".join(f"{source}: {line}" for line in lines)) from error
    lines = list(_problems(study))
    if lines:
        raise UserError("\n".join(f"{source}: {line}" for line in lines))
    return study


def dump_study(study: StudyConfig) -> str:
    """A study as YAML that `load_study` reads back."""
    return "# A study of ra3: `ra3 study run` of this file goes on with it.\n" + dump(study.model_dump())


def settings_with_overrides(values: dict[str, Any], overrides: Sequence[str], schema: type[Section]) -> dict[str, Any]:
    """Values of a study with overrides on top: keys of `schema`, or settings of all cells. UserError."""
    settings = dict(values["settings"]) if isinstance(values.get("settings"), dict) else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError(f"{override}: is no override; write key=value, such as estep.steps=5 or seeds=[1,2]")
        if key in schema.model_fields and key != "seed":
            values[key] = parse_override(text, override)
        else:
            settings = {**_flat_or_as_is(settings), key: parse_override(text, override)}
    return {**values, "settings": settings} if settings else values


def _flat_or_as_is(settings: dict[str, Any]) -> dict[str, Any]:
    try:
        return flatten(settings)
    except UserError:  # reported with all other problems
        return settings


def problem_line(details: Any, schema: type[Section]) -> str:
    """One line on what pydantic found wrong with a study."""
    key, kind = dotted(details["loc"]), details["type"]
    if kind == "extra_forbidden":
        known = list(ArmConfig.model_fields if key.startswith("arms.") else schema.model_fields)
        close = get_close_matches(key.rsplit(".", 1)[-1], known, n=1)
        if key.startswith("arms."):
            return f"{key}: unknown key beside {', '.join(sorted(_ARM_KEYS))}: put settings of the run under `settings`"
        return f"{key}: unknown key; did you mean {close[0]}?" if close else f"{key}: unknown key of a study"
    if kind == "missing":
        return f"{key}: is missing"
    if kind in ("too_short", "string_too_short"):
        return f"{key}={scalar_text(details['input'])}: must not be empty"
    message = (
        str(details["msg"])
        .replace("Input should be", "must be")
        .replace("a valid integer", "an integer")
        .replace("a valid ", "a ")
    )
    message = message.replace("dictionary", "mapping")
    return f"{key}={scalar_text(details['input'])}: {message[:1].lower() + message[1:]}"


def _problems(study: StudyConfig) -> Iterator[str]:
    if len(set(study.seeds)) < len(study.seeds):
        yield f"seeds={scalar_text(study.seeds)}: the same seed stands twice"
    yield from (f"seeds={seed}: must be at least 0" for seed in study.seeds if seed < 0)
    yield from _settings_problems("settings", study.settings)
    for where, values in (("settings", study.settings), ("base", study.base), ("grid", study.grid)):
        yield from (f"{where}: {{{name}}} can stand in settings of an arm only" for name in placeholders(values))
    if study.base is not None:
        yield from _settings_problems("base", study.base)
        if study.verb == "rlvr":
            yield "base: does not go with verb=rlvr: name each arm's start with rlvr.checkpoint"
    elif study.shared_base:
        yield "shared_base=true: needs `base`, the settings of the base run ({} for none)"
    yield from _grid_problems("grid", study.grid)
    for name, arm in study.arms.items():
        yield from _arm_problems(study, name, arm)
    yield from _cycle_problems(study)
    yield from _plot_problems(study)


def _settings_problems(where: str, settings: Mapping[str, Any]) -> Iterator[str]:
    try:
        flatten(settings)
    except UserError as error:
        yield from (f"{where}.{line}" for line in str(error).splitlines())


def _grid_problems(where: str, grid: Mapping[str, list[Any]]) -> Iterator[str]:
    for key, values in grid.items():
        if field_of(tuple(key.split("."))) is None:
            yield f"{where}.{unknown_key(key)}"
            continue
        yield from _settings_problems(where, {key: values[0] if values else None})
        if not values:
            yield f"{where}.{key}=[]: has no value"
        elif len({scalar_text(value) for value in values}) < len(values):
            yield f"{where}.{key}={scalar_text(values)}: the same value stands twice"


def _arm_problems(study: StudyConfig, name: str, arm: ArmConfig) -> Iterator[str]:
    taken = {SEED: "stands for the seed"} | ({} if study.verb == "rlvr" else {BASE: "is the base run's name"})
    if name in taken or not _NAME.fullmatch(name):
        reason = taken.get(name, "use letters, digits, '_', '.', '+', '-'")
        yield f"arms.{name}: {reason}"
    yield from _settings_problems(f"arms.{name}", arm.settings)
    yield from _grid_problems(f"arms.{name}.grid", arm.grid)
    for other in placeholders([arm.settings, arm.grid]):
        if other == BASE and study.base is None:
            yield f"arms.{name}: {{{BASE}}} needs a base run: set `base` ({{}} for no settings of its own)"
        elif other == name or other not in (BASE, SEED, *study.arms):
            yield f"arms.{name}: {{{other}}} must name another arm ({_others(study, name)})"
    for key, others in (("after", arm.after), ("equal_flops", [arm.equal_flops] if arm.equal_flops else [])):
        for other in others:
            if other not in study.arms or other == name:
                yield f"arms.{name}.{key}={other}: must be another arm ({_others(study, name)})"


def _others(study: StudyConfig, name: str) -> str:
    return ", ".join(arm for arm in study.arms if arm != name) or "there is none"


def _cycle_problems(study: StudyConfig) -> Iterator[str]:
    left = {
        name: {other for other in study.needs(name) if other in study.arms and other != name} for name in study.arms
    }
    while ready := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in ready:
            del left[name]
    if left:
        yield f"arms: {', '.join(left)} wait for each other (after, equal_flops, names in braces)"


def _plot_problems(study: StudyConfig) -> Iterator[str]:
    keys = {key for arm in study.arms for key in study.grid_of(arm)}
    for number, plot in enumerate(study.plots or []):
        if plot.x not in keys | MEASURES.keys() | {ITERATION}:
            known = ", ".join(sorted(keys)) or "there is none"
            yield (
                f"plots[{number}].x={plot.x}: must be a key of the grid ({known}), `{ITERATION}`, or a measure "
                f"({', '.join(MEASURES)})"
            )
        for measure in plot.y:
            if measure not in MEASURES:
                yield f"plots[{number}].y={measure}: must be one of {', '.join(MEASURES)}"
