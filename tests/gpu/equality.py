"""The project's model on this device against the same model on a CPU, in fp32: logits, losses, gradients, weights.

Each side is a process of its own (`python -m tests.gpu.equality FILE`), as Megatron-Core is prepared for a CPU only
where no GPU is seen. On a GPU there are four: without Transformer Engine; as the project has it, which in fp32 takes
Megatron-Core's layers and Transformer Engine's optimizer; and with Transformer Engine's layers, which multiply fp32
matrices in TF32 (10 bits of significand), whatever torch is told: once without that, once to say how far it is off.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tests.gpu.evidence import Evidence, largest

if TYPE_CHECKING:
    from tests.gpu.setting import Setting

Numbers = dict[str, dict[str, Tensor]]
"""Kind -> name -> values."""

STEPS = 3
MOST = {
    "initial weights": 0.0,
    "logits": 1e-5,
    "log-probabilities": 1e-5,
    "losses": 1e-5,
    "gradients": 1e-4,
    "weights": 1e-4,
}
"""Greatest relative difference of each kind in fp32, over the tensors of that kind. Weights have moved by Adam, which
divides small gradients by their own size."""
SECONDS = 240.0
"""That one side may take."""
TF32 = "GPU, Transformer Engine's layers with TF32"
WITHOUT, WITH = "RA3_WITHOUT_TE", "RA3_WITH_TE"
"""Variables of a side that does without Transformer Engine, and of one that takes its layers in fp32, too."""


def run(evidence: Evidence, setting: Setting) -> None:
    """Compute both sides, compare."""
    from ra3_megatron.mcore.hardware import has_transformer_engine

    cpu = Side(setting.folder / "cpu.pt", {"CUDA_VISIBLE_DEVICES": ""})
    names: dict[str, dict[str, str]] = {"CPU again": {}}
    if setting.cuda:
        names = {"GPU": {}, "GPU, without Transformer Engine": {WITHOUT: "1"}}
        if has_transformer_engine(setting.device):
            exact = {WITH: "1", "NVIDIA_TF32_OVERRIDE": "0"}
            names |= {"GPU, Transformer Engine's layers without TF32": exact, TF32: {WITH: "1"}}
        else:
            evidence.missing("Transformer Engine's layers", "it does not load")
    else:
        evidence.missing("both kinds of layers, with and without TF32", "needs a GPU")
    sides = {name: Side(setting.folder / f"{n}.pt", environment) for n, (name, environment) in enumerate(names.items())}
    expected = cpu.numbers()
    for name, side in sides.items():
        with evidence.attempt(name):
            for kind, worst in differences(side.numbers(), expected).items():
                if name == TF32:
                    evidence.figure(f"{kind}: {name} against CPU", worst, "relative difference")
                else:
                    evidence.check(f"{kind}: {name} against CPU", worst, MOST[kind], unit="relative difference")


def differences(found: Numbers, expected: Numbers) -> dict[str, float]:
    """The largest relative difference of any tensor of each kind. ValueError when the two hold different tensors."""
    if {kind: sorted(of) for kind, of in found.items()} != {kind: sorted(of) for kind, of in expected.items()}:
        raise ValueError("the two sides computed different tensors")
    worst = {}
    for kind, tensors in expected.items():
        pairs = [(found[kind][name].double(), value.double()) for name, value in tensors.items()]
        worst[kind] = largest(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)
    return worst


class Side:
    """One process that computes, beside the others."""

    def __init__(self, file: Path, environment: dict[str, str]) -> None:
        self._file = file
        command = [sys.executable, "-m", "tests.gpu.equality", str(file)]
        self._log = file.with_suffix(".log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)

    def numbers(self) -> Numbers:
        """What it computed, when it has. RuntimeError with its last words."""
        try:
            code = self._process.wait(SECONDS)
        finally:
            self._process.kill()
        said = self._log.read_text(errors="replace").strip()
        if code:
            sys.stderr.write(f"{said}\n")
            raise RuntimeError((said.splitlines() or ["no message"])[-1])
        numbers: Numbers = torch.load(self._file)
        return numbers


def compute() -> Numbers:
    """Steps of a tiny model on documents with both loss streams; tensors by the names that they have in checkpoints."""
    from ra3_megatron.config.model import ModelConfig, ParallelConfig
    from ra3_megatron.mcore.loss import PolicyLoss
    from ra3_megatron.mcore.model import language_model
    from ra3_megatron.mcore.startup import initialize, shutdown
    from ra3_megatron.mcore.trainer import forward
    from tests.mcore.small_models import MODEL, gradients, make_documents, make_trainer, micro_batches, put_in_rows
    from tests.mcore.small_models import weights as whole_weights

    parallel = ParallelConfig()
    runtime = initialize(parallel, seed=1)
    shape = {"hidden_size": 64, "ffn_hidden_size": 96, "head_dim": 16}
    trainer = make_trainer(parallel, runtime, STEPS, ModelConfig(**{**MODEL.model_dump(), **shape}))

    def batches(step: int) -> list[Any]:
        return micro_batches(put_in_rows(make_documents(24, seed=100 + step)), runtime, 2)

    model = language_model(trainer.model)
    found: Numbers = {"initial weights": whole_weights(trainer.model, runtime)}
    scored = forward(trainer.model, batches(0), runtime)
    found["log-probabilities"] = {"": torch.stack(scored)}
    model.eval()
    with torch.no_grad():
        hidden = model(batches(0)[0].to(runtime.device), hidden_only=True)
        found["logits"] = {"": model.logits(hidden.flatten(0, 1))}
    losses = []
    for step in range(STEPS):
        result = trainer.step(batches(step), PolicyLoss(clip_ratio=5.0, importance_cap=2.0))
        losses.append([result.loss, result.grad_norm])
        if step == 0:
            found["gradients"] = gradients(trainer, runtime)
    found["losses"] = {"": torch.tensor(losses, dtype=torch.float64)}
    found["weights"] = whole_weights(trainer.model, runtime)
    shutdown()
    return {kind: {name: value.detach().cpu() for name, value in of.items()} for kind, of in found.items()}


if __name__ == "__main__":
    from ra3_megatron.text.lifetime import end_with
    from tests.gpu.part import prepare

    end_with(os.getppid())  # with the part, which nobody may be left to end
    if os.environ.get(WITHOUT):
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    prepare()
    if os.environ.get(WITH):
        from ra3_megatron.mcore import model

        model.has_layers_of_transformer_engine = lambda *_: True
    torch.save(compute(), sys.argv[1])
