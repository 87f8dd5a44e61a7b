"""The architecture of the model and how it is laid out over processes."""

from typing import Literal

from pydantic import Field, model_validator

from ra3_megatron.config.base import Section


class ModelConfig(Section):
    """A Llama-shaped decoder: RMSNorm, rotary positions, SwiGLU, grouped-query attention."""

    num_layers: int = Field(default=4, ge=1)
    """Transformer layers."""

    hidden_size: int = Field(default=256, ge=8)
    """Width of the residual stream."""

    ffn_hidden_size: int = Field(default=704, ge=8)
    """Width of the SwiGLU feed-forward layer."""

    num_attention_heads: int = Field(default=8, ge=1)
    """Query heads."""

    num_query_groups: int = Field(default=4, ge=1)
    """Key/value heads (grouped-query attention); equal to `num_attention_heads` for multi-head attention."""

    head_dim: int | None = Field(default=None, ge=2)
    """Channels a head; none: `hidden_size / num_attention_heads`."""

    context_length: int = Field(default=512, ge=16)
    """Longest sequence, in tokens; also the length that sequences are packed to."""

    rope_base: float = Field(default=10_000.0, gt=0)
    """Base of the rotary position embedding."""

    norm_epsilon: float = Field(default=1e-5, gt=0)
    """Epsilon of RMSNorm."""

    tied_embeddings: bool = True
    """Share the input embedding with the output layer."""

    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of forward and backward passes; the optimizer keeps fp32 weights and moments."""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"model.num_query_groups={self.num_query_groups} does not divide "
                f"model.num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.num_attention_heads={self.num_attention_heads} does not divide "
                f"model.hidden_size={self.hidden_size}: set model.head_dim"
            )
        if (self.head_dim or self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError("model.head_dim must be even: rotary positions turn pairs of channels")
        return self


class ParallelConfig(Section):
    """The layout: how many processes and what each holds."""

    tensor: int = Field(default=1, ge=1)
    """Tensor-parallel size: each layer's matrices and the vocabulary are split over this many processes."""

    data: int = Field(default=1, ge=1)
    """Data-parallel size: replicas of the model, each with its share of every global batch."""

    sequence: bool = False
    """Sequence parallelism: activations outside the matrices are split over the tensor-parallel group."""

    distributed_optimizer: bool = False
    """Split optimizer state and fp32 weights over the data-parallel group."""

    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each process; none: cores / processes."""

    @property
    def world_size(self) -> int:
        """Processes that the layout needs."""
        return self.tensor * self.data

    @model_validator(mode="after")
    def _check(self) -> "ParallelConfig":
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence=true needs parallel.tensor >= 2")
        return self
