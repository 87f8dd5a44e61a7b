"""FP8 is never silently off: four witnesses that do not rest on each other.

1. what each layer of the model says that it computed in (the same question that ends a run which asked for FP8);
2. the operands of every matrix product that Transformer Engine's layers made in a train step, seen at the call;
3. the scales' own state: delayed scaling has seen values;
4. outputs: a layer's differ from bf16's of the same weights and input by as much as FP8 rounds, and no more.

Then what `model.fp8` adds or takes away, each in a few train steps: layers in bf16, attention, weights kept in FP8.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ra3_megatron.config.compatibility import hardware_problems
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.config.precision import RECIPES
from ra3_megatron.config.training import OptimizerConfig
from ra3_megatron.mcore.batch import TokenBatch
from ra3_megatron.mcore.fp8 import LINEAR, computed, require_computed
from ra3_megatron.mcore.hardware import hardware_of
from ra3_megatron.mcore.model import chunks_of
from ra3_megatron.mcore.trainer import Trainer, forward
from tests.gpu.evidence import Evidence, largest
from tests.gpu.kernels import BF16, LEAST, MOST
from tests.gpu.setting import NEEDS_GPU, Setting, full_rows, relative, release, with_precision

MODEL = ModelConfig(
    num_layers=2, hidden_size=1024, ffn_hidden_size=2816, num_attention_heads=16, num_query_groups=8, context_length=512
)
TINY = ModelConfig(
    num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, context_length=32
)
VOCABULARY = 512
PASSES = 3
"""Of a micro-batch's products: output, input gradient, weight gradient."""
MODULES = ("linear", "layernorm_linear")
"""Modules of Transformer Engine that multiply for Megatron's layers."""
STEPS = 20
"""Train steps on the same rows with each key of `model.fp8`."""
LEARNED = 0.1
"""At most this share of the first step's loss is left behind them."""
LOSS_MOST = 0.03
"""How far the loss of any step may be off that of the recipe alone, as a share of the first step's."""


@dataclass(frozen=True)
class Option:
    """Keys beside a recipe."""

    precision: str
    fp8: dict[str, Any]
    """Of `model.fp8`."""
    parallel: dict[str, Any]
    model: tuple[tuple[str, int], ...] = ()
    """Of `model`."""

    @property
    def name(self) -> str:
        """For the table."""
        keys = [f"model.fp8.{key}={str(value).lower()}" for key, value in self.fp8.items()]
        return ", ".join([self.precision, *keys])


GATHER = {"parameter_gather": True}, {"distributed_optimizer": True}
WIDE_HEADS = (("num_attention_heads", 8), ("num_query_groups", 4))
"""Of 128 channels, which FP8 attention needs on Hopper."""
OPTIONS = (
    Option("fp8_tensorwise", {"first_layers_bf16": 1, "last_layers_bf16": 1}, {}),
    Option("fp8_blockwise", {"first_layers_bf16": 1, "last_layers_bf16": 0}, {}),
    *(Option(precision, *GATHER) for precision, recipe in RECIPES.items() if recipe.gathered),
    Option("fp8_delayed", {"attention": True}, {}, WIDE_HEADS),
    Option("fp8_tensorwise", {"attention": True}, {}, WIDE_HEADS),
)


def run(evidence: Evidence, setting: Setting) -> None:
    """Each recipe beside bf16; on a CPU bf16 beside fp32, which shows that the comparison of outputs sees rounding."""
    model = setting.pick(MODEL, TINY)
    names = setting.recipes(model, evidence)
    if not setting.cuda:
        evidence.missing("layers, products and scales of Transformer Engine", NEEDS_GPU)
    base = "bf16" if setting.cuda else "fp32"
    for precision in names or ["bf16"]:
        with evidence.attempt(precision):
            outputs(evidence, setting, model, precision, base)
            if precision in RECIPES:
                witnesses(evidence, setting, model, precision)
        release()
    plain: dict[Any, list[float]] = {}
    for option in OPTIONS if names else ():
        with evidence.attempt(option.name):
            with_option(evidence, setting, model, option, plain)
        release()


def with_option(
    evidence: Evidence, setting: Setting, model: ModelConfig, option: Option, plain: dict[Any, list[float]]
) -> None:
    """Train steps with keys of `model.fp8`: what layers say, and the loss beside that of the recipe alone."""
    model = model.model_copy(update={"num_layers": 4, **dict(option.model)})
    asked = ModelConfig(**{**model.model_dump(), "precision": option.precision, "fp8": option.fp8})
    problems = list(hardware_problems(asked, hardware_of(setting.device)))
    if problems:
        evidence.missing(option.name, problems[0])
        return
    alone = option.precision, option.model
    if alone not in plain:
        plain[alone], _ = losses(setting, with_precision(model, option.precision))
        evidence.series(", ".join([option.precision, *(f"{key}={value}" for key, value in option.model)]), plain[alone])
    setting = replace(setting, parallel=ParallelConfig(**{**setting.parallel.model_dump(), **option.parallel}))
    found, said = losses(setting, asked)
    require_computed(asked, said)
    kinds = ", ".join(f"{count} in {kind}" for kind, count in Counter(said.values()).most_common())
    evidence.figure(f"{option.name}: products computed", kinds)
    evidence.series(option.name, found)
    evidence.check(f"{option.name}: loss of step {STEPS} by that of the first", found[-1] / found[0], LEARNED)
    off = largest(abs(a - b) for a, b in zip(found, plain[alone], strict=True)) / found[0]
    evidence.check(f"{option.name}: loss of any step, off the recipe's alone by", off, LOSS_MOST, unit="of the first's")


def losses(setting: Setting, model: ModelConfig) -> tuple[list[float], dict[str, str]]:
    """Of train steps on the same rows, and what the layers say that they computed in."""
    trainer = setting.trainer(model, VOCABULARY, model.precision, OptimizerConfig(learning_rate=3e-4))
    batches = [full_rows(2, model.context_length, VOCABULARY, seed) for seed in range(2)]
    return [trainer.step(batches).loss for _ in range(STEPS)], computed(chunks_of(trainer.model))


def witnesses(evidence: Evidence, setting: Setting, model: ModelConfig, precision: str) -> None:
    """What layers, products and scales say of two train steps."""
    trainer = setting.trainer(model, VOCABULARY, precision)
    batches = [full_rows(2, model.context_length, VOCABULARY, seed) for seed in range(2)]
    trainer.step(batches)
    with products() as seen:
        trainer.step(batches)
    said = computed(chunks_of(trainer.model))
    wrong = [name for name, found in said.items() if found != precision]
    evidence.check(
        f"{precision}: layers that say they computed in it", len(said) - len(wrong), at_least=model.num_layers * 4
    )
    require_computed(with_precision(model, precision), said)
    total = sum(seen.values())
    eight = sum(count for operands, count in seen.items() if all(is_quantized(kind) for kind in operands))
    wanted = model.num_layers * len(LINEAR) * PASSES * len(batches)
    kinds = ", ".join(f"{count} x {' * '.join(operands)}" for operands, count in seen.most_common())
    evidence.check(f"{precision}: products of the layers in FP8", eight, wanted, wanted, f"of {total}", note=kinds)
    scales(evidence, trainer, precision)
    if precision == "fp8_delayed":
        skipped(evidence, trainer, batches, precision)


def skipped(evidence: Evidence, trainer: Trainer, batches: list[TokenBatch], precision: str) -> None:
    """A skipped step leaves scales and their history as they were; one that is taken does not."""
    module = chunks_of(trainer.model)[0].decoder.layers[0].self_attention.linear_qkv

    def changed() -> int:
        before = module.get_fp8_meta_tensors()
        trainer.step(batches)
        after = module.get_fp8_meta_tensors()
        return sum(not torch.equal(a, b) for key in before for a, b in zip(before[key], after[key], strict=True))

    taken, judge = changed(), trainer.judge
    trainer.may_skip, trainer.judge = True, lambda *_: "a check of this suite"
    evidence.check(f"{precision}: tensors of scales that a step changes, first layer", taken, at_least=1)
    evidence.check(f"{precision}: tensors of scales that a skipped step changes, first layer", changed(), 0)
    trainer.judge = judge


def scales(evidence: Evidence, trainer: Trainer, precision: str) -> None:
    """The quantizers of a layer; with delayed scaling, the largest values that they have seen."""
    chunk = chunks_of(trainer.model)[0]
    module = chunk.decoder.layers[0].self_attention.linear_qkv
    kinds = {type(each).__name__ for of in module.quantizers.values() for each in of if each is not None}
    evidence.figure(f"{precision}: quantizers of the first layer", ", ".join(sorted(kinds)))
    if precision == "fp8_delayed":
        history = module.fp8_meta["scaling_fwd"].amax_history
        evidence.check(f"{precision}: largest value seen by the first layer", float(history.max()), at_least=1e-6)


@contextmanager
def products() -> Iterator[Counter[tuple[str, str]]]:
    """Counts the matrix products of Transformer Engine's layers within it, by the kinds of their two factors."""
    import importlib

    seen: Counter[tuple[str, str]] = Counter()
    modules = [importlib.import_module(f"transformer_engine.pytorch.module.{name}") for name in MODULES]
    originals = [module.general_gemm for module in modules]

    def watched(original: Any) -> Any:
        def general_gemm(one: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
            seen[kind_of(one), kind_of(other)] += 1
            return original(one, other, *args, **kwargs)

        return general_gemm

    try:
        for module, original in zip(modules, originals, strict=True):
            module.general_gemm = watched(original)
        yield seen
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.general_gemm = original


def kind_of(factor: Any) -> str:
    """What a factor of a product is stored in: the class of a quantized tensor, or the type of a plain one."""
    if type(factor) in (Tensor, torch.nn.Parameter):
        return str(factor.dtype).removeprefix("torch.")
    return type(factor).__name__


def is_quantized(kind: str) -> bool:
    """Whether that is one of Transformer Engine's FP8 tensors."""
    return kind.startswith(("Float8", "MXFP8"))


def outputs(evidence: Evidence, setting: Setting, model: ModelConfig, precision: str, base: str) -> None:
    """The first layer's first product of the same input, and the log-probabilities, in two precisions."""
    batch = full_rows(2, model.context_length, VOCABULARY, seed=5)
    found = []
    for name in (base, precision):
        network = setting.build(model, VOCABULARY, name)
        chunk = chunks_of(network)[0]
        kept: list[Tensor] = []
        layer = chunk.decoder.layers[0].self_attention.linear_qkv
        hook = layer.register_forward_hook(lambda module, given, out, kept=kept: kept.append(out[0].detach()))
        network.train()
        for _ in range(2):  # delayed scaling takes its scales from the pass before
            chunk.set_is_first_microbatch()
            network[0](batch.to(setting.device))
        scored = forward(network, [batch], setting.runtime)[0]
        hook.remove()
        found.append((kept[1], scored[0]))
    least, most = (LEAST, MOST["e4m3"]) if precision in RECIPES else BF16
    (plain, scores), (rounded, rounded_scores) = found
    text = f"{precision} against {base}"
    evidence.check(f"{text}: output of the first product", relative(rounded, plain), most, least, "relative difference")
    evidence.figure(f"{text}: log-probabilities", relative(rounded_scores, scores), "relative difference")
