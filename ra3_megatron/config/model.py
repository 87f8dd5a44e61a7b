"""The architecture of the model and how it is laid out over processes."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from ra3_megatron.config.base import Section
from ra3_megatron.config.precision import RECIPES, Fp8Config, Precision

_RECOMPUTE_KEYS = {"selective": ("recompute_modules",), "full": ("recompute_method", "recompute_layers")}
"""Keys that are read only with one value of `parallel.recompute`."""


class RopeScalingConfig(Section):
    """How rotary frequencies are changed so that a model reads further than it was first trained to."""

    kind: Literal["none", "linear", "llama3"] = "none"
    """`linear`: every frequency is divided by `factor`; `llama3`: the low ones are, the high ones are kept, those
    between are interpolated (Llama 3.1)."""

    factor: float = Field(default=1.0, gt=0)
    """By how much frequencies are divided."""

    low_freq_factor: float = Field(default=1.0, gt=0)
    """`llama3`: wavelengths above `original_context_length` / this are scaled fully."""

    high_freq_factor: float = Field(default=4.0, gt=0)
    """`llama3`: wavelengths below `original_context_length` / this are kept."""

    original_context_length: int = Field(default=8192, ge=1)
    """`llama3`: the context before scaling, in tokens."""

    @model_validator(mode="after")
    def _check(self) -> "RopeScalingConfig":
        if self.kind == "none" and self.factor != 1.0:
            raise ValueError(f"factor={self.factor} is not read with kind=none: use linear or llama3")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must be above low_freq_factor={self.low_freq_factor}"
            )
        return self


class ModelConfig(Section):
    """A Llama-shaped decoder: RMSNorm, rotary positions, SwiGLU, grouped-query attention."""

    hf: str | None = None
    """Hugging Face folder to start from. Its `config.json` decides the architecture (the keys below may be left out, or
    must agree with it), its weights are the base model, its tokenizer is used."""

    vocab_size: int | None = Field(default=None, ge=2)
    """Tokens of the embedding and the output layer; none: as many as the tokenizer has."""

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

    rope_scaling: RopeScalingConfig = RopeScalingConfig()
    """Scaling of rotary frequencies."""

    qkv_bias: bool = False
    """Biases of the query, key and value projections (Qwen2)."""

    qk_norm: bool = False
    """RMSNorm over the channels of each query and key head, before rotation (Qwen3)."""

    norm_epsilon: float = Field(default=1e-5, gt=0)
    """Epsilon of RMSNorm."""

    num_experts: int | None = Field(default=None, ge=2)
    """Experts of each feed-forward layer (a mixture of experts); none: dense layers. There is no load-balancing loss,
    as its statistics would depend on the split into micro-batches: start from a model whose routers are trained."""

    experts_per_token: int = Field(default=2, ge=1)
    """Experts that each token is sent to."""

    normalize_expert_weights: bool = True
    """The weights of a token's experts are a softmax over these (they sum to 1), not over all experts."""

    expert_ffn_hidden_size: int | None = Field(default=None, ge=8)
    """Width of each expert; none: `ffn_hidden_size`."""

    tied_embeddings: bool = True
    """Share the input embedding with the output layer."""

    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights."""

    precision: Precision = "fp32"
    """Arithmetic of forward and backward passes; the optimizer keeps fp32 weights and moments. `fp8_…` and `mxfp8`:
    products with the weights of the layers in FP8 by this recipe of Transformer Engine, all else in bf16; on GPUs that
    have it (docs/gpu.md)."""

    fp8: Fp8Config = Fp8Config()
    """More on FP8 recipes."""

    @property
    def weight_type(self) -> Literal["fp32", "bf16"]:
        """In which the model's weights are kept, copied to engines and exported."""
        return "fp32" if self.precision == "fp32" else "bf16"

    @property
    def fp8_recipe(self) -> str | None:
        """Megatron's name of the recipe; None: no FP8."""
        return RECIPES[self.precision].megatron if self.precision in RECIPES else None

    @property
    def frozen(self) -> "ModelConfig":
        """The same for a model that is not trained: it has no earlier steps that scales could come from (`fp8_delayed`)
        and takes its tensors' own; and it gathers no weights."""
        delayed = self.precision == "fp8_delayed"
        less = {"parameter_gather": False, **({"attention": False, "amax_history": 1024} if delayed else {})}
        update = {"fp8": self.fp8.model_copy(update=less), **({"precision": "fp8_tensorwise"} if delayed else {})}
        return self if self.fp8_recipe is None else self.model_copy(update=update)

    @property
    def row_multiple(self) -> int:
        """What the length of a row must be a multiple of on each process, whatever the layout: FP8 products have
        dimensions of such multiples."""
        return RECIPES[self.precision].multiple if self.precision in RECIPES else 1

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
        if self.num_experts is None:
            if self.expert_ffn_hidden_size is not None:
                raise ValueError(
                    f"model.expert_ffn_hidden_size={self.expert_ffn_hidden_size} needs model.num_experts "
                    "(dense layers have model.ffn_hidden_size)"
                )
            for name in ("experts_per_token", "normalize_expert_weights"):
                if (value := getattr(self, name)) != type(self).model_fields[name].default:
                    shown = str(value).lower()
                    raise ValueError(f"model.{name}={shown} is not read without experts: set model.num_experts")
        elif self.experts_per_token > self.num_experts:
            raise ValueError(
                f"model.experts_per_token={self.experts_per_token} is more than model.num_experts={self.num_experts}"
            )
        elif self.experts_per_token == 1 and self.normalize_expert_weights:
            raise ValueError(
                "model.experts_per_token=1 needs model.normalize_expert_weights=false: normalised weights of a token's "
                "experts sum to 1, so a single one's is always 1 and its router cannot learn"
            )
        return self


class ParallelConfig(Section):
    """The layout: how many processes and what each holds. It decides speed and memory, never a result."""

    tensor: int = Field(default=1, ge=1)
    """Tensor-parallel size: each layer's matrices and the vocabulary are split over this many processes."""

    pipeline: int = Field(default=1, ge=1)
    """Pipeline-parallel size: the layers are split into this many stages."""

    virtual_pipeline: int = Field(default=1, ge=1)
    """Model chunks a stage (interleaved schedule): smaller bubbles, more messages."""

    first_stage_layers: int | None = Field(default=None, ge=1)
    """Layers of the first stage; none: as many as any other. The other stages share the rest."""

    last_stage_layers: int | None = Field(default=None, ge=1)
    """Layers of the last stage, which also holds the output layer; none: as many as any other."""

    count_embedding: bool = False
    """The embedding counts as one layer when layers are split over stages (126 layers with both ends are 128)."""

    count_output: bool = False
    """The output layer counts as one layer when layers are split over stages."""

    context: int = Field(default=1, ge=1)
    """Context-parallel size: each sequence is split over this many processes."""

    expert: int = Field(default=1, ge=1)
    """Expert-parallel size: the experts of a mixture are split over this many of the data- and context-parallel
    processes."""

    expert_tensor: int | None = Field(default=None, ge=1)
    """Tensor-parallel size inside experts; none: `parallel.tensor`."""

    data: int = Field(default=1, ge=1)
    """Data-parallel size: replicas of the model, each with its share of every global batch."""

    sequence: bool = False
    """Sequence parallelism: activations outside the matrices are split over the tensor-parallel group."""

    distributed_optimizer: bool = False
    """Split optimizer state and fp32 weights over the data-parallel group."""

    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass goes on."""

    grad_bucket_size: int | None = Field(default=None, ge=1)
    """Parameters whose gradients are reduced together under `overlap_grad_reduce`; none: Megatron's choice."""

    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass goes on (needs `distributed_optimizer`)."""

    overlap_p2p: bool = True
    """With `virtual_pipeline` > 1: pass activations between stages while they compute. Two stages need it: without it
    they would exchange two messages at once in either direction, which arrive in the wrong order."""

    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass instead of kept: none; those of `recompute_modules`; whole
    layers."""

    recompute_modules: list[Literal["core_attn", "mlp", "moe", "layernorm"]] = ["core_attn"]
    """What `recompute=selective` computes again."""

    recompute_method: Literal["uniform", "block"] = "uniform"
    """`recompute=full`: every `recompute_layers` layers are one unit (`uniform`), or only the first `recompute_layers`
    layers of each chunk are computed again (`block`)."""

    recompute_layers: int = Field(default=1, ge=1)
    """See `recompute_method`."""

    recompute_logits: bool = False
    """Compute logits again in the backward pass, 2048 positions at a time, instead of keeping those of a micro-batch
    (positions x vocabulary in the type of the layers): a third more FLOPs of the output layer. On CPUs those of policy
    gradients are computed again in any case."""

    offload_optimizer: bool = False
    """Keep the optimizer's fp32 weights and moments in host memory but during its step (on GPUs)."""

    offload_scorer: bool = False
    """Keep frozen models (the E-step's scorer, the reference of RLVR's KL) in host memory but while they score (on
    GPUs)."""

    offload_activations: int = Field(default=0, ge=0)
    """Layers, the first ones, whose activations are moved to host memory and back for the backward pass (on GPUs, with
    Transformer Engine)."""

    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each process; none: cores / processes."""

    @property
    def world_size(self) -> int:
        """Processes that the layout needs."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def counted_ends(self) -> int:
        """How many of embedding and output layer count as a layer."""
        return self.count_embedding + self.count_output

    @property
    def sequence_multiple(self) -> int:
        """What the length of a row must be a multiple of: two pieces a context-parallel rank, each split over the
        tensor-parallel ranks under sequence parallelism."""
        pieces = 2 * self.context if self.context > 1 else 1
        return pieces * (self.tensor if self.sequence else 1)

    def problems(self) -> Iterator[str]:
        """One line for each combination of these keys that cannot be, whatever the model."""
        if self.sequence and self.tensor == 1:
            yield "parallel.sequence=true needs parallel.tensor >= 2"
        if self.pipeline == 1:
            if self.virtual_pipeline > 1:
                yield f"parallel.virtual_pipeline={self.virtual_pipeline} needs parallel.pipeline >= 2"
            for name in ("first_stage_layers", "last_stage_layers"):
                if getattr(self, name) is not None:
                    yield f"parallel.{name}={getattr(self, name)} needs parallel.pipeline >= 2"
            for name in ("count_embedding", "count_output"):
                if getattr(self, name):
                    yield f"parallel.{name}=true needs parallel.pipeline >= 2"
        elif self.counted_ends:
            for name in ("first_stage_layers", "last_stage_layers"):
                if getattr(self, name) is not None:
                    yield (
                        f"parallel.{name}={getattr(self, name)} does not go with parallel.count_embedding or "
                        "parallel.count_output: give one or the other"
                    )
        if self.pipeline == 2 and self.virtual_pipeline > 1 and not self.overlap_p2p:
            yield (
                "parallel.overlap_p2p=false does not go with parallel.pipeline=2 and "
                f"parallel.virtual_pipeline={self.virtual_pipeline} (messages between two stages would arrive in the "
                "wrong order): use parallel.overlap_p2p=true"
            )
        if self.grad_bucket_size is not None and not self.overlap_grad_reduce:
            yield f"parallel.grad_bucket_size={self.grad_bucket_size} needs parallel.overlap_grad_reduce=true"
        if self.overlap_param_gather:
            for name in ("distributed_optimizer", "overlap_grad_reduce"):
                if not getattr(self, name):
                    yield f"parallel.overlap_param_gather=true needs parallel.{name}=true"
        if self.offload_activations and self.pipeline > 1:
            yield (
                f"parallel.offload_activations={self.offload_activations} does not go with parallel.pipeline="
                f"{self.pipeline}: leave one out"
            )
        if self.offload_activations and self.recompute != "none":
            yield (
                f"parallel.offload_activations={self.offload_activations} does not go with parallel.recompute="
                f"{self.recompute}: activations are kept or computed again"
            )
        if self.recompute == "selective" and not self.recompute_modules:
            yield "parallel.recompute_modules=[] with parallel.recompute=selective: name a module (core_attn, say)"
        for mode, names in _RECOMPUTE_KEYS.items():
            for name in names:
                value = getattr(self, name)
                if self.recompute != mode and value != type(self).model_fields[name].default:
                    text = f"[{', '.join(value)}]" if isinstance(value, list) else value
                    yield (
                        f"parallel.{name}={text} is not read with parallel.recompute={self.recompute}: "
                        f"it goes with {mode}"
                    )

    @model_validator(mode="after")
    def _check(self) -> "ParallelConfig":
        lines = list(self.problems())
        if lines:
            raise ValueError("\n".join(lines))
        return self
