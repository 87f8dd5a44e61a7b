"""Where this process stands among those of the job, and what its node is called."""

import os
import re
import socket
import subprocess
from dataclasses import dataclass

from ra3_megatron.mcore.launch import adopt_slurm


@dataclass(frozen=True)
class Place:
    """This process."""

    rank: int
    world_size: int
    node: str
    local_size: int | None = None
    """Processes that were started on each node; None: unknown."""

    @property
    def is_main(self) -> bool:
        """Whether this process collects the results and shows them."""
        return self.rank == 0


def here() -> Place:
    """The place of this process, from the environment; without a launcher it is alone."""
    adopt_slurm()
    local = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE"))
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return Place(rank, world_size, node_name(), int(local) if local else None)


def node_name() -> str:
    """Slurm's name of this node; its host name without Slurm."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def job_nodes() -> list[str]:
    """Names of the nodes that Slurm gave this step, the first process's first; empty without Slurm."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return []
    if not re.search(r"[\[,]", nodes):
        return [nodes]
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []  # inside of a container, say


def absent(here: dict[int, str], world_size: int, local_size: int | None, nodes: list[str]) -> list[tuple[str, str]]:
    """(node, what is missing of it) when only the ranks of `here` (rank -> node) came; never empty if one is missing.

    nodes: those of the job where Slurm tells. Otherwise a missing process is given to the node of its neighbours,
    as launchers number processes node by node.
    """
    missing = [rank for rank in range(world_size) if rank not in here]
    silent = [node for node in nodes if node not in here.values()]
    found = [(node, "none of its processes came") for node in silent]
    if not missing:
        return []
    if nodes:
        for node in dict.fromkeys(here.values()):
            came = sum(name == node for name in here.values())
            if local_size and came < local_size:
                found.append((node, f"{came} of its {local_size} processes came"))
        return found or [("?", f"rank {rank} did not come") for rank in missing]
    blocks: dict[int, list[int]] = {}
    for rank in missing:
        blocks.setdefault(rank // (local_size or 1), []).append(rank)
    for block, ranks in blocks.items():
        neighbours = [node for rank, node in here.items() if local_size and rank // local_size == block]
        which = ", ".join(map(str, ranks))
        found.append((neighbours[0] if neighbours else f"of rank {which}", f"rank {which} did not come"))
    return found
