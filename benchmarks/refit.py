"""Refit throughput: the weights of a model of 100M parameters into a process beside the trainer, against a plain copy.

The receiver takes each tensor (a copy into memory of its own) and drops it, so what is measured is the way to an
engine, without the engine's own loading. The copy moves the same bytes within one process, by one thread, in the same
run.
"""

import os
import pickle
import statistics
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import ra3_megatron.mcore  # noqa: F401
from benchmarks.measure import Timing, alternate
from benchmarks.processes import launch
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.hf.families import family_for
from ra3_megatron.mcore import startup
from ra3_megatron.mcore.model import build_model
from ra3_megatron.rollout.refit.receiver import StreamWeights
from ra3_megatron.rollout.refit.refit import Refit, RefitStats

MODEL = ModelConfig(num_layers=12, hidden_size=768, ffn_hidden_size=2048, num_attention_heads=12, num_query_groups=4)
VOCABULARY = 32_000
BUCKET = 16 * 2**20
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 process": (1, {}),
    "TP 2": (2, {"tensor": 2}),
    "PP 2": (2, {"pipeline": 2}),
    "1 process, broadcast": (1, {}),
}
REFIT, COPY = "refit", "copy"


@dataclass(frozen=True)
class RefitResult:
    """Seconds of one refit and of one copy, by layout."""

    parameters: int
    nbytes: int
    timings: dict[str, dict[str, Timing]]


def measure(repeats: int) -> RefitResult:
    """Time `repeats` refits at each layout, alternating with copies."""
    timings = {}
    parameters = nbytes = 0
    for label, (processes, keys) in LAYOUTS.items():
        transport = "broadcast" if "broadcast" in label else "shared"
        timings[label], parameters, nbytes, _ = launch(processes, in_process, keys, transport, repeats)
    return RefitResult(parameters, nbytes, timings)


def in_process(
    keys: dict[str, Any],
    transport: Any,
    repeats: int,
    config: ModelConfig = MODEL,
    vocab_size: int = VOCABULARY,
    bucket: int = BUCKET,
) -> tuple[dict[str, Timing], int, int, dict[str, list[float]]]:
    """What one process of a layout measures: timings of refits and copies, parameters, bytes that were sent, and the
    seconds of each part (RefitStats) of every refit, those of the first one, which opens the buckets' memory, in front.

    It joins process groups and leaves them.
    """
    parallel = ParallelConfig(threads=1, **keys)
    runtime = startup.initialize(parallel, seed=1)
    seed = 1 if runtime.device.type == "cpu" else None  # drawing a billion weights on the host takes half a minute
    model = build_model(config, parallel, runtime, vocab_size, np.ones((1, vocab_size), dtype=bool), seed)
    if seed is None:
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(std=0.02)
    links = family_for(config).links(config, vocab_size)
    refit = Refit(
        model,
        runtime,
        links,
        placement="server",
        receivers=1,
        transport=transport,
        bucket_bytes=bucket,
        host="127.0.0.1",
    )
    receiver = _Receiver() if refit.is_sender else None
    updates = [receiver.update] if receiver else []
    parts: dict[str, list[float]] = {}

    def send() -> RefitStats:
        sent = refit.send(updates, 0)
        for name, seconds in sent.parts.items():
            parts.setdefault(name, []).append(seconds)
        return sent

    stats = send()
    source = torch.ones(stats.nbytes // 4, device=runtime.device)
    target = torch.empty_like(source)

    def copy() -> None:
        if runtime.is_main:
            target.copy_(source)
        runtime.barrier()

    def wait() -> None:
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)

    timings = alternate({REFIT: send, COPY: copy}, repeats, wait=wait)
    refit.close()
    if receiver:
        receiver.close()
    runtime.barrier()
    startup.shutdown()
    return timings, sum(int(np.prod(link.slot.shape)) for link in links), stats.nbytes, parts


def usual(seconds: list[float], repeats: int) -> float:
    """Median of a part over the repeats, without the refits before them."""
    return statistics.median(seconds[-repeats:])


class _Receiver:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.receiver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def update(self, version: int, source: StreamWeights) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        pickle.dump(source, self._process.stdin)
        self._process.stdin.flush()
        if pickle.load(self._process.stdout) != len(source.manifest()):
            raise RuntimeError("the receiver did not take all tensors")

    def close(self) -> None:
        self._process.communicate()
