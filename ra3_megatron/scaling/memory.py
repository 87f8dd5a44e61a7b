"""Memory of the fullest GPU, by part.

Everything is counted from shapes; only the device's `context_gib` is an allowance. Activations are those that a
backward pass needs of a pre-norm decoder with fused attention, which keeps no scores (the count of Korthikanti et al.,
2022, for SwiGLU and grouped queries): of each token and layer, in bf16 (in fp32 twice that),

    residual stream before each norm, and the output of each norm     4 h   (split over the tensor group under
                                                                             sequence parallelism)
    queries, keys, values, the output of attention                    2 q + 2 kv          (split over the tensor group)
    both halves of the feed-forward layer, and their product          3 f a token and expert (split likewise)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ra3_megatron.config.layouts import chunk_layers
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.scaling.counts import Layer, Stage, padded, recomputed_layers, stages
from ra3_megatron.scaling.rates import CONTEXT_GIB

GIB = 2**30
CHUNK_POSITIONS = 2048
"""As in `mcore/model.py`: positions whose logits are held in fp32 at the same time."""
FP8_COPIES = 2
"""Of a weight that is multiplied in FP8, a byte each: as it is, and transposed."""
LOGIT_BYTES = 4 + 4
"""A logit in fp32, and its gradient; beside them it is there in the type of the layers where that is another one. (What
next-token prediction keeps without `parallel.recompute_logits` comes on top.)"""


@dataclass(frozen=True)
class Memory:
    """GiB of one GPU."""

    weights: float
    gradients: float
    optimizer: float
    """With `parallel.offload_optimizer` what it needs beyond the memory of activations and logits, in whose turn it is
    there."""
    activations: float
    logits: float
    rollouts: float
    """Weights and key/value cache of a rollout engine on the same GPU."""
    buffers: float
    scorer: float = 0.0
    """The frozen model, which an E-step holds beside the one that it trains."""

    @property
    def total(self) -> float:
        """All parts."""
        return sum(asdict(self).values())

    def as_dict(self) -> dict[str, float]:
        """Parts and total, GiB."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Work:
    """What is trained on, and in which types."""

    sequence: int
    """Tokens of a row."""
    global_batch: int
    """Rows a step."""
    micro_batch: int
    """Rows of a forward pass."""
    precision: str = "bf16"
    """bf16, fp8 (products of the layers; attention and the output layer stay bf16), or fp32."""
    gradient_bytes: int = 4
    """Bytes of a gradient that is kept and reduced: 4 as `ra3 train` does it, 2 for bf16."""

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight and of a value of the residual stream."""
        return 4 if self.precision == "fp32" else 2

    @property
    def state_bytes(self) -> int:
        """Bytes that the optimizer keeps of a parameter: two moments, and fp32 weights where the model's are others."""
        return 8 if self.precision == "fp32" else 12

    def micro_batches(self, parallel: ParallelConfig) -> int:
        """Micro-batches of one replica in a step."""
        return self.global_batch // (self.micro_batch * parallel.data)


def memory(
    model: ModelConfig,
    vocab_size: int,
    parallel: ParallelConfig,
    work: Work,
    rollouts_gib: float = 0.0,
    context_gib: float = CONTEXT_GIB,
) -> Memory:
    """Of the fullest GPU. The layout must have passed `layout_problems`. context_gib: see `Gpu`."""
    each = [
        _of_stage(number, stage, model, vocab_size, parallel, work, rollouts_gib, context_gib)
        for number, stage in enumerate(stages(model, vocab_size, parallel))
    ]
    return max(each, key=lambda memory: memory.total)


def _of_stage(
    number: int,
    stage: Stage,
    model: ModelConfig,
    vocab_size: int,
    parallel: ParallelConfig,
    work: Work,
    rollouts_gib: float,
    context_gib: float,
) -> Memory:
    replicas = parallel.data * parallel.context
    expert_replicas = parallel.tensor * replicas // ((parallel.expert_tensor or parallel.tensor) * parallel.expert)
    shares = (replicas, expert_replicas) if parallel.distributed_optimizer else (1, 1)
    state = work.state_bytes * (stage.dense / shares[0] + stage.sparse / shares[1]) / GIB
    tokens = work.micro_batch * work.sequence // parallel.context
    layer_kept, again = activation_bytes(model, parallel, stage.chunks)
    layers = _layers_in_flight(number, model, parallel, work.micro_batches(parallel))
    logits = 0.0
    if stage.output:
        rows = padded(vocab_size, parallel.tensor) // parallel.tensor
        each = LOGIT_BYTES + (0 if work.precision == "fp32" else work.element_bytes)
        kept = 0 if parallel.recompute_logits else tokens * work.element_bytes
        logits = (
            rows * (min(tokens, CHUNK_POSITIONS) * each + kept) + 2 * tokens * work.element_bytes * model.hidden_size
        )
    offloaded = min(parallel.offload_activations, layers)
    activations = tokens * ((layers - offloaded) * layer_kept + again) * work.element_bytes / 2 / GIB
    if parallel.offload_optimizer:  # there in turn with activations and logits
        state = max(0.0, state - activations - logits / GIB)
    return Memory(
        weights=(work.element_bytes * stage.parameters + _fp8_copies(stage, model, parallel, work)) / GIB,
        gradients=work.gradient_bytes * stage.parameters / GIB,
        optimizer=state,
        activations=activations,
        logits=logits / GIB,
        rollouts=rollouts_gib,
        buffers=context_gib,
    )


def _fp8_copies(stage: Stage, model: ModelConfig, parallel: ParallelConfig, work: Work) -> int:
    """Bytes of the layers' weights in FP8, in both orders, as Transformer Engine keeps them beside the bf16 ones. Under
    `model.fp8.parameter_gather` they are there instead of these."""
    if work.precision != "fp8" or model.fp8.parameter_gather:
        return 0
    return FP8_COPIES * _multiplied(stage, model, parallel)


def _multiplied(stage: Stage, model: ModelConfig, parallel: ParallelConfig) -> int:
    """Weights of the layers' products."""
    layer = Layer.of(model)
    products = stage.layers * (layer.dense(parallel.tensor) - layer.small - layer.bias // parallel.tensor)
    return products + stage.sparse


def frozen_gib(model: ModelConfig, vocab_size: int, parallel: ParallelConfig, work: Work) -> float:
    """GiB of a frozen model (the E-step's scorer) on the GPU that holds the most of it.

    It gathers no weights in FP8, and is multiplied forward alone: beside its weights, which `parallel.offload_scorer`
    takes to host memory, is one copy in FP8, which stays.
    """
    weights = 0 if parallel.offload_scorer else work.element_bytes
    copies = 1 if work.precision == "fp8" else 0
    return max(
        (weights * stage.parameters + copies * _multiplied(stage, model, parallel)) / GIB
        for stage in stages(model, vocab_size, parallel)
    )


def activation_bytes(model: ModelConfig, parallel: ParallelConfig, chunks: Sequence[int]) -> tuple[float, float]:
    """Bytes in bf16 of one token and layer that are kept for the backward pass (the mean of a stage's layers), and
    those of the layers that are computed again at once. chunks: layers of each model chunk of the stage.

    Experts, however wide `expert_tensor` is, have all in all the tokens of their tensor group, each `active` times: one
    GPU its share of these. Only the experts' inputs are there whole on each of the `expert_tensor` that split them.
    """
    layer, tensor = Layer.of(model), parallel.tensor
    shared = tensor if parallel.sequence else 1
    stream, norms = 2 * 2 * layer.hidden / shared, 2 * 2 * layer.hidden / shared
    attention = (2 * (2 * layer.query + 2 * layer.key_value) + 4 * layer.heads) / tensor
    feed_forward = 2 * 3 * layer.width * layer.active / tensor
    if layer.experts:  # inputs of the experts, as they were dispatched
        feed_forward += 2 * layer.hidden * layer.active * (parallel.expert_tensor or tensor) / tensor
    everything = stream + norms + attention + feed_forward
    if parallel.recompute == "full":
        share, entry = recomputed_layers(parallel, chunks), 2 * layer.hidden / shared
        unit = parallel.recompute_layers if parallel.recompute_method == "uniform" else 1
        return share * entry / unit + (1 - share) * everything, unit * everything
    if parallel.recompute == "selective":
        named = set(parallel.recompute_modules)
        again = (norms if "layernorm" in named else 0) + (feed_forward if named & {"mlp", "moe"} else 0)
        again += 2 * layer.query / tensor if "core_attn" in named else 0
        return everything - again, again
    return everything, 0.0


def _layers_in_flight(number: int, model: ModelConfig, parallel: ParallelConfig, micro_batches: int) -> float:
    """Layers whose activations stage `number` keeps at most: forward passes that are ahead of their backward passes."""
    chunks = chunk_layers(model.num_layers, parallel)[number]
    behind = parallel.pipeline - number - 1
    if parallel.virtual_pipeline == 1:
        return sum(chunks) * min(micro_batches, behind + 1)
    ahead = 2 * behind + (parallel.virtual_pipeline - 1) * parallel.pipeline + 1
    return sum(chunks) / len(chunks) * min(micro_batches * len(chunks), ahead)
