"""Launch scripts on a real Slurm: whatever happens to a job, its numbers are those of one that nothing happened to."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.disk import small_disk
from tests.run.small_run import CONFIG, metrics, write_corpus
from tests.slurm.cluster import Cluster, missing_programs, start, stop

ROOT = Path(__file__).parents[2]
TINY = ROOT / "slurm" / "ra3_tiny_cpu.sh"
SETTINGS = ("estep.steps=5", "em.iterations=1", "checkpoint.interval=1", "corpus.max_documents=40")

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"needs Debian's packages slurm-wlm and munge (make install-slurm): no {', '.join(missing)}")
    running = start(tmp_path_factory.mktemp("slurm") / "cluster")
    yield running
    stop(running)


class Site:
    """Where jobs of these tests read and write."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        source = write_corpus(folder / "code")
        self.config = folder / "small.yaml"
        self.config.write_text(CONFIG.replace("CORPUS", str(source)))

    def submit(self, name: str, *settings: str, options: tuple[str, ...] = (), **changes: str) -> str:
        environment = {"RA3_CONFIG": str(self.config), "RA3_RUN_DIR": str(self.folder / name), "RA3_VENV": sys.prefix}
        options = ("--output", str(self.folder / f"{name}.txt"), "--chdir", "/", *options)
        return self.cluster.submit(TINY, *settings, options=options, **(environment | changes))

    def output(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text()

    def logs(self, name: str) -> Path:
        return self.folder / f"{name}.logs"


@pytest.fixture(scope="module")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(cluster, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def calm(site: Site) -> list[dict[str, object]]:
    """Metrics of a job that nothing happens to, submitted from another folder than the checkout."""
    job = site.submit("calm", *SETTINGS)
    assert site.cluster.wait(job)["JobState"] == "COMPLETED", site.output("calm")
    assert "4 processes" in site.output("calm") and "finished: " in site.output("calm")
    assert (site.logs("calm") / "latest" / "rank-3.txt").is_file()
    return metrics(site.folder / "calm")


def processes_of(run: Path) -> list[psutil.Process]:
    """The processes of the run's ranks."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(run) in words and "train" in words and not any("srun" in word for word in words[:2]):
            found.append(process)
    return found


def until(what: Callable[[], object], site: Site, name: str, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, site.output(name)
        time.sleep(0.1)


def test_a_job_survives_requeue_signals_and_a_killed_rank(site: Site, calm: list[dict[str, object]]) -> None:
    """It is asked to stop in the warm start, requeued by the administrator in the E-step, and then a rank is killed.
    Its metrics are those of the calm job."""
    run = site.folder / "stormy"
    job = site.submit("stormy", *SETTINGS)

    def saved(phase: str, step: int) -> Callable[[], bool]:
        return lambda: any(
            int(path.name.removeprefix("step_")) >= step
            for path in (run / "checkpoints" / phase).glob("step_??????")
            if (path / "checkpoint.json").is_file()
        )

    until(saved("warm_start", 5), site, "stormy")
    site.cluster.run("scancel", "--batch", "--signal=USR1", job)
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
    assert "SIGUSR1: asking the run to save and stop" in output and "requeueing: stopped by SIGUSR1" in output
    assert "attempt 3 failed with exit code" in output and output.count("finished: ") == 1
    assert (site.logs("stormy") / "latest").readlink().name == "attempt-004"
    first = (site.logs("stormy") / "attempt-001" / "rank-0.txt").read_text()
    assert "ra3: stopped by SIGUSR1: saved behind step" in first
    assert metrics(run) == calm


def test_scancel_with_a_signal_saves_and_requeues(site: Site) -> None:
    run = site.folder / "signalled"
    settings = ("em.iterations=0", "warm_start.steps=40", "corpus.max_documents=40")
    job = site.submit("signalled", *settings)
    until(lambda: (run / "metrics.jsonl").is_file() and len(metrics(run)) > 2, site, "signalled")
    site.cluster.run("scancel", "--signal=TERM", job)  # to the processes, not to the batch shell
    assert site.cluster.wait(job)["JobState"] == "COMPLETED", site.output("signalled")
    assert "requeueing: the run was asked to stop" in site.output("signalled")
    steps = [record["step"] for record in metrics(run) if record["phase"] == "warm_start"]
    assert steps == list(range(1, 41))


def test_retries_are_bounded_and_a_mistake_is_not_retried(site: Site) -> None:
    job = site.submit("mistake", "estep.stepps=3")
    assert site.cluster.wait(job)["ExitCode"] == "2:0"
    assert "a mistake that no retry mends" in site.output("mistake")
    assert "estep.stepps" in (site.logs("mistake") / "latest" / "rank-0.txt").read_text()
    broken = site.folder / "broken" / "bin"
    broken.mkdir(parents=True)
    (broken / "ra3").write_text("#!/bin/sh\nexit 3\n")
    (broken / "ra3").chmod(0o755)
    job = site.submit("broken_job", RA3_VENV=str(broken.parent), RA3_RETRIES="1")
    assert site.cluster.wait(job)["JobState"] == "FAILED"
    assert "no attempts are left" in site.output("broken_job")
    assert sorted(path.name for path in site.logs("broken_job").glob("attempt-*")) == ["attempt-001", "attempt-002"]


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
    until(lambda: site.cluster.job(job)["Restarts"] == "1", site, "limited")
    first = (site.logs("limited") / "attempt-001" / "rank-0.txt").read_text()
    (saved,) = re.findall(r"^ra3: stopped by SIGUSR1: saved behind step (\d+) of warm_start;", first, re.MULTILINE)
    site.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    until(lambda: metrics(run)[-1]["step"] > int(saved), site, "limited")
    site.cluster.run("scancel", job)
    assert "SIGUSR1: asking the run to save and stop" in site.output("limited")
    assert [line["step"] for line in metrics(run)] == list(range(1, len(metrics(run)) + 1)), (
        "no step twice, none left out"
    )


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
