"""A scaling study under Slurm: an array for each number of nodes, and a cell's processes as a job step.

The batch script of a task runs `ra3 study scaling FILE --cell INDEX`, which starts the cell with srun on all nodes of
the task. Nodes are asked for whole (`--exclusive`), as a measurement must not share them.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.study.plan import Cell
from ra3_megatron.study.scaling.spec import ScalingConfig
from ra3_megatron.study.slurm import array_text, log_pattern

SCRIPT = "scaling.sbatch"


@dataclass(frozen=True)
class Group:
    """Cells that ask for the same nodes."""

    nodes: int
    each: int
    """Processes of a node."""
    cells: list[int]
    """Their numbers."""


def render_script(scaling: ScalingConfig, study_file: Path, folder: Path) -> str:
    """The text of the batch script."""
    template = resources.files("ra3_megatron.report").joinpath("templates", SCRIPT).read_text(encoding="utf-8")
    return (
        Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
        .from_string(template)
        .render(
            name=re.sub(r"[^A-Za-z0-9_.-]+", "-", scaling.name),
            log=log_pattern(folder),
            study=shlex.quote(str(study_file)),
        )
    )


def groups(
    scaling: ScalingConfig, cells: Sequence[Cell], configs: Mapping[str, RunConfig], done: Sequence[str] = ()
) -> list[Group]:
    """Cells by the nodes that they need, fewest first; without those that are done."""
    found: dict[tuple[int, int], list[int]] = {}
    for number, cell in enumerate(cells):
        if cell.name not in done:
            nodes = scaling.on_nodes(configs[cell.name].parallel.world_size)
            found.setdefault(nodes, []).append(number)
    return [Group(nodes, each, found[nodes, each]) for nodes, each in sorted(found)]


def command_of(script: Path, group: Group, threads: int, further: Sequence[str]) -> list[str]:
    """The sbatch command of one array."""
    nodes = [f"--nodes={group.nodes}", f"--ntasks-per-node={group.each}", f"--cpus-per-task={threads}"]
    return ["sbatch", "--parsable", f"--array={array_text(group.cells)}", *nodes, *further, str(script)]


def submit(commands: Sequence[Sequence[str]]) -> list[str]:
    """Submit the arrays; their job numbers. UserError when sbatch refuses one."""
    jobs = []
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            said = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()[-1]
            raise UserError(f"{shlex.join(command)}: exit code {result.returncode}: {said}")
        jobs.append(result.stdout.strip().partition(";")[0])
    return jobs


def in_batch_job() -> bool:
    """Whether this process is the batch script of a Slurm job, which starts processes with srun."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ


def step_command(command: Sequence[str], nodes: int, each: int, threads: int) -> list[str]:
    """`command` in nodes * each processes of this job. They meet at the address that Slurm has for its first node."""
    names = _slurm("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    about = _slurm("scontrol", "show", "node", names[0], "-o")
    address = re.search(r"\bNodeAddr=(\S+)", about)
    if address is None:
        raise UserError(f"scontrol show node {names[0]}: tells no NodeAddr: set MASTER_ADDR")
    meeting = {
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", address[1]),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000)),
        "LOCAL_WORLD_SIZE": str(each),
    }
    tasks = [f"--nodes={nodes}", f"--ntasks={nodes * each}", f"--ntasks-per-node={each}", f"--cpus-per-task={threads}"]
    return ["env", *(f"{k}={v}" for k, v in meeting.items()), "srun", "--kill-on-bad-exit=1", *tasks, *command]


def _slurm(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{shlex.join(command)}: exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout
