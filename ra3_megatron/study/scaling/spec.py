"""What a scaling study measures: the options of `ra3 study scaling`, or a YAML file with the same keys."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from ra3_megatron.config.base import Section
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.problems import path_problem
from ra3_megatron.config.yaml_io import dump, parse
from ra3_megatron.scaling.tables import gpu_named
from ra3_megatron.study.scaling.layouts import Family
from ra3_megatron.study.settings import flatten
from ra3_megatron.study.spec import problem_line, settings_with_overrides

SCALING_FILE = "scaling.yaml"
"""The study in its folder."""
MEASURE = "measure"
"""As `gpu`: the device is described by what the cells measure of it."""
CONFIGURED = "as_configured"
"""Name of the only size where none is given."""


class ScalingConfig(Section):
    """All of a scaling study."""

    name: str = Field(default="scaling", min_length=1)
    """Shown in the report."""

    folder: str = Field(min_length=1)
    """Folder of the study; the cells are below it."""

    config: str | None = None
    """Configuration of `ra3 train` that all cells share; none: the defaults."""

    settings: dict[str, Any] = {}
    """Settings over it for all cells, dotted or nested."""

    processes: list[int] = Field(min_length=1)
    """Numbers of processes (on GPU nodes: of GPUs)."""

    layouts: list[str] = Field(default=["data"], min_length=1)
    """Layouts: keys of `parallel` with values, and the size that grows with the number of processes without one:
    `data`, `tensor`, `tensor=2,pipeline` (none named: `data` grows). `micro_batch=1` sets rows a forward pass."""

    sizes: dict[str, dict[str, Any]] = {}
    """Models by name: settings, where `num_layers` stands for `model.num_layers`; none: the configuration's model."""

    mode: Literal["strong", "weak", "both"] = "both"
    """`strong`: the same rows a step at every number of processes; `weak`: rows grow with the processes."""

    batch: int | None = Field(default=None, ge=1)
    """Rows a step: of strong scaling, and of weak scaling at the smallest number of processes; none:
    `warm_start.global_batch_size`."""

    steps: int = Field(default=12, ge=1)
    """Steps that are measured."""

    warmup: int = Field(default=3, ge=0)
    """Steps before them."""

    repeats: int = Field(default=3, ge=1)
    """Cells of each point, one after another, each in processes of its own."""

    rows: Literal["full", "corpus"] = "full"
    """`full`: every row is one generated document of `model.context_length` tokens, as the planner takes it;
    `corpus`: packed documents of the corpus, as a run reads them."""

    estep: int = Field(default=0, ge=0)
    """E-step updates that are measured as well, behind one that is not."""

    gpu: str = Field(default=MEASURE, min_length=1)
    """What the prediction is for: a name or file as of `ra3 plan --gpu`, or `measure`."""

    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each process, at every number of processes; none: cores / the most processes of a node here, and 1
    with Slurm."""

    processes_per_node: int | None = Field(default=None, ge=1)
    """Processes of a node; none: all of them on one node."""

    sbatch: list[str] = []
    """Further options of sbatch, such as --partition=gpu or --gpus-per-node=8."""

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.folder)

    @property
    def sized(self) -> dict[str, dict[str, Any]]:
        """Dotted settings of each size."""
        sizes = self.sizes or {CONFIGURED: {}}
        return {name: flatten({_model_key(key): v for key, v in given.items()}) for name, given in sizes.items()}

    @property
    def families(self) -> list[Family]:
        """The layouts, parsed."""
        return [Family.parse(text) for text in self.layouts]

    def on_nodes(self, processes: int) -> tuple[int, int]:
        """Nodes, and processes of each."""
        each = min(processes, self.processes_per_node or processes)
        return processes // each, each


def make_scaling(values: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> ScalingConfig:
    """The study that these keys describe; `source` stands in front of lines of a UserError about them."""
    try:
        study = ScalingConfig.model_validate(settings_with_overrides(dict(values), overrides, ScalingConfig))
    except ValidationError as error:
        lines = [problem_line(details, ScalingConfig) for details in error.errors(include_url=False)]
        raise UserError("\n".join(f"{source}: {line}" for line in lines)) from error
    lines = list(_problems(study))
    if lines:
        raise UserError("\n".join(f"{source}: {line}" for line in lines))
    return study


def is_scaling_file(path: Path) -> bool:
    """Whether a YAML file is a scaling study, and not a configuration of a run: it says `processes`. UserError."""
    return "processes" in _read(path)


def load_scaling(path: Path, changes: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> ScalingConfig:
    """The study in a file, with `changes` of its keys and overrides on top. UserError with a line for each problem."""
    return make_scaling({**_read(path), **(changes or {})}, str(path), overrides)


def dump_scaling(study: ScalingConfig) -> str:
    """YAML that `load_scaling` reads back."""
    return "# A scaling study of ra3: `ra3 study scaling` of this file goes on with it.\n" + dump(study.model_dump())


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(path_problem(str(path), error)) from error
    values = parse(text, str(path))
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{path}:1: must be a mapping of keys")
    return values or {}


def _model_key(key: str) -> str:
    """`num_layers` as `model.num_layers`."""
    from ra3_megatron.config.model import ModelConfig

    return f"model.{key}" if key in ModelConfig.model_fields else key


def _problems(study: ScalingConfig) -> Iterator[str]:
    if len(set(study.processes)) < len(study.processes) or min(study.processes) < 1:
        yield f"processes={study.processes}: must be different numbers, each at least 1"
    each = study.processes_per_node
    for number in study.processes if each is not None else []:
        if number > each and number % each:  # type: ignore[operator]
            yield f"processes={number}: more than a node and no multiple of processes_per_node={each}"
    for where, make in (("settings", lambda: flatten(study.settings)), ("sizes", lambda: study.sized)):
        try:
            make()
        except UserError as error:
            yield from (f"{where}: {line}" for line in str(error).splitlines())
    for text in study.layouts:
        try:
            family = Family.parse(text)
        except UserError as error:
            yield str(error)
            continue
        if not any(family.at(number) for number in study.processes):
            yield f"layouts: {text}: fits none of {', '.join(map(str, study.processes))} processes"
    if study.gpu != MEASURE:
        try:
            gpu_named(study.gpu)
        except UserError as error:
            yield f"{error}, or {MEASURE}"
