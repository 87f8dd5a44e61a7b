"""`ra3 convert`: Hugging Face folders to checkpoints and back, and the comparison of the two."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.hf.checking import SEQUENCES, Check, LogitResult, TensorResult
from ra3_megatron.hf.conversion import Progress as HFProgress
from ra3_megatron.hf.exporting import export_hf
from ra3_megatron.hf.importing import import_hf
from ra3_megatron.mcore import startup
from ra3_megatron.report.progress import Progress, bytes_progress

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_NAMED = 5
"""Tensors that differ and are named."""


def hf_to_megatron(folder: Path, out: Path, dtype: str | None = None, workers: int = 1) -> int:
    """Convert a Hugging Face folder to a checkpoint; the exit code. Raises what `import_hf` raises."""
    _check_workers(workers)
    with _progress("converting, MB") as progress:
        done = import_hf(folder, out, _checked(dtype), workers, progress)
    _say(out, done)
    return 0


def megatron_to_hf(
    checkpoint: Path,
    out: Path,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    template: Path | None = None,
    workers: int = 1,
) -> int:
    """Convert a checkpoint to a Hugging Face folder; the exit code. Raises what `export_hf` raises.

    max_shard_size: such as `5GB` or `500MiB`.
    """
    _check_workers(workers)
    size = parse_size(max_shard_size)
    with _progress("converting, MB") as progress:
        done = export_hf(checkpoint, out, _checked(dtype), size, template, workers, progress)
    _say(out, done)
    return 0


def check(folder: Path, checkpoint: Path, tensors_only: bool = False) -> int:
    """Compare a Hugging Face folder and a checkpoint, and print what was found; 0 when they are the same model, else 1.

    tensors_only: compute no logits, for which the model must fit into memory. Raises UserError when they cannot be
    compared.
    """
    comparison = Check(folder, checkpoint)
    with _progress("comparing, MB") as progress:
        tensors = comparison.tensors(progress)
    console = Console(highlight=False)
    for line in _tensor_lines(tensors):
        console.print(line, markup=False, soft_wrap=True)
    if tensors_only:
        console.print("logits: not compared (--tensors-only)")
        return 1 if tensors.different else 0
    runtime = startup.initialize(ParallelConfig(), seed=1)
    try:
        logits = comparison.logits(runtime)
    finally:
        startup.shutdown()
    for line in _logit_lines(logits):
        console.print(line, markup=False, soft_wrap=True)
    return 0 if logits.passes and not tensors.different else 1


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `200MB`, `1.5GiB`. Raises UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise UserError(f"--max-shard-size={text}: must be a size such as 5GB or 200MB")
    return size


@contextmanager
def _progress(name: str) -> Iterator[HFProgress]:
    """Shows megabytes, their rate and the time left, on stderr."""
    with Progress(console=Console(stderr=True)) as progress:
        yield bytes_progress(progress, name)


def _say(out: Path, done: bool) -> None:
    Console(highlight=False).print(
        str(out) if done else f"{out} (complete since an earlier run)", markup=False, soft_wrap=True
    )


def _tensor_lines(result: TensorResult) -> Iterator[str]:
    stored = f"{result.compared} tensors compared in {result.dtype}"
    if not result.different:
        yield f"tensors: all equal ({stored})"
        return
    yield f"tensors: {len(result.different)} differ ({stored}):"
    for name, difference in result.different[:_NAMED]:
        yield f"  {name}: largest difference {difference:.3g}"
    if len(result.different) > _NAMED:
        yield f"  and {len(result.different) - _NAMED} more"


def _logit_lines(result: LogitResult) -> Iterator[str]:
    where = f"sequence {result.sequence}, position {result.position}, token {result.token}"
    sign = "within" if result.passes else "above"
    yield f"logits: largest difference {result.difference:.2e} ({where}), {sign} the tolerance {result.tolerance:.2e}"
    yield (
        f"  {SEQUENCES} random sequences of {result.tokens} tokens, half of them at positions 0 to "
        f"{result.tokens - 1}, half spread over 0 to {result.longest - 1}; fp32 arithmetic on both sides"
    )


def _checked(dtype: str | None) -> str | None:
    if dtype not in (None, "fp32", "bf16"):
        raise UserError(f"--dtype={dtype}: must be fp32 or bf16")
    return dtype


def _check_workers(workers: int) -> None:
    if workers < 1:
        raise UserError(f"--workers={workers}: must be at least 1")
