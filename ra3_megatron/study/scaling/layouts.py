"""Families of layouts: what stays the same and which size grows when there are more processes."""

from dataclasses import dataclass
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.config.yaml_io import parse
from ra3_megatron.scaling.search import SHORT

AXES = ("tensor", "pipeline", "context", "data")
"""Sizes whose product is the number of processes."""


@dataclass(frozen=True)
class Family:
    """A layout for several numbers of processes."""

    text: str
    """As it was written."""
    grows: str | None
    """The size that takes what the others leave; None: all are given."""
    given: dict[str, Any]
    """Keys of `parallel` with their values."""
    micro_batch: int | None
    """Rows a forward pass; None: as configured."""

    @classmethod
    def parse(cls, text: str) -> "Family":
        """From `tensor=2,sequence=true,pipeline`: keys of `parallel`, `micro_batch`, and a size without a value."""
        given: dict[str, Any] = {}
        grows: list[str] = []
        for part in filter(None, (part.strip() for part in text.split(","))):
            key, equals, value = part.partition("=")
            if not equals and key in AXES:
                grows.append(key)
            elif equals and key in given:
                raise UserError(f"layouts: {text}: {key} stands twice")
            elif equals and (key in ParallelConfig.model_fields or key == "micro_batch"):
                given[key] = parse(value, f"layouts: {part}")
            else:
                known = ", ".join([*AXES, "micro_batch"])
                raise UserError(f"layouts: {text}: {part} is no size and no key of a layout; such are {known}")
        for key in (*SHORT, "micro_batch"):
            if key in given and (type(given[key]) is not int or given[key] < 1):
                raise UserError(f"layouts: {text}: {key}={given[key]}: must be a number, at least 1")
        if len(grows) > 1 or set(grows) & given.keys():
            raise UserError(f"layouts: {text}: only one size can grow, and it has no value")
        if not grows and "data" not in given:
            grows = ["data"]
        micro_batch = given.pop("micro_batch", None)
        return cls(text.replace(" ", ""), grows[0] if grows else None, given, micro_batch)

    def at(self, processes: int) -> dict[str, Any] | None:
        """Keys of `parallel` at this number of processes; None where the sizes do not go into it."""
        sizes = {axis: self.given.get(axis, 1) for axis in AXES}
        product = 1
        for axis in AXES:
            product *= sizes[axis] if axis != self.grows else 1
        rest, left = divmod(processes, product)
        if left or (self.grows is None and rest != 1):
            return None
        if self.grows is not None:
            sizes[self.grows] = rest
        keys = {**self.given, **sizes}
        if sizes["tensor"] == 1:
            keys.pop("sequence", None)  # there is nothing that it could split
        return keys


def layout_tag(keys: dict[str, Any], micro_batch: int | None = None) -> str:
    """A layout as a part of a name: `tp2.dp2`, `single`, `pp2.vpp2.recompute-full`."""
    parts = [f"{short.lower()}{keys[axis]}" for axis, short in SHORT.items() if keys.get(axis, 1) > 1]
    for key, value in keys.items():
        if key not in SHORT:
            text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
            parts.append(key.replace("_", "-") if value is True else f"{key.replace('_', '-')}-{text}")
    if micro_batch is not None:
        parts.append(f"mb{micro_batch}")
    return ".".join(parts) if any(keys[axis] > 1 for axis in AXES) else ".".join(["single", *parts])
