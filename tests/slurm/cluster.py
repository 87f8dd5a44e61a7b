"""A real Slurm of two nodes on this machine, from Debian's packages, in a folder of its own.

No system service and no configuration outside of the folder. The nodes are two slurmd of this host; their names do not
resolve, as on many a cluster's login node.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
STATES_OF_THE_END = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
CONFIG = """
ClusterName=ra3
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CryptoType=crypto/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=60
MessageTimeout=30
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
MinJobAge=3600
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs=4 RealMemory=4000
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=60
SuspendExcNodes=n[1-2]
NodeName=gpu[1-16] NodeAddr=127.0.0.1 CPUs=128 RealMemory=2000000 Gres=gpu:8 State=CLOUD
PartitionName=cpu Nodes=n[1-2] Default=YES MaxTime=60 State=UP OverSubscribe=FORCE:8
PartitionName=gpu Nodes=gpu[1-16] MaxTime=UNLIMITED State=UP
"""


def missing_programs() -> list[str]:
    """Programs of Debian's packages slurm-wlm and munge that are not here."""
    return [name for name in PROGRAMS if _where(name) is None]


def _where(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


@dataclass(frozen=True)
class Cluster:
    """Commands to a running Slurm."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Where Slurm's commands find it."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: object, **changes: str) -> str:
        """Standard output of one of Slurm's commands."""
        environment = {**self.environment, **changes}
        words = [str(word) for word in command]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: Path, *arguments: object, options: tuple[str, ...] = (), **changes: str) -> str:
        """Number of the job."""
        return self.run("sbatch", "--parsable", *options, script, *arguments, **changes).strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job."""
        text = self.run("scontrol", "show", "job", number, "-o")
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def wait(self, number: str, seconds: float = 300) -> dict[str, str]:
        """Wait for the job's end; what Slurm says of it then."""
        end = time.monotonic() + seconds
        while True:
            job = self.job(number)
            if job["JobState"] in STATES_OF_THE_END:
                return job
            assert time.monotonic() < end, job
            time.sleep(0.5)

    def cancel_all(self, seconds: float = 60) -> None:
        """Cancel every job, and wait until none is left."""
        self.run("scancel", "--quiet", "--user", "root" if os.getuid() == 0 else os.environ["USER"])
        end = time.monotonic() + seconds
        while left := self.run("squeue", "--noheader"):
            assert time.monotonic() < end, left
            time.sleep(0.2)

    def lose(self, node: str) -> None:
        """Kill a node's daemon and what it runs, and tell the controller that the node is down."""
        daemon = psutil.Process(int((self.folder / f"slurmd.{node}.pid").read_text()))
        for process in [daemon, *filter(partial(_is_task, node), psutil.process_iter())]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def bring_back(self, node: str) -> None:
        """Start the node's daemon again; it tells the controller, which takes the node back (ReturnToService)."""
        _call("slurmd", "-N", node, "-f", self.folder / "slurm.conf", environment=self.environment)


def _is_task(node: str, process: psutil.Process) -> bool:
    """Whether a process is one that Slurm has started on this node."""
    with suppress(psutil.Error):
        return process.environ().get("SLURMD_NODENAME") == node
    return False


def start(folder: Path) -> Cluster:
    """Start munge, the controller and both nodes; returns when they take jobs."""
    for name in ("state", *(f"spool.n{n}" for n in (1, 2))):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    ports = _free_ports(4)
    host = socket.gethostname().split(".")[0]
    values = {"controller": ports[0], "first": ports[1], "second": ports[1] + 1}
    user = "root" if os.getuid() == 0 else os.environ.get("USER", "nobody")
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, user=user, **values))
    cluster = Cluster(folder)
    files = {name: folder / name for name in ("munge.sock", "munge.pid", "munge.log", "munge.seed")}
    _call(
        "munged",
        *("--key-file", key, "--socket", files["munge.sock"], "--pid-file", files["munge.pid"]),
        *("--log-file", files["munge.log"], "--seed-file", files["munge.seed"], "--force"),
    )
    try:
        for words in (["slurmctld"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"]):
            _call(*words, "-f", folder / "slurm.conf", environment=cluster.environment)
        end = time.monotonic() + 60
        while cluster.run("sinfo", "-h", "-o", "%T", "-p", "cpu").split() != ["idle"]:
            assert time.monotonic() < end, cluster.run("sinfo")
            time.sleep(0.2)
    except BaseException:
        stop(cluster)
        raise
    return cluster


def stop(cluster: Cluster) -> None:
    """End all that was started, and the jobs."""
    with suppress(AssertionError):
        cluster.cancel_all(20)
    for name in ("slurmd.n1.pid", "slurmd.n2.pid", "slurmctld.pid", "munge.pid"):
        file = cluster.folder / name
        if file.is_file():
            number = int(file.read_text())
            os.kill(number, signal.SIGTERM)


def _call(name: str, *arguments: object, environment: dict[str, str] | None = None) -> None:
    program = _where(name)
    assert program is not None
    words = [program, *map(str, arguments)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


def _free_ports(count: int) -> list[int]:
    """Ports of which the second has a free one behind it."""
    while True:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            first = one.getsockname()[1]
        found = [first + n for n in range(count)]
        sockets = [socket.socket() for _ in found]
        try:
            for each, port in zip(sockets, found, strict=True):
                each.bind(("127.0.0.1", port))
            return found
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
