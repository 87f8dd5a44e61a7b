"""A job script of `slurm/`, before it is submitted: what sbatch will be asked for, and what the job will run.

The script itself says what it runs: it is called with RA3_RENDER, as the batch shell would call it, and `body.sh`
prints its settings instead of starting anything. So nothing here repeats what the scripts decide.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ra3_megatron.config.errors import UserError

_DIRECTIVE = re.compile(r"^#SBATCH\s+--([a-z-]+)(?:[= ](\S+))?\s*$", re.MULTILINE)
_FOLDER = Path(__file__).parents[2] / "slurm"
"""Of a checkout."""
_BODY = re.compile(r"^\s*(?:\.|source)\s.*\bslurm/body\.sh\b", re.MULTILINE)
"""The line by which a script hands over to `body.sh`. A script without it would do its work when it is asked."""


@dataclass(frozen=True)
class Job:
    """A script with what it asks Slurm for and what it runs."""

    script: Path
    options: dict[str, str]
    """Options of sbatch, without dashes: those of the script, then those given."""
    verb: str
    """What of ra3 it runs: train or rlvr."""
    config: Path
    settings: list[str]
    """Overrides of the configuration, the script's and the user's."""
    run_dir: str
    trainers: int
    """Processes that train."""
    train_nodes: int
    rollout_nodes: int
    """Nodes that run vLLM alone."""
    srun: str
    """How processes are started."""

    @property
    def gpus_per_node(self) -> int:
        """GPUs that are asked for on each node; 0 for a CPU job."""
        typed = ",".join(f"gpu:{item}" for item in filter(None, self.options.get("gpus-per-node", "").split(",")))
        return gpus_in(typed) or gpus_in(self.options.get("gres", ""))

    def command(self) -> str:
        """What every attempt starts."""
        words = shlex.join(["ra3", self.verb, str(self.config), "--resume", "--run-dir", self.run_dir, *self.settings])
        return f"{self.srun} --nodes={self.train_nodes} --ntasks={self.trainers} {words}"


def gpus_in(resources: str) -> int:
    """GPUs among the generic resources that sbatch is asked for: NAME[:TYPE][:COUNT][(…)], separated by commas. One
    without a count is one."""
    counts = []
    for item in re.sub(r"\([^)]*\)", "", resources).split(","):
        name, *words = item.strip().removeprefix("gres/").removeprefix("gres:").split(":")
        if name == "gpu":
            counts.append(next((int(word) for word in reversed(words) if word.isdecimal()), 1))
    return sum(counts)


def find_script(name: str) -> Path:
    """A script by its path, or by its name in `slurm/` of the checkout (`8b`, `ra3_8b`). Raises UserError."""
    tried = [Path(name), _FOLDER / name, *(_FOLDER / f"{prefix}{name}.sh" for prefix in ("", "ra3_"))]
    for path in tried:
        if path.is_file():
            return path.resolve()
    known = sorted(path.stem for pattern in ("ra3_*.sh", "rlvr_*.sh") for path in _FOLDER.glob(pattern))
    raise UserError(f"{name}: no such job script; {'there are ' + ', '.join(known) if known else 'give its path'}")


def read_job(script: Path, options: Mapping[str, str], arguments: Sequence[str]) -> Job:
    """What `sbatch OPTIONS script ARGUMENTS` would run. Raises UserError with what the script says is wrong."""
    try:
        text = script.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{script}: is no text in UTF-8: a job script of slurm/ is expected") from error
    if not _BODY.search(text):
        raise UserError(
            f"{script}: is no job script that trains: it does not source slurm/body.sh; sbatch takes it as it is"
        )
    asked = directives(text) | _from_environment() | dict(options)
    name = asked.get("job-name", script.stem)
    environment = os.environ | {
        "RA3_RENDER": "1",
        "RA3_SCRIPT": str(script),
        "SLURM_JOB_NAME": name,
        "SLURM_JOB_ID": "JOB",
        "SLURM_JOB_NUM_NODES": asked.get("nodes", "1"),
        "SLURM_NTASKS_PER_NODE": asked.get("ntasks-per-node", "1"),
    }
    for key in ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS_PER_NODE"):
        if not environment[key].isdecimal():
            raise UserError(f"{script.name}: {key.removeprefix('SLURM_').lower()}={environment[key]}: must be a number")
    command = ["bash", str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        why = said[-1].split("  ", 1)[-1] if said else "failed without a message"  # behind the time
        raise UserError(f"{script.name}: {why}")
    values: dict[str, str] = {}
    settings: list[str] = []
    for item in filter(None, done.stdout.split("\0")):
        key, _, value = item.partition("=")
        if key == "setting":
            settings.append(value)
        else:
            values[key] = value
    missing = {"verb", "config", "run_dir", "trainers", "train_nodes", "rollout_nodes", "srun", "home"} - values.keys()
    if missing:
        raise UserError(f"{script}: slurm/body.sh did not say what it runs: {', '.join(sorted(missing))} missing")
    return Job(
        script=script,
        options=asked,
        verb=values["verb"],
        config=Path(values["home"]) / values["config"],
        settings=settings,
        run_dir=values["run_dir"],
        trainers=int(values["trainers"]),
        train_nodes=int(values["train_nodes"]),
        rollout_nodes=int(values["rollout_nodes"]),
        srun=values["srun"],
    )


def directives(text: str) -> dict[str, str]:
    """The `#SBATCH --key=value` lines of a script; "" for a key without a value."""
    return {key: value or "" for key, value in _DIRECTIVE.findall(text)}


def render(job: Job) -> str:
    """The script with the options that will hold: those it has are replaced, others are added below them."""
    text = job.script.read_text(encoding="utf-8")
    own = directives(text)

    def line(key: str) -> str:
        return f"#SBATCH --{key}" + (f"={job.options[key]}" if job.options[key] else "")

    text = _DIRECTIVE.sub(lambda match: line(match[1]), text)
    more = [line(key) for key in job.options if key not in own]
    if more:
        last = list(_DIRECTIVE.finditer(text))[-1].end() if own else text.index("\n")
        text = text[:last] + "\n" + "\n".join(more) + text[last:]
    return text


def submit(job: Job, options: Mapping[str, str], arguments: Sequence[str]) -> str:
    """Submit the job; its number. Raises UserError when sbatch refuses it."""
    given = [f"--{key}={value}" if value else f"--{key}" for key, value in options.items()]
    command = ["sbatch", "--parsable", *given, str(job.script), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError("there is no sbatch here: --dry-run shows what would run") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise UserError(f"{shlex.join(command)}: {said}")
    return done.stdout.strip().partition(";")[0]


def _from_environment() -> dict[str, str]:
    """Options that sbatch reads from the environment, of those that people set there."""
    names = ("partition", "account", "qos", "constraint", "reservation", "timelimit")
    found = {name: os.environ.get(f"SBATCH_{name.upper()}") for name in names}
    return {"time" if name == "timelimit" else name: value for name, value in found.items() if value}
