"""The train step of this project: tokens/s, share of what this device's own products reach, memory, profile.

FLOPs of a step are counted by `ra3_megatron.scaling.counts.token_flops`, as everywhere in this project:

    3 * tokens * (2 * layer weights + 4 * layers * query channels * (sequence + 1) / 2 + 2 * hidden * vocabulary)

(backward is twice forward; causal attention sees half; nothing that is computed again counts). A step is
`Trainer.step`: forward, backward, gradient norm, clipping, Adam, on rows that one document fills each. The baseline is
transformers' Llama of the same shape with fp32 weights under bf16 autocast, SDPA, torch.compile, and torch's fused
AdamW, on the same rows: the same state of the optimizer, plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.measure import Timing, alternate
from benchmarks.mstep import hugging_face_model
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ModelConfig
from ra3_megatron.config.precision import RECIPES
from ra3_megatron.config.training import OptimizerConfig
from ra3_megatron.mcore.batch import TokenBatch
from ra3_megatron.mcore.kernels import kernels_of
from ra3_megatron.mcore.model import build_model
from ra3_megatron.mcore.trainer import Trainer
from ra3_megatron.scaling.counts import token_flops, total_parameters
from ra3_megatron.scaling.memory import Work, memory
from ra3_megatron.scaling.step import peak, step_time
from ra3_megatron.scaling.tables import Architecture, Gpu, architecture_named, gpu_named
from tests.gpu import rates
from tests.gpu.evidence import Evidence
from tests.gpu.profiles import shares
from tests.gpu.setting import Setting, full_rows, packed_rows, release, with_precision

GIB = 2**30
SEQUENCE = 8192
EIGHT = "8B-shaped"
DOCUMENTS = (64, 2048)
"""Tokens of documents in packed rows."""
PLAIN, PACKED = "plain PyTorch", "packed documents"
SECONDS = {PLAIN: 60.0}
"""That something needs, where that is not 20."""
ROOM = 0.85
"""Share of the device's memory that as many layers as fit may take, by the plan."""
FORMULA = "3 tokens (2 layer weights + 4 layers * query channels * (sequence + 1) / 2 + 2 hidden * vocabulary)"


@dataclass(frozen=True)
class Case:
    """A model and the batch of its step."""

    made: Architecture
    sequence: int
    micro: int
    """Rows of a micro-batch."""
    micros: int
    """Micro-batches of a step."""

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequence * self.micro * self.micros

    @property
    def flops(self) -> float:
        """Of a step, by the formula."""
        return step_flops(self.made, self.sequence, self.tokens)

    def work(self, precision: str) -> Work:
        """As the planner calls it."""
        kind = "fp8" if precision in RECIPES else precision
        return Work(self.sequence, self.micro * self.micros, self.micro, kind)

    def batches(self) -> list[TokenBatch]:
        """Micro-batches of a step."""
        return [full_rows(self.micro, self.sequence, self.made.vocab_size, seed) for seed in range(self.micros)]


def step_flops(made: Architecture, sequence: int, tokens: int) -> float:
    """FLOPs of a train step on so many tokens in rows of `sequence`."""
    return 3.0 * tokens * sum(token_flops(made.model, made.vocab_size, sequence).values())


def run(evidence: Evidence, setting: Setting) -> None:
    """Rates of the device, then what `order` says."""
    evidence.figure("FLOPs of a step", FORMULA)
    gpu = sheet(setting)
    best = rates.measure(evidence, setting, "square", rates.square(setting))
    cases = cases_of(setting.small)
    if EIGHT in cases:
        cut_to_fit(evidence, setting, cases, gpu)
    recipes = setting.recipes(next(iter(cases.values())).made.model, evidence)
    whole: dict[str, Timing] = {}
    for name, what in order(recipes, setting):
        if name not in cases:
            continue
        text, case = f"{name}: {what}", cases[name]
        if not evidence.enough(text, setting.pick(SECONDS.get(what, 20.0), 1.0)):
            continue
        with evidence.attempt(text):
            if what == PLAIN:
                plain(evidence, setting, case, best, whole.get(name))
            elif what == PACKED:
                packed(evidence, setting, case, whole.get(name))
            else:
                timing = ours_of(evidence, setting, case, what, best, gpu)
                if what == "bf16":
                    whole[name] = timing
        release()
    for case in cases.values():
        if evidence.enough(f"{case.made.name}: products of its layers", setting.pick(10.0, 1.0)):
            for name, shape in rates.shapes_of(case.made, case.micro * case.sequence).items():
                rates.measure(evidence, setting, f"{case.made.name} {name}", shape, repeats=3)
        release()


def order(recipes: list[str], setting: Setting) -> list[tuple[str, str]]:
    """Models, and what is measured of each: the most important first, as a part may be ended before its end."""
    if setting.small:
        names = ["bf16", *recipes] if setting.cuda else ["fp32", "bf16"]
        return [("tiny", what) for what in (*names, PACKED, PLAIN)]
    return [
        ("1B", "bf16"),
        (EIGHT, "bf16"),
        *((EIGHT, recipe) for recipe in recipes),
        ("1B", PACKED),
        ("1B", PLAIN),
        *(("1B", recipe) for recipe in recipes),
        ("125M", "bf16"),
        ("125M", PLAIN),
        (EIGHT, PLAIN),
        *(("125M", recipe) for recipe in recipes),
    ]


def cases_of(small: bool) -> dict[str, Case]:
    """Models by size."""
    if small:
        shape = ModelConfig(
            num_layers=2,
            hidden_size=64,
            ffn_hidden_size=96,
            num_attention_heads=4,
            num_query_groups=2,
            context_length=64,
        )
        return {"tiny": Case(Architecture("tiny", shape, 256), 64, 2, 2)}
    base = ModelConfig(
        num_layers=12,
        hidden_size=768,
        ffn_hidden_size=2048,
        num_attention_heads=12,
        num_query_groups=12,
        context_length=SEQUENCE,
    )
    return {
        "125M": Case(Architecture("125M", base, 50_304), SEQUENCE, 4, 2),
        "1B": Case(architecture_named("llama3.2-1b", SEQUENCE), SEQUENCE, 1, 4),
        EIGHT: Case(architecture_named("llama3.1-8b", SEQUENCE), SEQUENCE, 1, 2),
    }


def cut_to_fit(evidence: Evidence, setting: Setting, cases: dict[str, Case], gpu: Gpu | None) -> None:
    """Leave as many layers of the largest model as this device has memory for."""
    total = torch.cuda.get_device_properties(setting.device).total_memory / GIB
    layers = fitting(cases[EIGHT], setting, ROOM * total, gpu)
    if layers:
        whole = cases[EIGHT].made.model.num_layers
        evidence.figure("layers of Llama-3.1-8B that fit, by the plan", layers, f"of {whole}")
        cases[EIGHT] = with_layers(cases[EIGHT], layers)
    else:
        evidence.missing(EIGHT, f"no layer fits {total:.0f} GiB beside embedding and output layer")
        del cases[EIGHT]


def with_layers(case: Case, layers: int) -> Case:
    """The same with fewer layers."""
    shape = case.made.model.model_copy(update={"num_layers": layers})
    return replace(case, made=replace(case.made, name=f"{case.made.name}, {layers} layers", model=shape))


def fitting(case: Case, setting: Setting, room: float, gpu: Gpu | None) -> int:
    """The most layers whose step fits `room` GiB, by the plan."""
    for layers in range(case.made.model.num_layers, 0, -1):
        if planned_gib(with_layers(case, layers), setting, "bf16", gpu) <= room:
            return layers
    return 0


def planned_gib(case: Case, setting: Setting, precision: str, gpu: Gpu | None) -> float:
    """Memory of a step by the plan (`ra3 plan`), the device's own share included."""
    more = {} if gpu is None else {"context_gib": gpu.context_gib}
    return memory(case.made.model, case.made.vocab_size, setting.parallel, case.work(precision), **more).total


def sheet(setting: Setting) -> Gpu | None:
    """The data sheet of this GPU, where the planner has one."""
    if not setting.cuda:
        return None
    words = torch.cuda.get_device_name(setting.device).lower().replace("-", " ").split()
    for word in words:
        try:
            return gpu_named(word)
        except UserError:
            continue
    return None


def fresh(setting: Setting, made: Architecture, precision: str) -> torch.nn.Module:
    """A model whose weights are drawn on the device: billions of them by name on the host would take minutes."""
    sets = torch.ones(1, made.vocab_size, dtype=torch.bool)
    config = with_precision(made.model, precision)
    model = build_model(config, setting.parallel, setting.runtime, made.vocab_size, sets, None)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=made.model.init_std)
            else:
                weight.fill_(1.0)
    return model


def ours_of(
    evidence: Evidence, setting: Setting, case: Case, precision: str, best: dict[str, float], gpu: Gpu | None
) -> Timing:
    """Measure this project's step in one precision."""
    name = f"{case.made.name} {precision}"
    optimizer = OptimizerConfig(learning_rate=1e-5)
    trainer = Trainer(fresh(setting, case.made, precision), optimizer, setting.parallel, setting.runtime, 1000)
    batches = case.batches()
    if precision == "bf16":
        kinds = ", ".join(f"{part}: {whose}" for part, whose in kernels_of(trainer).items())
        size = total_parameters(case.made.model, case.made.vocab_size) / 1e6
        evidence.figure(f"{case.made.name}: parameters", size, "million", note=kinds)

    def step() -> object:
        return trainer.step(batches)

    timing = measured(evidence, setting, case, name, step, best)
    if gpu is not None and setting.cuda:
        kind = case.work(precision).precision
        share = case.flops / timing.median / peak(gpu, kind)
        evidence.figure(f"{name}: of the data sheet's {kind} peak", share)
        plan = step_time(case.made.model, case.made.vocab_size, setting.parallel, case.work(precision), gpu)
        evidence.figure(f"{name}: step time by the plan, of the measured", plan.total / timing.median)
    _memory(evidence, setting, case, name, precision, gpu)
    if precision in ("bf16", "fp8_tensorwise", "fp8_delayed"):
        groups, longest = shares(step, timing.median, setting.device)
        text = ", ".join(f"{group} {share:.1%}" for group, share in groups.items())
        evidence.figure(f"{name}: where a step's time goes", text)
        if precision == "bf16":
            text = "; ".join(f"{kernel[:60]} {share:.1%}" for kernel, share in longest.items())
            evidence.figure(f"{name}: longest kernels", text)
    return timing


def packed(evidence: Evidence, setting: Setting, case: Case, whole: Timing | None) -> None:
    """The same step on rows that are packed with documents of mixed lengths: what a run trains on."""
    low, high = setting.pick(DOCUMENTS, (4, 20))
    name = f"{case.made.name} bf16, rows packed with documents of {low} to {high} tokens"
    model = fresh(setting, case.made, "bf16")
    trainer = Trainer(model, OptimizerConfig(learning_rate=1e-5), setting.parallel, setting.runtime, 1000)
    batches = [
        packed_rows(case.micro, case.sequence, case.made.vocab_size, seed, (low, high)) for seed in range(case.micros)
    ]
    step = lambda: trainer.step(batches)  # noqa: E731
    timing = measured(evidence, setting, case, name, step, {})
    groups, _ = shares(step, timing.median, setting.device)
    text = ", ".join(f"{group} {share:.1%}" for group, share in groups.items())
    evidence.figure(f"{name}: where a step's time goes", text)
    if whole is not None:
        evidence.figure(f"{name}: tokens/s, of whole rows'", whole.median / timing.median)


def measured(
    evidence: Evidence, setting: Setting, case: Case, name: str, step: Callable[[], object], best: dict[str, float]
) -> Timing:
    """Median of steps behind a warm-up: tokens/s and shares of the measured rates of products."""
    warm_up, repeats = setting.pick((3, 8), (1, 3))
    for _ in range(warm_up):
        step()
    if setting.cuda:
        torch.cuda.reset_peak_memory_stats(setting.device)
    timing = alternate({name: step}, repeats, warm_up=0, wait=setting.wait)[name]
    evidence.rate(f"{name}: tokens/s", timing, case.tokens, "tokens/s")
    for kind, rate in best.items():
        evidence.rate(f"{name}: MFU, of torch's {kind} product", timing, case.flops / rate, "")
    return timing


def _memory(evidence: Evidence, setting: Setting, case: Case, name: str, precision: str, gpu: Gpu | None) -> None:
    """Peak memory of the steps against the plan."""
    if not setting.cuda:
        evidence.missing(f"{name}: peak memory", "needs a GPU")
        return
    free, total = torch.cuda.mem_get_info(setting.device)
    reserved = torch.cuda.memory_reserved(setting.device)
    allocated = torch.cuda.max_memory_allocated(setting.device) / GIB
    whole = (torch.cuda.max_memory_reserved(setting.device) + (total - free) - reserved) / GIB
    planned = planned_gib(case, setting, precision, gpu)
    evidence.figure(f"{name}: peak memory allocated", allocated, "GiB")
    evidence.figure(f"{name}: peak memory of the device", whole, "GiB", note=f"planned {planned:.1f} GiB")


def plain(evidence: Evidence, setting: Setting, case: Case, best: dict[str, float], ours: Timing | None) -> None:
    """The same work by transformers and torch alone, compiled where that works."""
    name = f"{case.made.name}: plain PyTorch"
    try:
        from transformers import LlamaForCausalLM  # noqa: F401
    except ImportError as error:
        evidence.missing(name, f"transformers does not load: {error}")
        return
    with torch.device(setting.device):
        shape = case.made.model.model_copy(update={"context_length": case.sequence})
        model = hugging_face_model(shape, case.made.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    rows = [batch.ids.to(setting.device) for batch in case.batches()]

    def step(network: Any) -> None:
        optimizer.zero_grad()
        for ids in rows:
            with torch.autocast(setting.device.type, dtype=torch.bfloat16):
                loss = network(input_ids=ids, labels=ids).loss / len(rows)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    timing = None
    if setting.cuda:
        try:
            network = compiled(model)
            timing = measured(evidence, setting, case, f"{name}, compiled", lambda: step(network), best)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler says: the same without it is a baseline, too
            evidence.missing(f"{name}, compiled", " ".join(str(error).split())[:200])
    if timing is None:
        timing = measured(evidence, setting, case, name, lambda: step(model), best)
    if ours is not None:
        evidence.figure(f"{case.made.name}: bf16 tokens/s, of plain PyTorch's", timing.median / ours.median)


def compiled(model: torch.nn.Module) -> Any:
    """The model compiled for the shapes that it will get. What is known of another one would make dimensions in which
    the two differ dynamic, and this one slower than it is by itself."""
    torch.compiler.reset()
    return torch.compile(model)
