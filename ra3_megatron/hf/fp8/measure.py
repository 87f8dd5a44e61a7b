"""What FP8 cost: the written folder, read back tensor by tensor and run, against the original.

A weight w with scale s is stored as the e4m3 number next to w / s. e4m3 has 3 bits of mantissa: between 2^-6 and 448
neighbours are at most 2^-3 of the smaller one apart, so the nearest is within 2^-4 of |w|; below 2^-6 they are 2^-9
apart, so it is within 2^-10 in units of s. No |w / s| is above 448. With u = 2^-24 for each of the two roundings of
fp32 on the way (the scale, the quotient):

    |stored * s - w| <= max(2^-4 |w|, 2^-10 s) + 4 u |w|

`WeightResult.largest_share_of_bound` is the largest ratio of the two sides; above 1 the folder is refused.
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ra3_megatron.config.errors import UserError
from ra3_megatron.hf.fp8.quantise import OnStep, load_model
from ra3_megatron.hf.source import Source

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_NORMAL = 2.0**-6
RELATIVE = 2.0**-4
ABSOLUTE = 2.0**-10
"""In units of the scale."""
ROUNDING = 4 * 2.0**-24
WEIGHT, WEIGHT_SCALE, INPUT_SCALE = ".weight", ".weight_scale", ".input_scale"


@dataclass(frozen=True)
class WeightResult:
    """Dequantised weights against the originals."""

    fp8_tensors: int
    other_tensors: int
    """Equal to the originals in bf16."""
    largest_relative_error: float
    """|dequantised - original| / |original|, over weights of at least 2^-6 of their scale (e4m3's normal numbers)."""
    largest_relative_error_in: str
    """Tensor."""
    largest_share_of_bound: float
    """Of the bound in this module's docstring, over all weights; 1 at most."""
    relative_rms_error: float
    """Root of the sum of squared errors over that of squared weights, all FP8 tensors together."""
    became_zero: float
    """Share of the weights that are 0 and were not."""


@dataclass(frozen=True)
class OutputResult:
    """What the FP8 model says against what the original says, on the held-out sequences."""

    sequences: int
    tokens: int
    """Predicted ones."""
    kl_nats_per_token: float
    """Mean KL(original || FP8) of the next-token distributions."""
    top1_agreement: float
    """Share of positions with the same most probable token."""


class Written:
    """The tensors of an FP8 folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    @property
    def names(self) -> list[str]:
        return sorted(self._files)

    @property
    def weights(self) -> list[str]:
        """Names of the tensors in FP8: those with a scale."""
        return [name for name in self.names if name.removesuffix(WEIGHT) + WEIGHT_SCALE in self._files]

    @property
    def others(self) -> list[str]:
        """Neither in FP8 nor scales."""
        scales = {name.removesuffix(WEIGHT) + ending for name in self.weights for ending in (WEIGHT_SCALE, INPUT_SCALE)}
        return [name for name in self.names if name not in scales.union(self.weights)]

    def read(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def scale(self, name: str) -> Tensor:
        """fp32 []. Raises UserError for one that is missing, or no positive number."""
        if name not in self._files:
            raise UserError(f"{self.folder}: {name} is missing")
        scale = self.read(name).float()
        if scale.numel() != 1 or not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
            raise UserError(f"{self.folder}: {name} is {scale.flatten()[:3].tolist()}: must be one number above 0")
        return scale.reshape(())

    def dequantised(self, name: str) -> tuple[Tensor, Tensor]:
        """A weight in fp32, and its scale."""
        stored, scale = self.read(name), self.scale(name.removesuffix(WEIGHT) + WEIGHT_SCALE)
        if stored.dtype != FP8:
            raise UserError(f"{self.folder}: {name} is {stored.dtype}, not e4m3")
        wide = stored.float()
        if not bool(torch.isfinite(wide).all()):
            raise UserError(f"{self.folder}: {name} holds NaN")
        return wide * scale, scale


def error_bound(weight: Tensor, scale: Tensor) -> Tensor:
    """The bound of the module's docstring for fp32 weights."""
    size = weight.abs()
    return torch.maximum(RELATIVE * size, ABSOLUTE * scale) + ROUNDING * size


def compare_weights(
    written: Written, source: Source, wanted: Collection[str], on_step: Callable[[], None]
) -> WeightResult:
    """Read everything back. Raises UserError for a scale that is none, a weight outside the bound, other tensors that
    are not the originals in bf16, and one of `wanted` (names of the model's tensors) that is missing."""
    worst, worst_in, share, lost, count = 0.0, "", 0.0, 0, 0
    squares = torch.zeros(2, dtype=torch.float64)
    for name in written.weights:
        written.scale(name.removesuffix(WEIGHT) + INPUT_SCALE)
        found, scale = written.dequantised(name)
        original = source.read(name, torch.float32)
        error = (found - original).abs()
        share = max(share, float((error / error_bound(original, scale)).max()))
        if share > 1:
            raise UserError(f"{written.folder}: {name} is not the original in FP8: {share:.3g} of the error possible")
        normal = original.abs() >= SMALLEST_NORMAL * scale
        relative = float(torch.where(normal, error / original.abs().clamp(min=1e-38), 0.0).max())
        if relative > worst:
            worst, worst_in = relative, name
        lost += int(((found == 0) & (original != 0)).sum())
        count += found.numel()
        squares += torch.stack([error.double().square().sum(), original.double().square().sum()])
        on_step()
    if not count:
        raise UserError(f"{written.folder}: holds no FP8 tensor")
    others = [name for name in written.others if name in source.entries]
    for name in others:
        if not torch.equal(written.read(name), source.read(name, torch.float32).to(torch.bfloat16)):
            raise UserError(f"{written.folder}: {name} is not the original in bf16")
        on_step()
    missing = sorted(set(wanted) - set(written.names))
    if missing:
        raise UserError(f"{written.folder}: lacks {missing[0]}")
    rms = float((squares[0] / squares[1]).sqrt())
    return WeightResult(len(written.weights), len(others), worst, worst_in, share, rms, lost / count)


def fp8_model(written: Written, folder: Path, device: str) -> Any:
    """The original's network with the written weights, whose linear layers round their inputs as a serving engine
    does: to e4m3 with the written scale."""
    model = load_model(folder, device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in written.weights:
                parameter.copy_(written.dequantised(name)[0])
            else:
                parameter.copy_(written.read(name).float())
    for name in written.weights:
        layer = name.removesuffix(WEIGHT)
        scale = written.scale(layer + INPUT_SCALE).to(device)
        model.get_submodule(layer).register_forward_pre_hook(_rounding_inputs(scale))
    return model


def compare_outputs(
    written: Written, folder: Path, rows: Sequence[Sequence[int]], device: str, on_step: OnStep
) -> OutputResult:
    """Run both models, in fp32 arithmetic: 8 bytes a parameter."""
    original, quantised = load_model(folder, device), fp8_model(written, folder, device)
    divergence, same, tokens = 0.0, 0, 0
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([list(row)], device=device)
            p, q = (model(ids, use_cache=False).logits[0].float().log_softmax(-1) for model in (original, quantised))
            divergence += float((p.exp() * (p - q)).sum(-1).double().sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            tokens += len(row)
            on_step(len(row))
    return OutputResult(len(rows), tokens, divergence / tokens, same / tokens)


def report_of(weights: WeightResult, outputs: OutputResult | None, about: dict[str, Any]) -> str:
    """The report as JSON."""
    content = {**about, "weights": asdict(weights), "held_out": None if outputs is None else asdict(outputs)}
    return json.dumps(content, indent=2) + "\n"


def read_report(text: str) -> tuple[WeightResult, OutputResult | None]:
    """What `report_of` wrote."""
    content = json.loads(text)
    held_out = content["held_out"]
    return WeightResult(**content["weights"]), None if held_out is None else OutputResult(**held_out)


def _rounding_inputs(scale: Tensor) -> Callable[[Any, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return ((inputs[0] / scale).clamp(-LARGEST, LARGEST).to(FP8).float() * scale, *inputs[1:])

    return hook


def steps(written: Written) -> int:
    """How often `compare_weights` calls `on_step`."""
    return len(written.weights) + len(written.others)
