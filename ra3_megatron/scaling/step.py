"""Time of one training step, by part, from FLOPs, bytes and the data sheet.

    micro-batch   products with weights + attention + pointwise kernels + exposed messages of tensor, context and expert
                  parallelism, of each stage
    step          micro-batches * slowest stage  +  (stages - 1) / chunks * slowest stage  (bubble)
                  + exposed messages between stages and of data parallelism + optimizer

The bubble is that of the interleaved 1F1B schedule (Narayanan et al., 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.scaling.counts import Layer, Stage, padded, recomputed_layers, stages, token_flops
from ra3_megatron.scaling.memory import Work
from ra3_megatron.scaling.rates import RATES, Rates
from ra3_megatron.scaling.tables import Gpu

BUCKET, BUCKET_SHARE = 40_000_000, 1_000_000
"""Parameters whose gradients Megatron-Core reduces together: at least the first, and the second for each replica."""
ATTENTION_BACKWARD = 2.5
"""FLOPs of the backward pass of fused attention, in forward passes: it computes the scores again."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by part."""

    matmul: float
    """Products with weights."""
    attention: float
    """Scores and values."""
    pointwise: float
    """Norms, activations, casts, accumulation of gradients: bound by memory."""
    tensor: float
    """Exposed messages of tensor parallelism."""
    context: float
    """Exposed messages of context parallelism."""
    expert: float
    """Messages of expert parallelism."""
    pipeline: float
    """Exposed messages between stages."""
    bubble: float
    """Waiting for the pipeline to fill and to run empty."""
    data: float
    """Exposed reduction of gradients and gathering of weights."""
    optimizer: float

    @property
    def total(self) -> float:
        """Of the whole step."""
        return sum(value for _, value in self)

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return ((field.name, getattr(self, field.name)) for field in fields(self))


@dataclass(frozen=True)
class _Pass:
    """Seconds of a micro-batch on one stage, forward and backward."""

    matmul: float
    attention: float
    pointwise: float
    tensor: float
    context: float
    expert: float
    backward: float
    """Share of the backward pass in all of it."""

    @property
    def total(self) -> float:
        return self.matmul + self.attention + self.pointwise + self.tensor + self.context + self.expert


def mfu(model: ModelConfig, vocab_size: int, gpu: Gpu, work: Work, gpus: int, seconds: float) -> float:
    """Model FLOPs utilisation: 3 * forward FLOPs of the step (`token_flops`) / (seconds * GPUs * peak).

    The peak is that of the precision: an FP8 run is held against the FP8 peak.
    """
    tokens = work.global_batch * work.sequence
    spent = 3 * sum(token_flops(model, vocab_size, work.sequence).values()) * tokens
    return spent / (seconds * gpus * peak(gpu, work.precision))


def peak(gpu: Gpu, precision: str) -> float:
    """FLOP/s of products with weights at best. ValueError for FP8 or fp32 on a device without it."""
    if precision == "bf16":
        return gpu.bf16_tflops * 1e12
    if precision == "fp32":
        if gpu.fp32_tflops is None:
            raise ValueError(f"precision fp32: the description of {gpu.name} has no fp32_tflops")
        return gpu.fp32_tflops * 1e12
    if gpu.fp8_tflops is None:
        raise ValueError(f"--precision fp8: {gpu.name} has no FP8")
    return gpu.fp8_tflops * 1e12


def step_time(
    model: ModelConfig, vocab_size: int, parallel: ParallelConfig, work: Work, gpu: Gpu, rates: Rates = RATES
) -> StepTime:
    """Of a training step (an M-step's). The layout must have passed `layout_problems` and divide the batch."""
    rates = gpu.own(rates)
    held = stages(model, vocab_size, parallel)
    passes = [_micro_batch(stage, model, vocab_size, parallel, work, gpu, rates) for stage in held]
    slow = max(passes, key=lambda each: each.total)
    number = work.micro_batches(parallel)
    return StepTime(
        matmul=number * slow.matmul,
        attention=number * slow.attention,
        pointwise=number * slow.pointwise,
        tensor=number * slow.tensor,
        context=number * slow.context,
        expert=number * slow.expert,
        pipeline=_between_stages(model, parallel, work, gpu, rates),
        bubble=(parallel.pipeline - 1) / parallel.virtual_pipeline * slow.total,
        data=max(_data(stage, each, parallel, work, gpu, rates) for stage, each in zip(held, passes, strict=True)),
        optimizer=max(_optimizer(stage, parallel, work, gpu, rates) for stage in held),
    )


def forward_seconds(
    model: ModelConfig,
    vocab_size: int,
    parallel: ParallelConfig,
    work: Work,
    gpu: Gpu,
    tokens: float,
    rates: Rates = RATES,
) -> float:
    """Of forward passes alone over `tokens` tokens of one replica (scoring), the pipeline being full."""
    rates = gpu.own(rates)
    each = [
        _micro_batch(stage, model, vocab_size, parallel, work, gpu, rates)
        for stage in stages(model, vocab_size, parallel)
    ]
    slow = max(pass_.total * (1 - pass_.backward) for pass_ in each)
    return slow * tokens / (work.micro_batch * work.sequence)


def group_bandwidth(gpu: Gpu, stride: int, size: int, rates: Rates = RATES) -> float:
    """Bytes a second that each of `size` ranks, `stride` ranks apart, exchanges in a ring.

    Megatron-Core numbers ranks by tensor, context, data and then pipeline parallelism, so that the first of these stay
    within a node. A ring that leaves it uses the network ports of all its ranks in a node.
    """
    inside = max(1, min(size, gpu.gpus_per_node // stride))
    rate = gpu.nvlink_gb_s if inside == size else min(gpu.nvlink_gb_s, gpu.network_gb_s * inside)
    return rate * 1e9 * rates.link


def _micro_batch(
    stage: Stage, model: ModelConfig, vocab_size: int, parallel: ParallelConfig, work: Work, gpu: Gpu, rates: Rates
) -> _Pass:
    layer, tensor = Layer.of(model), parallel.tensor
    tokens = work.micro_batch * work.sequence / parallel.context
    weights = (layer.attention + layer.active * layer.expert) / tensor  # of experts too, whatever expert_tensor is
    products = 2 * tokens * (weights + layer.router / (tensor if parallel.sequence else 1))
    scores = 4 * tokens * (work.sequence + 1) / 2 * layer.query / tensor
    again = _recomputed(layer, stage, parallel, tokens, products)

    rate = _products(gpu, work.precision, rates)
    plain = "bf16" if work.precision == "fp8" else work.precision  # of attention and the output layer
    head = layer.query // layer.heads
    fused = peak(gpu, plain) * (1.0 if head >= 128 else rates.small_heads)
    attention_forward = scores / (fused * rates.attention_forward)
    attention_backward = ATTENTION_BACKWARD * scores / (fused * rates.attention_backward)
    bytes_forward, bytes_backward = _pointwise(layer, parallel, work, tokens)
    bandwidth = gpu.memory_gb_s * 1e9 * rates.memory
    messages = _tensor_messages(layer, parallel, work, tokens, gpu, rates)
    exchanged = _dispatch(layer, parallel, work, tokens, gpu, rates)
    around = _context_messages(layer, parallel, work, gpu, rates)
    ring = (max(0.0, around - attention_forward), max(0.0, 2 * around - attention_backward))

    forward = products / rate + attention_forward + bytes_forward / bandwidth + messages + exchanged + ring[0]
    idle = max(0.0, rates.launch_seconds - forward)  # small layers: nothing to do until the next kernel is started
    layers = stage.layers
    output = 2 * tokens * model.hidden_size * padded(vocab_size, tensor) / tensor if stage.output else 0.0
    output_seconds = output / _products(gpu, plain, rates)
    accumulated = 2 * work.gradient_bytes * stage.parameters / bandwidth  # every micro-batch adds to the gradients
    first = layers * (forward + idle) + output_seconds
    matmul = layers * (3 * products + again.products) / rate + (4 if parallel.recompute_logits else 3) * output_seconds
    attention = layers * (attention_forward * (1 + again.scores) + attention_backward)
    pointwise = layers * ((bytes_forward * (1 + again.pointwise) + bytes_backward) / bandwidth + 3 * idle) + accumulated
    rounds = 2 + again.layers
    tensor_seconds, expert_seconds = layers * rounds * messages, layers * rounds * exchanged
    context_seconds = layers * (ring[0] * (1 + again.layers) + ring[1])
    total = matmul + attention + pointwise + tensor_seconds + expert_seconds + context_seconds
    return _Pass(matmul, attention, pointwise, tensor_seconds, context_seconds, expert_seconds, 1 - first / total)


def _products(gpu: Gpu, precision: str, rates: Rates) -> float:
    """FLOP/s that products with weights reach."""
    shares = {"bf16": rates.bf16_matmul, "fp8": rates.fp8_matmul, "fp32": rates.fp32_matmul}
    return peak(gpu, precision) * shares[precision]


@dataclass(frozen=True)
class _Again:
    """What is computed a second time: FLOPs of a layer's products, shares of its scores and pointwise kernels, and of
    whole layers (the mean of a stage)."""

    products: float = 0.0
    scores: float = 0.0
    pointwise: float = 0.0
    layers: float = 0.0


def _recomputed(layer: Layer, stage: Stage, parallel: ParallelConfig, tokens: float, products: float) -> _Again:
    if parallel.recompute == "full":
        share = recomputed_layers(parallel, stage.chunks)
        return _Again(share * products, share, share, share)
    if parallel.recompute == "none":
        return _Again()
    named = set(parallel.recompute_modules)
    # the second product is not needed
    first = 2 * tokens * layer.active * 2 * layer.hidden * layer.width / parallel.tensor
    return _Again(
        products=first if named & {"mlp", "moe"} else 0.0,
        scores=1.0 if "core_attn" in named else 0.0,
        pointwise=0.5 * ("layernorm" in named) + 0.5 * bool(named & {"mlp", "moe"}),
    )


def _pointwise(layer: Layer, parallel: ParallelConfig, work: Work, tokens: float) -> tuple[float, float]:
    """Bytes that pointwise kernels of a layer read and write, forward and backward.

    Forward: two norms (2 h each), two residual sums (3 h each), rotations, SwiGLU (3 f). Backward: the same with
    gradients read as well. With FP8, inputs of products are written twice more, in 1 byte (they are transposed too).
    """
    hidden = layer.hidden / (parallel.tensor if parallel.sequence else 1)
    rotated = (layer.query + layer.key_value) / parallel.tensor
    width = layer.width * layer.active / parallel.tensor
    forward = work.element_bytes * (10 * hidden + 2 * rotated + 3 * width)
    backward = work.element_bytes * (12 * hidden + 2 * rotated + 5 * width)
    if work.precision == "fp8":
        attention = layer.query / parallel.tensor
        forward += 4 * (2 * hidden + attention + width)
        backward += 4 * (2 * hidden + attention + 2 * layer.key_value / parallel.tensor + 2 * width)
    return tokens * forward, tokens * backward


def _tensor_messages(
    layer: Layer, parallel: ParallelConfig, work: Work, tokens: float, gpu: Gpu, rates: Rates
) -> float:
    """Exposed seconds of a layer's forward pass: a gather and a scatter of the stream (or a reduction) around attention
    and around a dense feed-forward layer; around experts, of what was dispatched to them, within their own group."""
    if parallel.tensor == 1:
        return 0.0
    blocks = 1 if layer.experts else 2
    share = (parallel.tensor - 1) / parallel.tensor
    seconds = 2 * blocks * share * tokens * layer.hidden / group_bandwidth(gpu, 1, parallel.tensor, rates)
    if layer.experts:
        group = parallel.expert_tensor or parallel.tensor
        sent = tokens / parallel.tensor * layer.active * layer.hidden * (group - 1)
        seconds += 2 * sent / group_bandwidth(gpu, 1, group, rates)
    return rates.exposed * work.element_bytes * seconds


def _context_messages(layer: Layer, parallel: ParallelConfig, work: Work, gpu: Gpu, rates: Rates) -> float:
    """Seconds in which keys and values go once around the ring of the context-parallel group."""
    if parallel.context == 1:
        return 0.0
    tokens = work.micro_batch * work.sequence / parallel.context
    volume = 2 * work.element_bytes * tokens * layer.key_value / parallel.tensor * (parallel.context - 1)
    inside = parallel.tensor * parallel.context <= gpu.gpus_per_node
    rate = gpu.nvlink_gb_s if inside else gpu.network_gb_s  # the slowest hop decides
    return volume / (rate * 1e9 * rates.link)


def _dispatch(layer: Layer, parallel: ParallelConfig, work: Work, tokens: float, gpu: Gpu, rates: Rates) -> float:
    """Seconds in which a layer's tokens go to their experts and back, forward."""
    if parallel.expert == 1:
        return 0.0
    own = tokens / parallel.tensor  # sequence parallelism
    volume = 2 * work.element_bytes * own * layer.active * layer.hidden * (parallel.expert - 1) / parallel.expert
    return volume / group_bandwidth(gpu, parallel.expert_tensor or parallel.tensor, parallel.expert, rates)


def _between_stages(model: ModelConfig, parallel: ParallelConfig, work: Work, gpu: Gpu, rates: Rates) -> float:
    """Exposed seconds of messages between stages; the interleaved schedule overlaps them."""
    if parallel.pipeline == 1:
        return 0.0
    tokens = work.micro_batch * work.sequence / parallel.context
    stride = parallel.tensor * parallel.context * parallel.data
    inside = stride * parallel.pipeline <= gpu.gpus_per_node
    rate = (gpu.nvlink_gb_s if inside else gpu.network_gb_s) * 1e9 * rates.link
    message = work.element_bytes * tokens * model.hidden_size / (parallel.tensor if parallel.sequence else 1) / rate
    share = rates.exposed if parallel.virtual_pipeline > 1 and parallel.overlap_p2p else 1.0
    return share * 2 * parallel.virtual_pipeline * work.micro_batches(parallel) * message


def _data(stage: Stage, one: _Pass, parallel: ParallelConfig, work: Work, gpu: Gpu, rates: Rates) -> float:
    """Exposed seconds of reducing gradients and, with the distributed optimizer, gathering weights.

    Replicas of an expert are `expert_tensor` * `expert` ranks apart: fewer than those of all else, and where they are
    on different nodes, a ring of them has fewer ports of each node.
    """
    replicas = parallel.data * parallel.context
    stride = (parallel.expert_tensor or parallel.tensor) * parallel.expert
    per_byte = rings = 0.0
    for parameters, first, size in (
        (stage.dense, parallel.tensor, replicas),
        (stage.sparse, stride, parallel.tensor * replicas // stride),
    ):
        if parameters and size > 1:
            per_byte += parameters * (size - 1) / size / group_bandwidth(gpu, first, size, rates)
            rings += math.ceil(parameters / max(BUCKET, BUCKET_SHARE * size)) * size * rates.hop_seconds
    reduce = work.gradient_bytes * per_byte + rings
    gather = work.element_bytes * per_byte + rings
    if not parallel.distributed_optimizer:
        reduce, gather = 2 * reduce, 0.0  # an all-reduce is both
    # the last micro-batch's backward pass hides the one, the first one's forward pass the other
    hidden = one.total * one.backward if parallel.overlap_grad_reduce else 0.0
    early = one.total * (1 - one.backward) if parallel.overlap_param_gather else 0.0
    return max(0.0, reduce - hidden) + max(0.0, gather - early)


def _optimizer(stage: Stage, parallel: ParallelConfig, work: Work, gpu: Gpu, rates: Rates) -> float:
    """Seconds of the update: reads the gradient twice (its norm first), reads and writes 12 bytes of state (with the
    fp32 weights), writes bf16 where the model is in it."""
    replicas = parallel.data * parallel.context if parallel.distributed_optimizer else 1
    expert = (parallel.expert_tensor or parallel.tensor) * parallel.expert
    shares = max(1, parallel.tensor * replicas // expert) if parallel.distributed_optimizer else 1
    own = stage.dense / replicas + stage.sparse / shares
    written = 0 if work.precision == "fp32" else work.element_bytes
    return (2 * work.gradient_bytes + 24 + written) * own / (gpu.memory_gb_s * 1e9 * rates.memory)
