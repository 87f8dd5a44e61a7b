"""RLVR as a Slurm job: stopped before its time limit and requeued, it ends with the numbers of an undisturbed run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluate.made import ADD, write_rows
from tests.run.small_run import metrics
from tests.slurm.site import ROOT, Site, until

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
SLURM = ROOT / "slurm"


def test_slurm_takes_the_script(site: Site) -> None:
    command = ["sbatch", "--test-only", "--partition=gpu", str(SLURM / "rlvr_8b.sh")]
    done = subprocess.run(command, env=site.cluster.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "using 512 processors on nodes gpu[1-4] in partition gpu" in done.stderr, (
        done.stderr
    )


RA3 = Path(sys.prefix) / "bin" / "ra3"


@pytest.fixture(scope="module")
def checkpoint(site: Site) -> Path:
    """A model that has been trained a little."""
    run = site.folder / "start"
    words = ("warm_start.steps=12", "em.iterations=0", "evaluation.documents=2", f"run_dir={run}")
    subprocess.run([RA3, "train", site.config, *words], check=True, capture_output=True, timeout=300)
    return run / "checkpoints" / "warm_start" / "final"


@pytest.mark.extended
def test_a_stopped_job_goes_on(site: Site, checkpoint: Path) -> None:
    problems = site.folder / "problems.jsonl"
    rows = [
        {"name": str(n), "prompt": f"def f():\n    return {n}", "tests": ["assert f() == f()"], "stop": ["\n"]}
        for n in range(8)
    ]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        *("rlvr.problems.source=jsonl", "rlvr.problems.held_out=2", "rlvr.steps=8", "rlvr.problems_per_step=2"),
        *("rlvr.group_size=2", "rlvr.max_response_tokens=8", "rlvr.micro_batch_size=1", "rlvr.limits.workers=1"),
        "checkpoint.interval=1",
    )
    whole = site.folder / "whole"
    alone = (f"rlvr.problems.path={problems}", f"rlvr.checkpoint={checkpoint}", "parallel.data=2", f"run_dir={whole}")
    subprocess.run([RA3, "rlvr", site.config, *settings, *alone], check=True, capture_output=True, timeout=300)
    run = site.folder / "rlvr"
    job = site.submit(
        "rlvr",
        *settings,
        script=SLURM / "rlvr_tiny_cpu.sh",
        RA3_CHECKPOINT=str(checkpoint),
        RA3_PROBLEMS=str(problems),
        RA3_PREFLIGHT="1",
    )
    until(lambda: (run / "checkpoints" / "rlvr").is_dir(), site, "rlvr")
    assert "sandbox" in (site.logs("rlvr") / "latest" / "preflight-0.txt").read_text()
    site.cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert site.cluster.wait(job)["JobState"] == "COMPLETED", site.output("rlvr")
    output = site.output("rlvr")
    assert "2 processes" in output and "requeueing: stopped by SIGUSR1" in output and output.count("finished: ") == 1
    assert metrics(run) == metrics(whole)


def test_an_evaluation_is_a_job(site: Site, checkpoint: Path) -> None:
    """The same samples as without Slurm."""
    data = write_rows(site.folder / "benchmarks" / "livecodebench" / "made.jsonl", [ADD]).parent.parent
    suite = ("--suite", "livecodebench", "--checkpoint", checkpoint, "--data", data, "--max-new-tokens", "12")
    alone, out = site.folder / "evaluated-alone", site.folder / "evaluated"
    subprocess.run([RA3, "eval", *suite, "--out", alone], check=True, capture_output=True, timeout=300)
    words = map(str, (*suite, "--out", out))
    options = ("--cpus-per-task=1", "--gres=none", "--time=30")
    job = site.submit("eval", *words, script=SLURM / "eval.sh", options=options)
    assert site.cluster.wait(job)["JobState"] == "COMPLETED", site.output("eval")
    assert "livecodebench (1)" in site.output("eval") and (out / "results.json").is_file()
    name = Path("samples") / "livecodebench-think.jsonl"
    assert (out / name).read_text() == (alone / name).read_text() and len((out / name).read_text().splitlines()) == 2
