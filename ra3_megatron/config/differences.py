"""What two configurations differ in, as far as it decides what a run computes."""

from dataclasses import dataclass
from typing import Any

from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.yaml_io import scalar_text

RESULT_FREE = (
    "logging",
    "profile",
    "parallel",
    "checkpoint",
    "export",
    "rollout.placement",
    "rollout.replicas",
    # of rollout.vllm one by one: `quantization` decides what policy samples, and is not among them
    "rollout.vllm.start_timeout",
    "rollout.vllm.call_timeout",
    "rollout.vllm.cuda_graphs",
    "rollout.vllm.tensor",
    "rollout.vllm.max_sequences",
    "rollout.vllm.kv_cache_gib",
    "rollout.vllm.threads",
    "rollout.vllm.refit_bucket_mb",
    "run_dir",
    "watchdog",
    # a run that stopped at a bad step may go on with another answer to it
    "monitors.nonfinite",
    "monitors.spike",
    "monitors.spike_factor",
    "monitors.spike_window",
    "monitors.max_skips",
)
"""Sections and keys that may change when a run is resumed: what it computes depends on them by rounding alone."""


@dataclass(frozen=True)
class Difference:
    """A key with two values."""

    key: str
    """Dotted."""
    one: str
    """The value in the first configuration, as YAML."""
    other: str
    """That in the second."""


def differences(one: RunConfig, other: RunConfig) -> list[Difference]:
    """Keys that decide results and differ, in the order of the configuration."""
    before, after = flat(one.model_dump()), flat(other.model_dump())
    return [
        Difference(key, scalar_text(before.get(key)), scalar_text(after.get(key)))
        for key in [*before, *(key for key in after if key not in before)]
        if before.get(key) != after.get(key) and not any(f"{key}.".startswith(f"{free}.") for free in RESULT_FREE)
    ]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings by dotted key."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: item for name, part in value.items() for key, item in flat(part, f"{prefix}.{name}".lstrip(".")).items()
    }
