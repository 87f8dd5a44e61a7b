"""One layer, one optimizer step: does this hardware compute right with Transformer Engine, and with our own kernels?

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
from ra3_megatron.mcore import elementwise, variable_length
from ra3_megatron.mcore.hardware import has_transformer_engine, has_triton
from ra3_megatron.mcore.hidden_events import EventRows, hidden_events
from ra3_megatron.mcore.model import LanguageModel, chunks_of
from ra3_megatron.mcore.packing import packing_of
from ra3_megatron.mcore.target_log_probs import target_log_probs
from ra3_megatron.mcore.vocab_parallel import event_log_probs, shard_sets
from tests.gpu.evidence import Evidence, largest
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
LENGTHS = (700, 3, 1, 250, 64, 2000, 129)
"""Of documents in a packed row, behind which is padding."""


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
    engine = has_transformer_engine(setting.device)
    if not engine:
        why = "Transformer Engine does not load" if setting.cuda else NEEDS_GPU
        evidence.missing("te.Linear and FusedAdam", why)
    for precision in names:
        if engine:
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
    for attempt in (rotary, swiglu, log_probabilities, events, documents):
        with evidence.attempt(attempt.__name__):
            attempt(evidence, setting, model)
        release()


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
    """The optimizer that trains (FusedAdam; without Transformer Engine torch's fused AdamW) against torch's plain
    AdamW."""
    shapes = [(model.hidden_size, model.ffn_hidden_size), (model.hidden_size,), (3 * model.hidden_size, 7)]
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    if has_transformer_engine(setting.device):
        from transformer_engine.pytorch.optimizers import FusedAdam

        name, make = "Transformer Engine's FusedAdam", FusedAdam
    else:
        name, make = "torch's fused AdamW", partial(torch.optim.AdamW, fused=True)
    for steps in (1, ADAM_STEPS):
        one = changes(make, shapes, settings, steps, setting.device)
        other = changes(partial(torch.optim.AdamW, foreach=False), shapes, settings, steps, setting.device)
        worst = largest(relative(a, b) for a, b in zip(one, other, strict=True))
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


def rotary(evidence: Evidence, setting: Setting, model: ModelConfig) -> None:
    """Rotary positions of queries that are a slice of a larger tensor, and their gradient."""
    heads, channels, length = model.num_attention_heads, 128, setting.pick(1000, 10)
    mixed = _random(setting, length, 2, heads, channels + 32).requires_grad_()
    angles = torch.rand(length, 2, 1, channels // 2, device=setting.device) * 7
    turns = elementwise.turns(angles, torch.bfloat16)
    against(
        evidence,
        f"rotary positions, {_whose(setting)}",
        lambda x: elementwise.rotate(x[..., 16 : 16 + channels], turns),
        lambda x: _rotated(x[..., 16 : 16 + channels], turns.float()),
        [mixed],
    )


def _rotated(x: Tensor, turns: Tensor) -> Tensor:
    (first, second), (cos, sin) = x.chunk(2, -1), turns.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def swiglu(evidence: Evidence, setting: Setting, model: ModelConfig) -> None:
    """SwiGLU and its gradient."""
    x = _random(setting, setting.pick(1000, 10), 2, 2 * model.ffn_hidden_size).requires_grad_()
    name = f"SwiGLU, {_whose(setting)}"
    against(evidence, name, elementwise.swiglu, lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], [x])


def log_probabilities(evidence: Evidence, setting: Setting, model: ModelConfig) -> None:
    """log p(target) and its gradients, of a vocabulary that is no whole number of blocks."""
    vocabulary, positions = setting.pick((50_257, 3000), (300, 20))
    size = vocabulary + (-vocabulary) % 128
    hidden = _random(setting, positions, model.hidden_size).requires_grad_()
    weight = (_random(setting, size, model.hidden_size) * 0.03).requires_grad_()
    targets = torch.randint(0, vocabulary, (positions,), device=setting.device)
    shard = shard_sets(torch.ones(1, vocabulary, dtype=torch.bool, device=setting.device), size, 0, 1, None)
    for keep in (True, False):
        against(
            evidence,
            f"log-probabilities of targets, logits {'kept' if keep else 'computed again'}, {_whose(setting)}",
            lambda h, w, keep=keep: target_log_probs(h, w, targets, shard, keep, 1024),
            lambda h, w: F.linear(h, w[:vocabulary]).log_softmax(-1).gather(1, targets[:, None])[:, 0],
            [hidden, weight],
        )


def events(evidence: Evidence, setting: Setting, model: ModelConfig) -> None:
    """Log-probabilities and entropies of choices within sets of tokens, and their gradients, from hidden states."""
    if not (setting.cuda and has_triton()):
        evidence.missing("events from hidden states", f"{NEEDS_GPU}: elsewhere `event_log_probs` does it")
        return
    vocabulary, positions = 50_257, 3000
    size = vocabulary + (-vocabulary) % 128
    hidden = _random(setting, positions, model.hidden_size).requires_grad_()
    weight = (_random(setting, size, model.hidden_size) * 0.03).requires_grad_()
    draw = torch.Generator(setting.device).manual_seed(4)
    sets = torch.rand(4, vocabulary, generator=draw, device=setting.device) < 0.5
    sets[0] = True
    sets[3] &= sets[1]
    shard = shard_sets(sets, size, 0, 1, None)
    targets = torch.randint(0, vocabulary, (positions,), generator=draw, device=setting.device)
    denominator = torch.where(sets[1][targets], 1, 0)  # the choice is among those of a set, or among all
    some = torch.arange(positions, device=setting.device) % 3 == 0
    numerator = torch.where(some, torch.where(denominator == 1, 3, 1), -1)
    merged = torch.where(numerator == -1, 2, -1)
    asked = EventRows.of(targets, numerator, denominator, merged, 0.8)

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return torch.cat(hidden_events(h, w, asked, shard, True, 1024)[:2])

    def exact(h: Tensor, w: Tensor) -> Tensor:
        logits = F.linear(h, w) / 0.8
        return torch.cat(event_log_probs(logits, targets, shard, numerator, denominator, merged)[:2])

    against(evidence, "events from hidden states, our kernel", ours, exact, [hidden, weight])


def documents(evidence: Evidence, setting: Setting, model: ModelConfig) -> None:
    """Attention within the documents of a packed row in one kernel, and its gradients."""
    heads, groups, channels, length = 8, 2, 64, sum(LENGTHS) + 53
    q, k, v = (_random(setting, length, 1, count, channels).requires_grad_() for count in (heads, groups, groups))
    if not variable_length.takes(q):
        evidence.missing(
            "attention of documents of any length", NEEDS_GPU if not setting.cuda else "this torch has none"
        )
        return
    segments = torch.full((1, length), -1, device=setting.device)
    begins = [sum(LENGTHS[:n]) for n in range(len(LENGTHS))]
    for number, (begin, count) in enumerate(zip(begins, LENGTHS, strict=True)):
        segments[0, begin : begin + count] = number
    packing = packing_of(segments)

    def ours(*given: Tensor) -> Tensor:
        real = [x[:, 0].index_select(0, packing.real) for x in given] if packing.real is not None else []
        return variable_length.attention(*real, packing.bounds, packing.longest, channels**-0.5)  # type: ignore[misc]

    def exact(*given: Tensor) -> Tensor:
        out = []
        for begin, count in zip(begins, LENGTHS, strict=True):
            one = [x[begin : begin + count, 0].transpose(0, 1)[None] for x in given]
            out.append(F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(out)

    against(evidence, "attention of documents of any length", ours, exact, [q, k, v])


def against(
    evidence: Evidence,
    name: str,
    ours: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    given: Sequence[Tensor],
) -> None:
    """Relative errors of a function of bf16 tensors and of its gradients against the same in fp32."""
    out = ours(*given)
    gradient = torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(9), device=out.device)
    gradient = gradient.to(out.dtype)
    found = torch.autograd.grad(out, given, gradient)
    whole = [x.detach().float().requires_grad_() for x in given]
    expected = exact(*whole)
    wanted = torch.autograd.grad(expected, whole, gradient.float())
    evidence.check(f"{name}: output", relative(out, expected), BF16[1], unit="relative error")
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        evidence.check(f"{name}: gradient {number}", relative(one, other), BF16[1], unit="relative error")


def _random(setting: Setting, *shape: int) -> Tensor:
    generator = torch.Generator(setting.device).manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device=setting.device).bfloat16()


def _whose(setting: Setting) -> str:
    return "our kernel" if setting.cuda and has_triton() else "torch's operations"
