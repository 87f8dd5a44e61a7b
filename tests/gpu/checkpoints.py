"""Checkpoints lose no bit between CPU and GPU, and a run that resumes on a GPU is the run that was never stopped.

CPU -> device -> CPU: a CPU process trains and saves; this process loads everything into a trainer of its own and saves
that; a CPU process does the same once more. The three checkpoints hold the same tensors, bit for bit: weights, Adam's
moments, the fp32 weights of bf16 models, the number of steps.

The CPU processes are `python -m tests.gpu.checkpoints begin|pass FOLDER`, and see no GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tests.gpu.evidence import Evidence

if TYPE_CHECKING:
    from ra3_megatron.config.model import ModelConfig
    from ra3_megatron.mcore.startup import Runtime
    from ra3_megatron.mcore.trainer import Trainer
    from tests.gpu.setting import Setting

PRECISIONS = ("fp32", "bf16")
STEPS = 4
SAVED_AFTER = 2
SECONDS = 300.0
"""That a CPU process may take."""


def run(evidence: Evidence, setting: Setting) -> None:
    """Round trip, then resumed runs."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product; deterministic ones need it
    folder = setting.folder
    with evidence.attempt("a CPU process that trains and saves"):
        _on_cpu("begin", folder)
    for precision in PRECISIONS:
        with evidence.attempt(f"CPU - device, {precision}"):
            pass_on(folder / precision / "1", folder / precision / "2", setting.runtime, precision)
    with evidence.attempt("a CPU process that loads and saves"):
        _on_cpu("pass", folder)
    device = "GPU" if setting.cuda else "another process"
    for precision in PRECISIONS:
        with evidence.attempt(f"CPU - device - CPU, {precision}"):
            compare(evidence, folder / precision, precision, device)
    resumed = ["bf16", *setting.recipes(architecture("bf16"), evidence)]
    for precision in resumed:
        with evidence.attempt(f"resume {precision}"):
            resume(evidence, setting, precision)


def compare(evidence: Evidence, folder: Path, precision: str, device: str) -> None:
    """Count the tensors of the three checkpoints that are not the same bits."""
    first, second, third = (stored(folder / str(number)) for number in (1, 2, 3))
    for name, found in ((f"CPU - {device}", second), (f"CPU - {device} - CPU", third)):
        evidence.check(
            f"{name}, {precision}: tensors that are not the same bit for bit",
            unequal(found, first),
            0,
            unit=f"of {len(first)}",
        )


def unequal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> int:
    """Tensors that are missing, of another shape or type, or have another bit."""
    names = found.keys() | expected.keys()
    return sum(
        not (name in found and name in expected and same_bits(found[name], expected[name])) for name in sorted(names)
    )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same bits: other than `torch.equal`, NaN equals itself, and -0 is not 0."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    flat = [tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    return bool(torch.equal(*flat))


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, and the number of optimizer steps."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load_plain_tensors(str(folder))
    tensors = {n: value for n, value in loaded.items() if isinstance(value, Tensor) and "_extra_state" not in n}
    if not any(name.startswith("optimizer.") for name in tensors):
        raise RuntimeError(f"{folder.name}: holds no optimizer state")
    return {**tensors, "steps": torch.tensor(loaded["optimizer"]["step"])}


def resume(evidence: Evidence, setting: Setting, precision: str, strict: bool = True, note: str = "") -> None:
    """Steps without a stop against steps before and behind a checkpoint, with torch's deterministic algorithms.

    strict: an operation that has none is an error; then once more without, and the note says which it was.
    """
    from ra3_megatron.mcore import checkpoint

    folder = setting.folder / f"resume-{precision}"
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    try:
        trainer = new_trainer(setting.runtime, precision)
        train(trainer, setting.runtime, 0, SAVED_AFTER)
        checkpoint.save(folder, trainer.model, setting.runtime, {"step": SAVED_AFTER}, trainer)
        expected = train(trainer, setting.runtime, SAVED_AFTER, STEPS)
        again = new_trainer(setting.runtime, precision)
        train(again, setting.runtime, 50, 51)  # it has other weights and a history of its own
        checkpoint.load(folder, again.model, setting.runtime, again)
        found = train(again, setting.runtime, SAVED_AFTER, STEPS)
    except RuntimeError as error:
        if not strict or "deterministic" not in str(error):
            raise
        note = f"deterministic but for: {str(error).split(chr(10))[0][:120]}"
        return resume(evidence, setting, precision, strict=False, note=note)
    finally:
        torch.use_deterministic_algorithms(False)
    evidence.check(
        f"resumed in {precision}: losses, gradient norms and weights that are not the same bit for bit",
        unequal(found, expected),
        0,
        unit=f"of {len(expected)}",
        note=note,
    )
    return None


def architecture(precision: str) -> ModelConfig:
    """Tiny, with dimensions that FP8 products can have, in whole blocks of 128 values."""
    from ra3_megatron.config.model import ModelConfig
    from tests.mcore.small_models import MODEL

    shape = {"hidden_size": 128, "ffn_hidden_size": 128, "head_dim": 32, "precision": precision}
    return ModelConfig(**{**MODEL.model_dump(), **shape})


def new_trainer(runtime: Runtime, precision: str) -> Trainer:
    """With initial weights."""
    from ra3_megatron.config.model import ParallelConfig
    from tests.mcore.small_models import make_trainer

    return make_trainer(ParallelConfig(threads=1), runtime, STEPS, architecture(precision))


def train(trainer: Trainer, runtime: Runtime, first: int, last: int) -> dict[str, Tensor]:
    """Steps `first` to `last`: losses and gradient norms, and the weights at the end."""
    from ra3_megatron.mcore.loss import PolicyLoss
    from tests.mcore.small_models import make_documents, micro_batches, put_in_rows, weights

    results = []
    for step in range(first, last):
        rows = put_in_rows(make_documents(12, seed=200 + step))
        result = trainer.step(micro_batches(rows, runtime, 4), PolicyLoss())
        results.append([result.loss, result.grad_norm])
    return {**weights(trainer.model, runtime), "results": torch.tensor(results, dtype=torch.float64)}


def pass_on(source: Path, target: Path, runtime: Runtime, precision: str) -> None:
    """Load a checkpoint into a trainer that had other weights, and save what that holds."""
    from ra3_megatron.mcore import checkpoint

    trainer = new_trainer(runtime, precision)
    train(trainer, runtime, 50, 51)
    record: dict[str, Any] = checkpoint.load(source, trainer.model, runtime, trainer)
    checkpoint.save(target, trainer.model, runtime, {"step": record["step"]}, trainer)


def _on_cpu(role: str, folder: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu.checkpoints", role, str(folder)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=SECONDS, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])


def main(role: str, folder: Path) -> None:
    """What a CPU process does."""
    from ra3_megatron.config.model import ParallelConfig
    from ra3_megatron.mcore import checkpoint, startup

    runtime = startup.initialize(ParallelConfig(threads=1), seed=1)
    for precision in PRECISIONS:
        at = folder / precision
        if role == "begin":
            trainer = new_trainer(runtime, precision)
            train(trainer, runtime, 0, SAVED_AFTER)
            checkpoint.save(at / "1", trainer.model, runtime, {"step": SAVED_AFTER}, trainer)
        elif (at / "2").is_dir():
            pass_on(at / "2", at / "3", runtime, precision)
    startup.shutdown()


if __name__ == "__main__":
    from tests.gpu.part import prepare

    prepare()
    main(sys.argv[1], Path(sys.argv[2]))
