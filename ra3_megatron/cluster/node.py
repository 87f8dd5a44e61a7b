"""What one process of a node finds out about the node alone, and what the first process makes of all of them."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ra3_megatron.cluster import devices, disk, sandbox, software
from ra3_megatron.cluster.results import Limits, Result, could_not

logger = logging.getLogger(__name__)


def look(node: str, processes: int, run_dir: Path, limits: Limits) -> dict[str, Any]:
    """`results`, `gpus` that its processes will use, `software`. A check that raises is a bad result."""
    results: list[Result] = []
    seen: dict[str, Any] = {"gpus": 0, "software": {}}

    def look_at_devices() -> None:
        found, seen["gpus"], seen["driver"] = devices.check(node, processes, limits)
        results.extend(found)

    def look_at_disks() -> None:
        results.extend(disk.check(node, run_dir, limits))

    def look_at_software() -> None:
        seen["software"] = software.collect(seen.get("driver"))

    def look_at_sandbox() -> None:
        if limits.sandbox:
            results.append(sandbox.check(node))

    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        (devices.CHECK, look_at_devices),
        (disk.CHECK, look_at_disks),
        (software.CHECK, look_at_software),
        (sandbox.CHECK, look_at_sandbox),
    )
    for check, step in steps:
        try:
            step()
        except Exception as error:
            logger.exception("%s", check)
            results.append(could_not(node, check, error))
    return {**seen, "results": [each.as_dict() for each in results]}


def compare(nodes: dict[str, dict[str, Any]]) -> tuple[list[Result], str]:
    """All results of the nodes, and where the reduction can be: "cuda", "cpu", or "none" when GPUs are bad."""
    results = [Result(**result) for seen in nodes.values() for result in seen["results"]]
    results += devices.compare({node: seen["gpus"] for node, seen in nodes.items()})
    results += software.compare({node: seen["software"] for node, seen in nodes.items() if seen["software"]})
    if any(result.check == devices.CHECK and result.state == "bad" for result in results):
        return results, "none"
    return results, "cuda" if all(seen["gpus"] for seen in nodes.values()) else "cpu"
