"""One layer, one optimizer step: does this hardware compute right with Transformer Engine?

Relative errors (norm of the difference by norm) of output, input gradient and weight gradient against the same product
in fp32 of the same bf16 inputs, so that only the product's own arithmetic counts. What is expected:

    bf16    8 bits of significand: about 2e-3
    e4m3    4 bits: a factor is off by about 2.5% (root mean square), a product of two by 3.5%
    e5m2    3 bits: a factor by about 5%; with an e4m3 factor 5.5%

An FP8 result nearer than `LEAST` to fp32's was not computed in FP8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ra3_megatron.config.model import ModelConfig
from ra3_megatron.config.precision import RECIPES
from ra3_megatron.mcore.model import LanguageModel, chunks_of
from tests.gpu.evidence import Evidence
from tests.gpu.setting import NEEDS_GPU, Setting, relative, release

BF16 = (1e-4, 1e-2)
"""Least and greatest relative error of a bf16 product."""
LEAST = 0.01
"""Of an FP8 product: below it, it was none."""
MOST = {"e4m3": 0.06, "e5m2": 0.1}
"""Of an FP8 product whose coarser factor has this format."""
NORM_MOST = 0.2
"""Of the gradient of a norm's weight, which is small sums of large terms."""
PASSES = 3
"""Passes before the one that is measured: delayed scaling takes its scales from earlier ones."""
ADAM_STEPS = 3
ADAM_MOST = 1e-4
"""Relative difference of the weights' change after ADAM_STEPS steps in fp32."""
WIDTHS = ModelConfig(
    num_layers=1, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8, context_length=16
)
"""A layer of Llama-3.1-8B."""
TINY = ModelConfig(
    num_layers=1, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, context_length=16
)
VOCABULARY = 128


@dataclass(frozen=True)
class Case:
    """A layer whose products are looked at."""

    forward: Callable[[Tensor], Tensor]
    weights: dict[str, torch.nn.Parameter]
    context: Callable[[], AbstractContextManager[Any]]
    """A forward pass is within it."""
    before: Callable[[], None] = lambda: None
    """Called before each pass."""


def run(evidence: Evidence, setting: Setting) -> None:
    """All layers in all precisions that there are, then the optimizer."""
    model = setting.pick(WIDTHS, TINY)
    tokens = setting.pick(4096, 64)
    names = ["bf16", *setting.recipes(model, evidence)]
    if not setting.cuda:
        evidence.missing("te.Linear", f"{NEEDS_GPU}: Transformer Engine's layers take no CPU tensors")
    for precision in names:
        if setting.cuda:
            with evidence.attempt(f"te.Linear {precision}"):
                plain(evidence, setting, model, tokens, precision)
        with evidence.attempt(f"Megatron's layers {precision}"):
            chunk = chunks_of(setting.build(model, VOCABULARY, precision))[0]
            for kind in ("linear_qkv", "linear_fc1"):
                with evidence.attempt(f"Megatron's {kind} {precision}"):
                    megatron(evidence, setting, chunk, (tokens, 1, model.hidden_size), precision, kind)
            del chunk
        release()
    with evidence.attempt("Adam"):
        adam(evidence, setting, model)


def plain(evidence: Evidence, setting: Setting, model: ModelConfig, tokens: int, precision: str) -> None:
    """Transformer Engine's Linear, hidden to feed-forward width."""
    import transformer_engine.pytorch as te

    layer = te.Linear(
        model.hidden_size, model.ffn_hidden_size, bias=False, params_dtype=torch.bfloat16, device=setting.device
    )
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight) * model.init_std)
    case = Case(layer, {"weight": layer.weight}, partial(autocast, precision))
    judge(evidence, f"te.Linear {precision}", case, reference_linear, (tokens, model.hidden_size), precision, setting)


def megatron(
    evidence: Evidence, setting: Setting, chunk: LanguageModel, shape: Sequence[int], precision: str, kind: str
) -> None:
    """A norm with the product behind it, as the model of this project has it (under Transformer Engine's spec:
    TELayerNormColumnParallelLinear), in the FP8 context that Megatron opens around a layer."""
    from megatron.core.fp8_utils import get_fp8_context

    layer = chunk.decoder.layers[0]
    module, norm = {
        "linear_qkv": (layer.self_attention.linear_qkv, layer.input_layernorm),
        "linear_fc1": (layer.mlp.linear_fc1, layer.pre_mlp_layernorm),
    }[kind]
    fused = hasattr(module, "layer_norm_weight")

    def forward(x: Tensor) -> Tensor:
        out: Tensor = module(x if fused else norm(x))[0]
        return out

    weights = {"weight": module.weight, "norm": module.layer_norm_weight if fused else norm.weight}
    case = Case(forward, weights, lambda: get_fp8_context(chunk.config), chunk.set_is_first_microbatch)
    reference = partial(reference_norm_linear, epsilon=chunk.config.layernorm_epsilon)
    name = f"{type(module).__name__} ({kind}) {precision}"
    judge(evidence, name, case, reference, shape, precision, setting)


def autocast(precision: str) -> AbstractContextManager[Any]:
    """Transformer Engine's context for a precision of this project."""
    if precision not in RECIPES:
        return nullcontext()
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    made = {
        "fp8_delayed": lambda: recipes.DelayedScaling(
            fp8_format=recipes.Format.HYBRID, amax_history_len=16, amax_compute_algo="max"
        ),
        "fp8_tensorwise": lambda: recipes.Float8CurrentScaling(fp8_format=recipes.Format.HYBRID),
        "fp8_blockwise": lambda: recipes.Float8BlockScaling(fp8_format=recipes.Format.E4M3),
        "mxfp8": lambda: recipes.MXFP8BlockScaling(fp8_format=recipes.Format.E4M3),
    }[precision]()
    context: AbstractContextManager[Any] = te.autocast(enabled=True, recipe=made)
    return context


def reference_linear(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """x W^T."""
    return F.linear(x, weights["weight"])


def reference_norm_linear(x: Tensor, weights: dict[str, Tensor], epsilon: float) -> Tensor:
    """RMSNorm, then the product."""
    return F.linear(F.rms_norm(x, x.shape[-1:], weights["norm"], epsilon), weights["weight"])


def judge(
    evidence: Evidence,
    name: str,
    case: Case,
    reference: Callable[[Tensor, dict[str, Tensor]], Tensor],
    shape: Sequence[int],
    precision: str,
    setting: Setting,
) -> None:
    """Write down the relative errors of a layer's results."""
    generator = torch.Generator(setting.device).manual_seed(7)
    x = torch.randn(*shape, generator=generator, device=setting.device).bfloat16()
    found: dict[str, Tensor] = {}
    gradient: Tensor | None = None
    for _ in range(PASSES + 1):
        case.before()
        for weight in case.weights.values():
            weight.grad = None
        given = x.clone().requires_grad_()
        with case.context():
            out = case.forward(given)
        if gradient is None:
            gradient = torch.randn(out.shape, generator=generator, device=setting.device).to(out.dtype)
        out.backward(gradient)
        assert given.grad is not None
        found = {"output": out, "input gradient": given.grad}
        found |= {f"{kind} gradient": _gradient(weight) for kind, weight in case.weights.items()}
    exact = x.float().requires_grad_()
    weights = {kind: weight.detach().float().requires_grad_() for kind, weight in case.weights.items()}
    expected = reference(exact, weights)
    assert gradient is not None
    expected.backward(gradient.float())
    right = {"output": expected, "input gradient": exact.grad}
    right |= {f"{kind} gradient": weight.grad for kind, weight in weights.items()}
    for what, value in found.items():
        true = right[what]
        assert true is not None
        least, most = bounds(precision, what)
        evidence.check(f"{name}: {what}", relative(value, true), most, least, "relative error")


def bounds(precision: str, what: str) -> tuple[float, float]:
    """Least and greatest relative error of a result in a precision."""
    if precision not in RECIPES:
        return BF16
    if what == "norm gradient":
        return BF16[0], NORM_MOST
    coarse = RECIPES[precision].formats == "hybrid" and what != "output"
    return LEAST, MOST["e5m2" if coarse else "e4m3"]


def _gradient(weight: torch.nn.Parameter) -> Tensor:
    assert weight.grad is not None
    return weight.grad


def adam(evidence: Evidence, setting: Setting, model: ModelConfig) -> None:
    """The optimizer that trains (FusedAdam; on a CPU torch's fused AdamW) against torch's plain AdamW."""
    shapes = [(model.hidden_size, model.ffn_hidden_size), (model.hidden_size,), (3 * model.hidden_size, 7)]
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    if setting.cuda:
        from transformer_engine.pytorch.optimizers import FusedAdam

        name, make = "Transformer Engine's FusedAdam", FusedAdam
    else:
        name, make = "torch's fused AdamW", partial(torch.optim.AdamW, fused=True)
    for steps in (1, ADAM_STEPS):
        one = changes(make, shapes, settings, steps, setting.device)
        other = changes(partial(torch.optim.AdamW, foreach=False), shapes, settings, steps, setting.device)
        worst = max(relative(a, b) for a, b in zip(one, other, strict=True))
        evidence.check(f"{name}, {steps} steps, against torch's AdamW", worst, ADAM_MOST, unit="relative error")


def changes(
    make: Callable[..., torch.optim.Optimizer],
    shapes: Sequence[tuple[int, ...]],
    settings: dict[str, Any],
    steps: int,
    device: torch.device,
) -> list[Tensor]:
    """What an optimizer changes fp32 weights by in some steps on made-up gradients."""
    generator = torch.Generator(device).manual_seed(3)
    weights = [torch.nn.Parameter(0.02 * torch.randn(shape, generator=generator, device=device)) for shape in shapes]
    before = [weight.detach().clone() for weight in weights]
    optimizer = make(weights, **settings)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator, device=device)
        optimizer.step()
    return [weight.detach() - old for weight, old in zip(weights, before, strict=True)]
