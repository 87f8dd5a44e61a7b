"""What a device does at best, measured by the processes of a cell at once: products, attention, copies, messages.

Rates are the best of several repetitions. All processes measure at the same time, so that on one machine they share its
cores and its memory as they do when they train.
"""

import os
import socket
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ra3_megatron.config.run import RunConfig
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.scaling.counts import Layer

SQUARES = {"cpu": (256, 512, 1024), "cuda": (2048, 4096, 8192)}
"""Sizes of the square products among which the best is the peak."""
COPIED = {"cpu": 64 * 2**20, "cuda": 2**30}
"""Bytes of a copy."""
SENT = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
"""Bytes of a message."""
SECONDS = 0.1
"""Time that is spent on each figure, at least."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BACKWARD = 2.5
"""FLOPs of the backward pass of attention, in forward passes, as the planner counts them."""


def probe(config: RunConfig, runtime: Runtime) -> dict[str, Any]:
    """Figures of this process's device. Collective. TFLOP/s, GB/s, seconds, GiB; shares of the precision's peak.

    `links` holds what two processes exchange on one node (`node`) and on two (`network`), where there are such.
    """
    device = runtime.device
    precision = config.model.precision if config.model.precision in DTYPES else "bf16"  # FP8 is not measured
    peaks: dict[str, float] = {}
    sizes: dict[str, dict[int, float]] = {}
    for name, dtype in DTYPES.items():
        runtime.barrier()
        sizes[name] = {n: _product(n, n, n, dtype, device) / 1e12 for n in SQUARES[device.type]}
        peaks[name] = max(sizes[name].values())
    runtime.barrier()
    shares = _shares(config, DTYPES[precision], peaks[precision] * 1e12, device)
    runtime.barrier()
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "tflops": peaks,
        "squares": sizes,
        "shares": shares,
        "copy_gb_s": _copy(device) / 1e9,
        "memory_gib": _memory(device) / 2**30,
        "node": node(),
    }
    return {**found, "links": _links(runtime)}


def node() -> str:
    """Name of this node (Slurm's number of it: nodes of a test may share a host)."""
    return f"{socket.gethostname()}:{os.environ.get('SLURM_NODEID', '0')}"


def best_seconds(work: Callable[[], Any], device: torch.device, seconds: float = SECONDS) -> float:
    """Seconds of the fastest call."""
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    repeats = 0
    while repeats < 3 or time.perf_counter() < end:
        _wait(device)
        begin = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - begin)
        repeats += 1
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _product(rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of [rows, inner] @ [inner, columns]."""
    one = torch.randn(rows, inner, device=device).to(dtype)
    other = torch.randn(inner, columns, device=device).to(dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    return 2.0 * rows * inner * columns / best_seconds(lambda: torch.mm(one, other, out=out), device)


def _shares(config: RunConfig, dtype: torch.dtype, peak: float, device: torch.device) -> dict[str, float]:
    """Shares of the peak in this cell's own products and attention."""
    model, parallel = config.model, config.parallel
    layer = Layer.of(model)
    micro = config.warm_start.micro_batch_size
    tokens = max(1, micro * model.context_length // parallel.context)
    width = max(1, 2 * layer.width // parallel.tensor)
    product = _product(tokens, layer.hidden, width, dtype, device)
    heads, channels = max(1, layer.heads // parallel.tensor), layer.query // layer.heads
    shape = (micro, heads, model.context_length, channels)
    query, key, value = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3))
    flops = 4.0 * micro * model.context_length * (model.context_length + 1) / 2 * heads * channels
    with torch.no_grad():
        forward = best_seconds(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True), device)

    def both() -> None:
        F.scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()

    backward = max(best_seconds(both, device) - forward, 1e-9)
    return {
        "matmul": product / peak,
        "attention_forward": flops / forward / peak,
        "attention_backward": BACKWARD * flops / backward / peak,
    }


def _copy(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2.0 * COPIED[device.type] / best_seconds(lambda: target.copy_(source), device)


def _memory(device: torch.device) -> float:
    """Bytes of this process's share of the memory."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return psutil.virtual_memory().total / local


def _links(runtime: Runtime) -> dict[str, dict[str, float]]:
    """Of process 0 with another one on its node, and with one on another node."""
    nodes = runtime.gather_all(node())
    others = {"node": [r for r in range(1, len(nodes)) if nodes[r] == nodes[0]]}
    others["network"] = [r for r in range(1, len(nodes)) if nodes[r] != nodes[0]]
    found = {}
    for name, ranks in others.items():
        if ranks:
            pair = [0, ranks[0]]
            group = dist.new_group(pair)
            values = _link(pair, group, runtime) if runtime.rank in pair else {}
            found[name] = runtime.broadcast(values)
    return found


def _link(pair: list[int], group: Any, runtime: Runtime) -> dict[str, float]:
    """GB/s of an all-reduce (bytes that each process sends) and of messages to and fro; seconds of a hop."""
    size = SENT[runtime.device.type]
    tensor, tiny = torch.ones(size // 4, device=runtime.device), torch.ones(1, device=runtime.device)

    def timed(work: Callable[[], Any], repeats: int) -> float:
        work()
        best = float("inf")
        for _ in range(repeats):
            _wait(runtime.device)
            begin = time.perf_counter()
            work()
            _wait(runtime.device)
            best = min(best, time.perf_counter() - begin)
        return best

    def to_and_fro() -> None:
        for source in pair:
            if runtime.rank == source:
                dist.send(tensor, pair[1 - pair.index(source)], group=group)
            else:
                dist.recv(tensor, source, group=group)

    reduce = timed(lambda: dist.all_reduce(tensor, group=group), 5)
    hop = timed(lambda: dist.all_reduce(tiny, group=group), 30) / 2
    message = timed(to_and_fro, 5) / 2
    return {"all_reduce_gb_s": size / reduce / 1e9, "message_gb_s": size / message / 1e9, "hop_seconds": hop}
