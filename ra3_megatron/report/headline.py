"""One line below the title of a report: which model, in which layout, on what machine, at which commit."""

from collections import Counter
from typing import Any

import yaml

_SIZES = ("tensor", "pipeline", "context", "expert", "data")


def headline(config: str, versions: dict[str, Any] | None) -> str:
    """config: text of `config.yaml`; versions: content of `versions.json`. What they do not say is left out."""
    values = yaml.safe_load(config)
    if not isinstance(values, dict):
        return ""
    model, layout = (_mapping(values.get(section)) for section in ("model", "parallel"))
    parts = [f"method {values['method']}"] if "method" in values else []
    if model.get("hf"):
        parts.append(str(model["hf"]))
    elif {"num_layers", "hidden_size"} <= model.keys():
        parts.append(f"{model['num_layers']} layers of {model['hidden_size']} channels")
    if "precision" in model:
        parts.append(str(model["precision"]))
    parts += [", ".join(f"{name} {layout[name]}" for name in _SIZES if _above_one(layout.get(name)))]
    if versions is not None:
        parts += [_machine(versions), _commit(versions)]
    return " · ".join(filter(None, parts))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _above_one(size: Any) -> bool:
    return isinstance(size, int) and size > 1


def _machine(versions: dict[str, Any]) -> str:
    """The GPUs that the main process saw, or the cores that it had."""
    devices = Counter(versions.get("accelerators") or [])
    if devices:
        return ", ".join(f"{count} x {name}" for name, count in devices.items())
    if not versions.get("processor"):
        return ""
    cores = versions.get("cores")
    return f"{cores} core{'' if cores == 1 else 's'} of {versions['processor']}"


def _commit(versions: dict[str, Any]) -> str:
    git = versions.get("git")
    if not git:
        return ""
    return f"commit {git['commit'][:10]}{' and changes' if git.get('modified') else ''}"
