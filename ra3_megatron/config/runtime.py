"""How it runs: sampling, checkpoints, logging."""

from typing import Literal

from pydantic import Field

from ra3_megatron.config.base import Section


class RolloutConfig(Section):
    """Sampling of latents."""

    engine: Literal["megatron"] = "megatron"
    """`megatron`: key/value-cache sampler on the live model."""

    sampler: Literal["jump_ahead", "naive"] = "jump_ahead"
    """`jump_ahead`: one teacher-forced pass decides all lines up to the next thought; `naive`: one request a line."""

    temperature: float = Field(default=1.0, gt=0)
    """Temperature of decisions and thoughts."""

    batch_size: int = Field(default=128, ge=1)
    """Transcripts sampled at once on one process."""


class CheckpointConfig(Section):
    """Saving and resuming."""

    interval: int = Field(default=50, ge=1)
    """Steps between checkpoints within a phase (one is always saved at its end)."""

    keep: int = Field(default=2, ge=1)
    """Checkpoints kept inside a phase; the ends of phases are all kept."""

    async_save: bool = False
    """Write the checkpoints inside a phase while training goes on (it needs memory for a copy of what is saved)."""

    verify: bool = False
    """Compare the checksums of a checkpoint's files before it is loaded; sizes are always compared."""


class LoggingConfig(Section):
    """What is written while a run goes on."""

    interval: int = Field(default=1, ge=1)
    """Steps between lines of `metrics.jsonl` and TensorBoard."""

    tensorboard: bool = True
    """Write TensorBoard events to `<run>/tensorboard`."""

    progress: Literal["auto", "bar", "plain", "off"] = "auto"
    """Progress display; `auto`: bars on a terminal, plain lines elsewhere."""
