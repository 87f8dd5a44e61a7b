"""Where the jobs of these tests read and write, and how to wait for what they do."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.run.small_run import CONFIG, write_corpus
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
TINY = ROOT / "slurm" / "ra3_tiny_cpu.sh"
SETTINGS = ("estep.steps=5", "em.iterations=1", "checkpoint.interval=1", "corpus.max_documents=40")


class Site:
    """Submits jobs that write below `folder`."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        source = write_corpus(folder / "code")
        self.config = folder / "small.yaml"
        self.config.write_text(CONFIG.replace("CORPUS", str(source)))

    def submit(
        self, name: str, *settings: str, script: Path = TINY, options: tuple[str, ...] = (), **changes: str
    ) -> str:
        """Submit a job with its output and its run folder called `name`; its number."""
        environment = {"RA3_CONFIG": str(self.config), "RA3_RUN_DIR": str(self.folder / name), "RA3_VENV": sys.prefix}
        environment["RA3_PREFLIGHT"] = "0"  # seconds of each attempt
        environment["RA3_PREFLIGHT_OPTIONS"] = "--arithmetic 0"  # this machine may compute wrong now and then
        options = ("--output", str(self.folder / f"{name}.txt"), "--chdir", "/", *options)
        return self.cluster.submit(script, *settings, options=options, **(environment | changes))

    def output(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text()

    def logs(self, name: str) -> Path:
        return self.folder / f"{name}.logs"


def processes_of(run: Path) -> list[psutil.Process]:
    """The processes of the run's ranks."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(run) in words and "train" in words and not any("srun" in word for word in words[:2]):
            found.append(process)
    return found


def until(what: Callable[[], object], site: Site, name: str, seconds: float = 240) -> None:
    """Wait for `what`; fail with the job's output."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, site.output(name)
        time.sleep(0.1)
