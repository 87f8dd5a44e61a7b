"""A study as Slurm job arrays: one task a cell, arrays that wait for each other where cells do.

The script is the same for all arrays; a task runs `ra3 study run STUDY --cell INDEX`. An array waits with `afterany`:
a failed cell stops only the cells that need it, and these say so themselves.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.study.plan import Cell

SCRIPT = "study.sbatch"


def render_script(name: str, study_file: Path, folder: Path, configs: Mapping[str, RunConfig]) -> str:
    """The text of the batch script."""
    template = resources.files("ra3_megatron.report").joinpath("templates", "study.sbatch").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return environment.from_string(template).render(
        name=re.sub(r"[^A-Za-z0-9_.-]+", "-", name),
        processes=max(config.parallel.world_size for config in configs.values()),
        log=log_pattern(folder),
        study=shlex.quote(str(study_file)),
    )


def log_pattern(folder: Path) -> str:
    """Where the tasks of an array write, as a directive of a batch script reads it: `%` of the folder is none of
    Slurm's, and quotes hold what a shell's would."""
    return shlex.quote(str(folder).replace("%", "%%") + "/slurm-%A_%a.txt")


def arrays(cells: Sequence[Cell]) -> list[list[int]]:
    """Indices of the cells by depth: those that wait for nothing, those that wait for these, …"""
    depth: dict[str, int] = {}
    for cell in cells:
        depth[cell.name] = 1 + max((depth[name] for name in cell.after), default=-1)
    levels = sorted(set(depth.values()))
    return [[i for i, cell in enumerate(cells) if depth[cell.name] == level] for level in levels]


def array_text(indices: Sequence[int]) -> str:
    """Indices as sbatch reads them: `0-2,5`."""
    parts = []
    for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        parts.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return ",".join(parts)


def check_size(cells: int) -> None:
    """UserError when this cluster's arrays cannot have so many indices: before any of them is submitted."""
    try:
        done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=False)
    except OSError:  # sbatch will say what it does not take
        return
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", done.stdout, re.MULTILINE)
    if found and cells > int(found[1]):
        raise UserError(
            f"--slurm: {cells} cells, and job arrays of this cluster have at most {found[1]} (MaxArraySize of "
            "slurm.conf): use fewer cells a study"
        )


def command_of(script: Path, indices: Sequence[int], after: str | None) -> list[str]:
    """The sbatch command of one array. after: the job that it waits for."""
    wait = [] if after is None else [f"--dependency=afterany:{after}"]
    return ["sbatch", "--parsable", f"--array={array_text(indices)}", *wait, str(script)]


def submit(script: Path, levels: Sequence[Sequence[int]]) -> list[str]:
    """Submit the arrays; their job numbers. UserError when sbatch refuses one."""
    jobs: list[str] = []
    for indices in levels:
        command = command_of(script, indices, jobs[-1] if jobs else None)
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            said = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()[-1]
            raise UserError(f"{shlex.join(command)}: exit code {result.returncode}: {said}")
        jobs.append(result.stdout.strip().partition(";")[0])
    return jobs


def by_hand(script: Path, levels: Sequence[Sequence[int]]) -> str:
    """Shell lines that submit the arrays."""
    lines = []
    for number, indices in enumerate(levels):
        command = shlex.join(command_of(script, indices, None if number == 0 else "JOB"))
        lines.append(f"job=$({command})".replace("afterany:JOB", '"afterany:$job"' if number else ""))
    return "\n".join(lines)


def has_sbatch() -> bool:
    """Whether jobs can be submitted from here."""
    return shutil.which("sbatch") is not None
