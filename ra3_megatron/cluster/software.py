"""The same software on every node: what `versions.json` of a run would say of each."""

from typing import Any

from ra3_megatron.cluster.results import Result, State
from ra3_megatron.report import versions

CHECK = "versions"
_HARDWARE = ("processor", "accelerators")


def collect(driver: str | None) -> dict[str, Any]:
    """Name -> version of this node; driver: of its GPUs."""
    found = versions.collect_versions()
    git = found["git"] or {}
    commit = f"{git['commit'][:12]}{' with changes' if git['modified'] else ''}" if git else None
    named = {"ra3_megatron": found["ra3_megatron"], "git commit": commit, "python": found["python"]}
    return {**named, "driver": driver, **found["packages"], **{name: found[name] for name in _HARDWARE}}


def compare(nodes: dict[str, dict[str, Any]]) -> list[Result]:
    """Each node against the first; other processors or GPUs may be meant, so they are a warning."""
    first = next(iter(nodes), "")
    found = []
    for node, software in nodes.items():
        differing = [name for name in nodes[first] if software.get(name) != nodes[first][name]]
        for name in differing:
            state: State = "warn" if name in _HARDWARE else "bad"
            text = f"{name} {_shown(software.get(name))}, but {_shown(nodes[first][name])} on {first}"
            found.append(Result(node, CHECK, state, text, "differ" if state == "bad" else "same"))
        if not differing:
            found.append(
                Result(node, CHECK, "ok", f"ra3 {software['ra3_megatron']}, torch {software['torch']}", "same")
            )
    return found


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
