"""How close a layout must come to one process, in one place, with reasons. Arithmetic is fp32 throughout."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tests.parallel.matrix import Numbers


@dataclass(frozen=True)
class Tolerance:
    """Largest |found - expected| is `absolute + relative * |expected|`, number by number."""

    absolute: float
    relative: float
    reason: str


EXACT = Tolerance(0.0, 0.0, "not computed from sums over processes")

TOLERANCES: dict[str, Tolerance] = {
    "transcripts": Tolerance(0.0, 0.0, "samples are decided by the request's own uniforms"),
    "counts": Tolerance(0.0, 0.0, "whole numbers"),
    "learning_rate": Tolerance(0.0, 0.0, "a function of the step"),
    "behaviour": Tolerance(2e-5, 0.0, "log-probabilities down to -20, rounded to 24 bits after sums in another order"),
    "log_probs": Tolerance(2e-5, 0.0, "as behaviour"),
    "logits": Tolerance(2e-5, 0.0, "as behaviour"),
    "entropies": Tolerance(2e-5, 0.0, "as behaviour"),
    "rewards": Tolerance(2e-5, 0.0, "means of log-probabilities"),
    "advantages": Tolerance(2e-5, 1e-5, "differences of rewards, divided by their spread"),
    "loss": Tolerance(1e-6, 1e-5, "a sum of some hundred log-probabilities over a count"),
    "grad_norm": Tolerance(1e-6, 1e-5, "a root of sums of squares"),
    "stats": Tolerance(1e-4, 1e-5, "sums of some hundred log-probabilities"),
    "metrics": Tolerance(2e-5, 1e-5, "means of the above"),
    "gradients": Tolerance(1e-6, 0.0, "sums over processes in another order; gradients are clipped to a norm below 1"),
    "weights": Tolerance(1e-5, 0.0, "four Adam steps, which turn errors of gradients into errors of steps"),
}
"""By kind of number."""


def differences(found: Numbers, expected: Numbers) -> list[str]:
    """One line for each tensor that is further from `expected` than its kind may be."""
    lines = []
    if found.keys() != expected.keys():
        return [f"kinds {sorted(found)} instead of {sorted(expected)}"]
    for kind, values in expected.items():
        tolerance = TOLERANCES[kind]
        if found[kind].keys() != values.keys():
            lines.append(f"{kind}: names {sorted(found[kind])} instead of {sorted(values)}")
            continue
        for name, value in values.items():
            lines += _difference(f"{kind} {name}".strip(), found[kind][name], value, tolerance)
    return lines


def without_padding(name: str, found: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (or gradients) of the vocabulary without the rows that only one layout has, which must be 0."""
    if "word_embeddings" in name or "output_layer" in name:
        rows = min(len(found), len(expected))
        if not bool(found[rows:].any() | expected[rows:].any()):
            return found[:rows], expected[:rows]
    return found, expected


def _difference(name: str, found: Tensor, expected: Tensor, tolerance: Tolerance) -> list[str]:
    found, expected = without_padding(name, found, expected)
    if found.shape != expected.shape:
        return [f"{name}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}"]
    one, other = found.double(), expected.double()
    error = (one - other).abs()
    allowed = tolerance.absolute + tolerance.relative * other.abs()
    wrong = ~(error <= allowed)  # NaN is wrong
    if not bool(wrong.any()):
        return []
    return [f"{name}: {int(wrong.sum())} of {wrong.numel()} numbers differ, by {float(error[wrong].max()):.1e} at most"]


def largest_errors(found: Numbers, expected: Numbers) -> dict[str, float]:
    """Largest absolute difference by kind, to see how far from their limits the tolerances are."""
    return {
        kind: max(float((found[kind][name].double() - v.double()).abs().max()) for name, v in values.items())
        for kind, values in expected.items()
    }
