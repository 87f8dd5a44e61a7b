"""Conversion between Hugging Face and Megatron-Core: seconds against a plain copy of the files, and peak memory.

The checkpoint is made for the purpose: a Llama architecture, random numbers in bf16, shards of a third of the whole.
Each conversion runs in a process of its own and is timed there, without imports. Peak memory is the high-water mark of
the process's resident memory (`VmHWM`), less that of a process that imports the same modules and converts nothing.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Timing
from ra3_megatron.config.model import ModelConfig

_LLAMA: dict[str, Any] = {
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "tied_embeddings": False,
    "precision": "bf16",
}
SIZES = {
    "0.4 GB": (ModelConfig(num_layers=8, hidden_size=1024, ffn_hidden_size=4096, **_LLAMA), 32_000),
    "3 GB": (ModelConfig(num_layers=16, hidden_size=2048, ffn_hidden_size=8192, **_LLAMA), 128_256),
}
"""Architecture and vocabulary; the latter has the tensors of Llama 3.2 1B, its embeddings untied."""
COPY = "copy of the files"
_WORTH_WORKERS = 2**30
"""Bytes of a checkpoint from which on several workers are measured: a smaller one is a file or two."""
_CALLS = {
    "HF to Megatron": "import_hf(Path('hf'), Path('checkpoint'), workers={})",
    "Megatron to HF": "export_hf(Path('checkpoint'), Path('back'), max_shard_bytes={shard}, workers={})",
}


@dataclass(frozen=True)
class ConversionResult:
    """Seconds of each side, and the memory of those that were measured."""

    size: str
    bytes: int
    largest_shard: int
    largest_tensor: int
    timings: dict[str, Timing]
    memory: dict[str, int]
    """Bytes above those of a process that converts nothing."""


def measure(size: str, folder: Path, repeats: int) -> ConversionResult:
    """Convert a checkpoint of this size there and back `repeats` times, below `folder`."""
    total, shard, tensor = make(size, folder / "hf")
    idle = _run(folder, "pass")[1]
    seconds: dict[str, list[float]] = {COPY: []}
    memory: dict[str, int] = {}
    for _ in range(repeats):
        seconds[COPY].append(_copy(folder / "hf", folder / "copy"))
        shutil.rmtree(folder / "copy")
        for workers in (1, 2) if total > _WORTH_WORKERS else (1,):
            for name, call in _CALLS.items():
                label = name if workers == 1 else f"{name}, {workers} workers"
                taken, peak = _run(folder, call.format(workers, shard=shard))
                seconds.setdefault(label, []).append(taken)
                if workers == 1:
                    memory[label] = max(memory.get(label, 0), peak - idle)
            shutil.rmtree(folder / "checkpoint")
            shutil.rmtree(folder / "back")
    return ConversionResult(size, total, shard, tensor, {k: Timing(v) for k, v in seconds.items()}, memory)


def make(size: str, folder: Path) -> tuple[int, int, int]:
    """Write the checkpoint; bytes of its tensors, of its largest shard and of its largest tensor."""
    from ra3_megatron.hf.families import family_for
    from ra3_megatron.hf.files import write_config
    from ra3_megatron.hf.safetensors_files import Writer
    from ra3_megatron.hf.source import INDEX
    from ra3_megatron.hf.weights import manifest

    model, vocab_size = SIZES[size]
    shapes = list(manifest(family_for(model).links(model, vocab_size)).items())
    sizes = [2 * math.prod(shape) for _, shape in shapes]
    most = sum(sizes) / 3
    shards: list[list[int]] = [[]]
    for number, nbytes in enumerate(sizes):
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + nbytes > most:
            shards.append([])
        shards[-1].append(number)
    folder.mkdir(parents=True)
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        writer = Writer(folder / file, [shapes[n] for n in shard], torch.bfloat16)
        for name, shape in (shapes[n] for n in shard):
            writer.write(name, torch.randn(shape, dtype=torch.bfloat16))
            places[name] = file
        writer.close()
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": places}))
    write_config(folder, model, vocab_size, {"bos_token_id": 1, "eos_token_id": 2})
    return sum(sizes), max(sum(sizes[n] for n in shard) for shard in shards), max(sizes)


def _run(folder: Path, call: str) -> tuple[float, int]:
    """Seconds and peak resident memory of a process that does `call`."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.conversion", call],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        check=True,
    )
    seconds, peak = json.loads(result.stdout.splitlines()[-1])
    return seconds, peak


def _copy(source: Path, target: Path) -> float:
    begin = time.perf_counter()
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as stream:
            os.fsync(stream.fileno())
    return time.perf_counter() - begin


def _child(call: str) -> None:
    from ra3_megatron.hf.exporting import export_hf
    from ra3_megatron.hf.importing import import_hf

    begin = time.perf_counter()
    exec(call, {"Path": Path, "export_hf": export_hf, "import_hf": import_hf})
    seconds = time.perf_counter() - begin
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps([seconds, int(line.split()[1]) * 1024]))


if __name__ == "__main__":
    _child(sys.argv[1])
