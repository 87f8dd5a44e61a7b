"""Every layout of a number of GPUs that could train a model: which fit, how fast they are, why the others do not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ra3_megatron.config.layouts import batch_problems, layout_problems
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.config.training import MStepConfig
from ra3_megatron.scaling.memory import Memory, Work, memory
from ra3_megatron.scaling.step import StepTime, mfu, step_time
from ra3_megatron.scaling.tables import Architecture, Gpu

MICRO_BATCHES = (1, 2, 4, 8)
RECOMPUTED: tuple[dict[str, Any], ...] = (
    {},
    {"recompute": "selective", "recompute_modules": ["mlp"]},
    {"recompute": "full"},
)
"""What is tried, from the fastest to the smallest."""
SHORT = {
    "tensor": "TP",
    "pipeline": "PP",
    "virtual_pipeline": "VPP",
    "context": "CP",
    "expert": "EP",
    "data": "DP",
}
"""Sizes as people call them."""


@dataclass(frozen=True)
class Planned:
    """A layout with what it needs and how long a step takes."""

    parallel: ParallelConfig
    work: Work
    memory: Memory
    step: StepTime
    mfu: float

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Throughput."""
        return self.work.global_batch * self.work.sequence / self.step.total / self.parallel.world_size

    def as_dict(self) -> dict[str, Any]:
        """What `ra3 plan --json` prints of a layout: seconds, GiB."""
        return {
            "layout": {**layout_keys(self.parallel), "micro_batch": self.work.micro_batch},
            "memory_gib": self.memory.as_dict(),
            "step_seconds": self.step.total,
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "mfu": self.mfu,
            "parts": dict(self.step),
        }


@dataclass(frozen=True)
class Rejected:
    """Layouts that were not taken for one reason."""

    reason: str
    count: int
    example: str


@dataclass(frozen=True)
class Plan:
    """What a search found."""

    best: list[Planned]
    """The fastest layout of each set of sizes, fastest first."""
    rejected: list[Rejected]
    tried: int


def layout_keys(parallel: ParallelConfig) -> dict[str, Any]:
    """Sizes of a layout, and the keys of `parallel` that differ from their defaults."""
    fields = type(parallel).model_fields
    sizes = {name: getattr(parallel, name) for name in SHORT}
    changed = {n: getattr(parallel, n) for n in fields if n not in sizes and getattr(parallel, n) != fields[n].default}
    return sizes | changed


def describe(parallel: ParallelConfig, micro_batch: int) -> str:
    """A layout in a few words: "TP4 PP8 VPP5 DP2, micro-batch 1, recompute mlp"."""
    parts = [f"{short}{getattr(parallel, name)}" for name, short in SHORT.items() if getattr(parallel, name) > 1]
    text = f"{' '.join(parts) or 'one GPU'}, micro-batch {micro_batch}"
    if parallel.counted_ends:
        text += ", ends count"
    if parallel.recompute == "full":
        block = parallel.recompute_method == "block"
        return text + (f", recompute {parallel.recompute_layers} a chunk" if block else ", recompute all")
    return text + (f", recompute {'+'.join(parallel.recompute_modules)}" if parallel.recompute == "selective" else "")


def evaluate(made: Architecture, parallel: ParallelConfig, work: Work, gpu: Gpu, rollouts_gib: float = 0.0) -> Planned:
    """One layout. It must have passed `problems_of`."""
    step = step_time(made.model, made.vocab_size, parallel, work, gpu)
    used = mfu(made.model, made.vocab_size, gpu, work, parallel.world_size, step.total)
    held = memory(made.model, made.vocab_size, parallel, work, rollouts_gib, gpu.context_gib)
    return Planned(parallel, work, held, step, used)


def problems_of(model: ModelConfig, parallel: ParallelConfig, work: Work) -> list[str]:
    """Why a layout cannot be, one line each."""
    lines = list(layout_problems(model, parallel))
    share = work.micro_batch * parallel.data * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1)
    if not lines and work.global_batch % share:
        if work.global_batch % work.micro_batch:
            return [f"--global-batch {work.global_batch} is not a multiple of micro_batch={work.micro_batch}"]
        batch = MStepConfig(micro_batch_size=work.micro_batch, global_batch_size=work.global_batch)
        lines += batch_problems(parallel, {"mstep": batch})
    return lines


def search(made: Architecture, gpus: int, work: Work, gpu: Gpu, rollouts_gib: float = 0.0) -> Plan:
    """Every layout of `gpus` GPUs for this work (its micro-batch is chosen here)."""
    best: dict[tuple[int, ...], Planned] = {}
    refused: dict[str, tuple[int, str, float]] = {}
    tried = 0
    for parallel, micro_batch in _candidates(made.model, gpus, gpu):
        tried += 1
        one = replace(work, micro_batch=micro_batch)
        share = micro_batch * parallel.data * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1)
        if work.global_batch % share:
            why = "the global batch is no multiple of micro-batch * DP (* PP with VPP)"
            _count(refused, why, describe(parallel, micro_batch), math.inf)
            continue
        planned = evaluate(made, parallel, one, gpu, rollouts_gib)
        if planned.memory.total > gpu.memory_gib:
            why = f"more than the {gpu.memory_gib:g} GiB of {gpu.name}"
            text = (
                f"{describe(parallel, micro_batch)}: {planned.memory.total:.1f} GiB, "
                f"{planned.tokens_per_second_per_gpu:,.0f} tokens/s/GPU"
            )
            _count(refused, why, text, planned.step.total)
            continue
        sizes = (parallel.tensor, parallel.pipeline, parallel.context, parallel.expert)
        if sizes not in best or planned.step.total < best[sizes].step.total:
            best[sizes] = planned
    rejected = [Rejected(why, count, example) for why, (count, example, _) in refused.items()]
    return Plan(sorted(best.values(), key=_rank), rejected, tried)


def _rank(planned: Planned) -> tuple[float, ...]:
    """Fastest first; of those that are equally fast (to 1 in 1,000), the one with the simplest layout."""
    parallel = planned.parallel
    sizes = (parallel.context, parallel.pipeline, parallel.tensor, parallel.virtual_pipeline)
    return (float(f"{planned.step.total:.3g}"), *sizes, planned.step.total)


def _count(refused: dict[str, tuple[int, str, float]], why: str, example: str, seconds: float) -> None:
    """One more for this reason; the fastest is its example."""
    count, kept, fastest = refused.get(why, (0, example, math.inf))
    refused[why] = (count + 1, example, seconds) if seconds < fastest else (count + 1, kept, fastest)


def _candidates(model: ModelConfig, gpus: int, gpu: Gpu) -> Iterator[tuple[ParallelConfig, int]]:
    """Layouts that the rules of `config/layouts.py` allow, with each micro-batch size."""
    for tensor, pipeline, context in product(_divisors(gpus), repeat=3):
        data, rest = divmod(gpus, tensor * pipeline * context)
        if rest or data == 0 or tensor > gpu.gpus_per_node or pipeline > model.num_layers or context > 64:
            continue
        for expert in _divisors(model.num_experts) if model.num_experts else [1]:
            sizes: dict[str, Any] = {
                "tensor": tensor,
                "pipeline": pipeline,
                "context": context,
                "data": data,
                "expert": expert,
            }
            switches: dict[str, Any] = {
                "sequence": tensor > 1,
                "distributed_optimizer": data * context > 1,
                "overlap_grad_reduce": data * context > 1,
                "overlap_param_gather": data * context > 1,
            }
            if model.num_experts:
                switches["expert_tensor"] = 1  # whole experts: fewer messages
            for ends, virtual in _splits(model.num_layers, pipeline):
                plain = ParallelConfig(
                    **sizes, **switches, virtual_pipeline=virtual, count_embedding=ends, count_output=ends
                )
                if any(layout_problems(model, plain)):
                    continue
                for again, micro_batch in product(RECOMPUTED, MICRO_BATCHES):
                    if again.get("recompute_modules") == ["mlp"] and model.num_experts:
                        again = {**again, "recompute_modules": ["moe"]}
                    yield plain.model_copy(update=again), micro_batch


def _splits(layers: int, pipeline: int) -> Iterator[tuple[bool, int]]:
    """Whether the ends count as layers, and chunks a stage."""
    if pipeline == 1:
        yield False, 1
        return
    for ends in (False, True):
        each, rest = divmod(layers + 2 * ends, pipeline)
        if not rest:
            for virtual in _divisors(each):
                yield ends, virtual


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
