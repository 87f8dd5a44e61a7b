"""What slurm/body.sh does when Slurm refuses or somebody asks; srun, scontrol and ra3 are scripts of this test."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOB = f"""
RA3_SCRIPT={ROOT}/slurm/ra3_tiny_cpu.sh
CONFIG=examples/quickstart.yaml SETTINGS=(parallel.pipeline=2) ARGUMENTS=()
BEFORE
. {ROOT}/slurm/body.sh
"""
SCONTROL = """
case "$1 $2" in
"show hostnames") echo n1 ;;
"show node") echo "NodeName=n1 NodeAddr=127.0.0.1 Port=1" ;;
"show job") echo "JobId=7 JobName=x JobState=RUNNING Restarts=0 Command=/x" ;;
"requeue 7") REQUEUE ;;
esac
"""
SRUN = """
for word in "$@"; do case $word in --output=*) out=${word#--output=}; out=${out//%t/0} ;; esac; done
case "$*" in *"ra3 engines"*)
  all=$*; echo "engines ${SRUN_CPUS_PER_TASK:-none}, ${all##*--engines-per-node } a node" >"$out"; exec sleep 60 ;;
esac
THE_STEP
"""
STOPPED = """echo "stopped by SIGUSR1: saved" >"$out"; exit 75"""


def job(
    folder: Path, run: str, requeue: str = "true", before: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a job in whose place `run` is what srun starts; `requeue` is what becomes of a requeue."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    scripts = {"scontrol": SCONTROL.replace("REQUEUE", requeue), "srun": SRUN.replace("THE_STEP", run), "ra3": "exit 0"}
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    script = folder / "job.sh"
    script.write_text(JOB.replace("BEFORE", before))
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RA3_", "SRUN_"))},
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "x",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_CPUS_PER_TASK": "3",
        "RA3_RUN_DIR": str(folder / "run"),
        "RA3_PREFLIGHT": "0",
        "RA3_RETRIES": "0",
        "RA3_VENV": "/nowhere",
        "RA3_GRACE": "5",
        **environment,
    }
    command = ["bash", str(script)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("requeue", "code"), [("true", 0), ("false", 1)])
def test_a_stopped_run_that_slurm_does_not_requeue_has_not_succeeded(requeue: str, code: int, tmp_path: Path) -> None:
    done = job(tmp_path, STOPPED, requeue)
    assert done.returncode == code, done.stdout + done.stderr
    assert "requeueing: the run was asked to stop" in done.stdout
    assert ("this job may not be requeued: submit it again with RA3_RUN_DIR=" in done.stdout) == (code == 1)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("ra3: interrupted", 1),
        ("ra3: rollout.engine=vllm: it died; the same command with --resume goes on", 1),
        ("ra3: model.hf=/nowhere: no such folder", 2),
    ],
)
def test_what_is_a_mistake(line: str, code: int, tmp_path: Path) -> None:
    done = job(tmp_path, f'echo "{line}" >"$out"; exit 1')
    assert done.returncode == code, done.stdout + done.stderr
    assert ("no attempts are left" in done.stdout) == (code == 1)


def test_a_job_has_its_own_retries_whatever_failed_before_it(tmp_path: Path) -> None:
    """Through all its requeues; one that is submitted again with the same run folder has new ones."""
    said = [job(tmp_path, "exit 1", RA3_RETRIES="1", SLURM_JOB_ID=number).stdout for number in ("7", "7", "8")]
    failed = [
        [line.split("exit code ")[1].split(":")[0] for line in text.splitlines() if "failed" in line] for text in said
    ]
    assert failed == [["1 (1 of 2)", "1 (2 of 2)"], ["1 (3 of 2)"], ["1 (1 of 2)", "1 (2 of 2)"]]


@pytest.mark.parametrize(
    ("signal", "save", "codes"),
    [
        ("USR1", "", [0, 0, 0, 1]),
        (
            "USR1",
            'mkdir -p "$RA3_RUN_DIR/checkpoints/$$" && touch "$RA3_RUN_DIR/checkpoints/$$/checkpoint.json"',
            [0] * 5,
        ),
        ("TERM", "", [0] * 5),
    ],
    ids=["nothing saved", "something saved", "preempted"],
)
def test_a_time_limit_that_is_too_short_is_not_tried_for_ever(
    signal: str, save: str, codes: list[int], tmp_path: Path
) -> None:
    """Start-up alone takes longer, or `--signal` leaves nothing of it."""
    run = (
        f"trap 'exit 75' USR1; {save or 'true'}; kill -{signal} $PPID; for i in {{1..300}}; do sleep 0.02; done; exit 1"
    )
    for code in codes:
        done = job(tmp_path, run, RA3_GRACE="1")
        assert done.returncode == code, done.stdout + done.stderr
        assert (f"requeueing: stopped by SIG{signal}" in done.stdout) == (code == 0)
    assert ("nothing was saved within the time limit, four times in a row" in done.stdout) == (codes[-1] == 1)


def test_what_is_wrong_on_another_node_is_shown(tmp_path: Path) -> None:
    run = """touch "$out"; echo "ra3: rank 8: model.hf=/scratch/m: no such folder" >"${out%0.txt}8.txt"; exit 137"""
    done = job(tmp_path, run)
    assert "\nra3: rank 8: model.hf=/scratch/m: no such folder\n" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 1 and "attempt 1 failed with exit code 137" in done.stdout


def test_a_signal_that_comes_before_the_run_has_started_is_passed_on(tmp_path: Path) -> None:
    """Between the last look for it and the moment from which there is a process to pass it on to."""
    at_once = """set -T; trap '[[ $BASH_COMMAND == "STEP=\\$!" ]] && sleep 1 && kill -USR1 $$' DEBUG"""
    wait = f"""trap '{STOPPED}' USR1; for i in {{1..300}}; do sleep 0.1; done; exit 1"""
    done = job(tmp_path, wait, before=at_once)
    assert "requeueing: stopped by SIGUSR1 (exit code 75)" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0


def test_processes_get_the_cpus_that_the_job_asks_for(tmp_path: Path) -> None:
    """An engine's only process on a node gets them all."""
    run = 'echo "trainer $SRUN_CPUS_PER_TASK" >"$out"; sleep 0.5; exit 0'
    done = job(tmp_path, run, RA3_ROLLOUT_NODES="1")
    assert done.returncode == 0, done.stdout + done.stderr
    logs = tmp_path / "run.logs" / "attempt-001"
    assert (logs / "rank-0.txt").read_text() == "trainer 3\n"
    assert (logs / "engines-0.txt").read_text() == "engines none, 2 a node\n"
