"""Which layouts fit a model: what is wrong with one, and the nearest ones that are right.

Pure functions of the configuration, so that a layout is refused before any process starts. They know the rules by which
Megatron-Core 0.16.1 refuses a layout or computes something else than asked; those that concern `parallel` alone are in
`ParallelConfig.problems`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product

from ra3_megatron.config.compatibility import key_problems, length_multiple
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.config.training import PackedTraining
from ra3_megatron.config.yaml_io import scalar_text

LISTED = 6
"""Values that a message lists at most."""

Batches = Mapping[str, PackedTraining]
"""Sections of the configuration that have a global batch size, by their name."""


def layout_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """One line for each rule by which `model` cannot be laid out like this."""
    yield from _tensor_problems(model, parallel)
    yield from key_problems(model, parallel)
    if parallel.pipeline > 1:
        yield from _pipeline_problems(model, parallel)
    yield from _sequence_problems(model, parallel)
    if model.num_experts is None:
        yield from _dense_problems(parallel)
    else:
        yield from _expert_problems(model, model.num_experts, parallel)
    yield from _recompute_problems(model, parallel)
    if parallel.offload_activations >= model.num_layers:
        yield (
            f"parallel.offload_activations={parallel.offload_activations} must be below model.num_layers="
            f"{model.num_layers}: the last layer's activations are needed at once"
        )
    if parallel.offload_activations and model.precision == "fp32":
        yield (
            f"parallel.offload_activations={parallel.offload_activations} does not go with model.precision=fp32, whose "
            "layers are not Transformer Engine's: use model.precision=bf16"
        )


def batch_problems(parallel: ParallelConfig, batches: Batches) -> Iterator[str]:
    """One line for each global batch that does not divide evenly over processes and micro-batches.

    A section with a budget of tokens (`micro_batch_tokens`) deals any number of documents out evenly.
    """
    for name, section in batches.items():
        factors = f"{name}.micro_batch_size * parallel.data"
        share = section.micro_batch_size * parallel.data
        if parallel.virtual_pipeline > 1:
            factors += " * parallel.pipeline"
            share *= parallel.pipeline
        if section.micro_batch_tokens is None and section.global_batch_size % share:
            why = ", which parallel.virtual_pipeline > 1 needs" if parallel.virtual_pipeline > 1 else ""
            yield (
                f"{name}.global_batch_size={section.global_batch_size} is not a multiple of {factors} = {share}{why}: "
                f"{_any_of(_multiples(section.global_batch_size, share))} would be"
            )


def chunk_layers(num_layers: int, parallel: ParallelConfig) -> list[list[int]]:
    """Layers of each model chunk of each pipeline stage, [stages][chunks]. The layout must have passed
    `layout_problems`."""
    chunks = parallel.virtual_pipeline
    layers = [[each // chunks] * chunks for each in _split_layers(num_layers + parallel.counted_ends, parallel)]
    layers[0][0] -= parallel.count_embedding
    layers[-1][-1] -= parallel.count_output
    return layers


def stage_layers(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Layers of each pipeline stage. The layout must have passed `layout_problems`."""
    return [sum(chunks) for chunks in chunk_layers(num_layers, parallel)]


def _split_layers(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Layers of each stage, of a number that holds the ends that count."""
    first, last, stages = parallel.first_stage_layers, parallel.last_stage_layers, parallel.pipeline
    given = [layers for layers in (first, last) if layers is not None]
    others = stages - len(given)
    each = (num_layers - sum(given)) // others if others else 0
    layers = [each] * others
    return ([] if first is None else [first]) + layers + ([] if last is None else [last])


def fitting_layouts(
    model: ModelConfig, world_size: int, near: ParallelConfig, batches: Batches | None = None, most: int = 3
) -> list[ParallelConfig]:
    """At most `most` layouts of `world_size` processes that fit `model` (and `batches`), the nearest to `near` first.

    Nearest is the one with the fewest changed keys; among those, the one that keeps all but `parallel.data`, then the
    one with the smallest changes. None makes all changes of a nearer one and more. Switches that have nothing to do
    with sizes are kept.
    """
    layouts = [
        layout
        for axes in _axes(model, world_size)
        for layout in _variants(model, near, axes)
        if _fits(model, layout, batches or {})
    ]
    found: dict[frozenset[tuple[str, object]], ParallelConfig] = {}
    for layout in sorted(layouts, key=lambda layout: _distance(near, layout)):
        changes = frozenset((name, getattr(layout, name)) for name in _changes(near, layout))
        if not any(smaller <= changes for smaller in found):
            found[changes] = layout
        if len(found) == most:
            break
    return list(found.values())


def changed_keys(near: ParallelConfig, layout: ParallelConfig) -> str:
    """What turns `near` into `layout`, as overrides: `parallel.tensor=2 parallel.data=3`."""
    return " ".join(f"parallel.{name}={scalar_text(getattr(layout, name))}" for name in _changes(near, layout))


def layout_advice(model: ModelConfig, world_size: int, near: ParallelConfig, batches: Batches | None = None) -> str:
    """The end of an error line: what would fit `world_size` processes, as overrides; "" when nothing is found.

    Where nothing fits the batch sizes, layouts that fit with other batch sizes.
    """
    for sizes, condition in ((batches or {}, ""), ({}, " with other batch sizes")):
        changes = [changed_keys(near, layout) for layout in fitting_layouts(model, world_size, near, sizes)]
        if changes:
            processes = "1 process" if world_size == 1 else f"{world_size} processes"
            return f"what would fit {processes}{condition}: {', or '.join(changes)}"
    return ""


# -- the rules ----------------------------------------------------------------------------------------------------


def _tensor_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    split = _split_by_tensor(model)
    wrong = [f"model.{key}={size}" for key, size in split.items() if size % parallel.tensor]
    if wrong:
        listed = " and ".join([", ".join(wrong[:-1]), wrong[-1]] if len(wrong) > 1 else wrong)
        fitting = _dividing(split.values(), parallel.tensor)
        yield f"parallel.tensor={parallel.tensor} does not divide {listed}: {fitting} would"


def _split_by_tensor(model: ModelConfig) -> dict[str, int]:
    keys = ["num_attention_heads", "num_query_groups"] + (["ffn_hidden_size"] if model.num_experts is None else [])
    return {key: getattr(model, key) for key in keys}


def _pipeline_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    layers, stages, virtual = model.num_layers + parallel.counted_ends, parallel.pipeline, parallel.virtual_pipeline
    count = f"model.num_layers={model.num_layers}"
    if parallel.counted_ends:
        count += f" + {parallel.counted_ends} (parallel.count_embedding, parallel.count_output)"
    given = {
        f"parallel.{name}={value}": value
        for name in ("first_stage_layers", "last_stage_layers")
        if (value := getattr(parallel, name)) is not None
    }
    if not given:
        if layers % stages:
            fitting = _dividing([layers], stages)
            yield (
                f"parallel.pipeline={stages} does not divide {count}: {fitting} would (or set "
                "parallel.first_stage_layers or parallel.last_stage_layers)"
            )
        elif layers // stages % virtual:
            fitting = _dividing([layers // stages], virtual)
            yield (
                f"parallel.virtual_pipeline={virtual} does not divide the {layers // stages} layers of a stage "
                f"({count}, parallel.pipeline={stages}): {fitting} would"
            )
        elif parallel.counted_ends and layers // stages == virtual:
            yield (
                f"parallel.count_embedding or parallel.count_output with {count} leaves a model chunk without layers "
                f"(parallel.pipeline={stages}, parallel.virtual_pipeline={virtual}): switch it off, or use fewer chunks"
            )
        return
    names, rest, others = " + ".join(given), layers - sum(given.values()), stages - len(given)
    if others == 0:
        if rest:
            yield (
                f"{names} = {sum(given.values())} is not model.num_layers={layers}, and parallel.pipeline=2 has no "
                "other stage"
            )
        elif virtual > 1:  # Megatron-Core 0.16.1 divides by the number of stages between first and last
            yield (
                f"{names} with parallel.virtual_pipeline={virtual} and parallel.pipeline=2: give one of them, the "
                "other stage has the rest"
            )
    elif rest < others:
        yield (
            f"{names} leaves {max(rest, 0)} of model.num_layers={layers} for the other {_stages(others)}: "
            "each needs at least 1"
        )
    elif rest % others:
        yield (
            f"{names} leaves {rest} of model.num_layers={layers} for the other {_stages(others)}, which need a "
            f"multiple of {others}"
        )
    for name, value in given.items():
        if value % virtual:
            yield f"parallel.virtual_pipeline={virtual} does not divide {name}: {_dividing([value], virtual)} would"
    if others and rest >= others and not rest % others and rest // others % virtual:
        yield (
            f"parallel.virtual_pipeline={virtual} does not divide the {rest // others} layers of the other "
            f"{_stages(others)}: {_dividing([rest // others], virtual)} would"
        )


def _stages(number: int) -> str:
    return "stage" if number == 1 else f"{number} stages"


def _sequence_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    multiple = length_multiple(model, parallel)
    if model.context_length % multiple:
        needs = [f"parallel.context={parallel.context}"] if parallel.context > 1 else []
        needs += [f"parallel.sequence=true with parallel.tensor={parallel.tensor}"] if parallel.sequence else []
        needs += [f"model.precision={model.precision}"] if model.row_multiple > 1 else []
        values = _any_of(_multiples(model.context_length, multiple))
        yield (
            f"model.context_length={model.context_length} is not a multiple of {multiple}, for "
            f"{' and '.join(needs)}: {values} would be"
        )


def _dense_problems(parallel: ParallelConfig) -> Iterator[str]:
    if parallel.expert > 1:
        yield f"parallel.expert={parallel.expert} needs a mixture of experts: set model.num_experts"
    if parallel.expert_tensor is not None:
        yield f"parallel.expert_tensor={parallel.expert_tensor} needs a mixture of experts: set model.num_experts"


def _expert_problems(model: ModelConfig, experts: int, parallel: ParallelConfig) -> Iterator[str]:
    if parallel.tensor > 1 and not parallel.sequence:
        yield f"parallel.tensor={parallel.tensor} with model.num_experts={experts} needs parallel.sequence=true"
    if experts % parallel.expert:
        fitting = _dividing([experts], parallel.expert)
        yield f"parallel.expert={parallel.expert} does not divide model.num_experts={experts}: {fitting} would"
    tensor = parallel.expert_tensor or parallel.tensor
    name = "tensor" if parallel.expert_tensor is None else "expert_tensor"
    key = "ffn_hidden_size" if model.expert_ffn_hidden_size is None else "expert_ffn_hidden_size"
    width: int = getattr(model, key)
    if width % tensor:
        yield f"parallel.{name}={tensor} does not divide model.{key}={width}: {_dividing([width], tensor)} would"
    share = parallel.tensor * parallel.context * parallel.data
    if experts % parallel.expert == 0 and share % (tensor * parallel.expert):
        possible = [n for n in _divisors(experts) if share % (tensor * n) == 0]
        right = f"parallel.expert={_any_of(_nearest(possible, parallel.expert))}" if possible else ""
        right = right or f"parallel.expert_tensor={_dividing([width, share], tensor)}"
        yield (
            f"parallel.expert={parallel.expert} * parallel.{name}={tensor} does not divide parallel.tensor * "
            f"parallel.context * parallel.data = {share}: {right} would"
        )


def _recompute_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    if parallel.recompute == "selective":
        if "moe" in parallel.recompute_modules and model.num_experts is None:
            yield "parallel.recompute_modules: moe needs a mixture of experts: set model.num_experts, or use mlp"
        if "mlp" in parallel.recompute_modules and model.num_experts is not None:
            yield f"parallel.recompute_modules: mlp is of dense layers; model.num_experts={model.num_experts} needs moe"
    if parallel.recompute != "full" or (parallel.pipeline > 1 and any(_pipeline_problems(model, parallel))):
        return
    sizes = {layers for stage in chunk_layers(model.num_layers, parallel) for layers in stage if layers}
    unit, chunks = parallel.recompute_layers, " and ".join(map(str, sorted(sizes)))
    if parallel.recompute_method == "block" and unit > max(sizes):
        yield f"parallel.recompute_layers={unit} is more than the layers of a model chunk ({chunks})"
    if parallel.recompute_method == "uniform" and any(size % unit for size in sizes):
        yield (
            f"parallel.recompute_layers={unit} does not divide the layers of a model chunk ({chunks}), which "
            f"parallel.recompute_method=uniform needs: {_dividing(sizes, unit)} would"
        )


# -- the search ---------------------------------------------------------------------------------------------------


def _axes(model: ModelConfig, world_size: int) -> Iterator[dict[str, int]]:
    """Sizes whose product is `world_size`, without those that no other key could make fit."""
    half, odd = divmod(model.context_length, 2)
    tensors = _divisors(math.gcd(world_size, *_split_by_tensor(model).values()))
    pipelines = [n for n in range(1, min(model.num_layers, world_size) + 1) if world_size % n == 0]
    contexts = [1] if odd else _divisors(math.gcd(world_size, half))
    for tensor, pipeline, context in product(tensors, pipelines, contexts):
        data, rest = divmod(world_size, tensor * pipeline * context)
        if not rest:
            yield {"tensor": tensor, "pipeline": pipeline, "context": context, "data": data}


def _variants(model: ModelConfig, near: ParallelConfig, axes: Mapping[str, int]) -> Iterator[ParallelConfig]:
    """`near` with these sizes, and what depends on them as it is or otherwise."""
    chunks = {n for n in _divisors(model.num_layers) if n <= near.virtual_pipeline}
    stages = {
        (virtual, *ends, *counted)
        for virtual in {near.virtual_pipeline, *chunks}
        for ends in product({near.first_stage_layers, None}, {near.last_stage_layers, None})
        for counted in {(near.count_embedding, near.count_output), (False, False)}
    }
    experts = {1} if model.num_experts is None else {near.expert, *_divisors(model.num_experts)}
    inner = {None} if model.num_experts is None else {near.expert_tensor, None}
    for sequence, (virtual, first, last, embedding, output), expert, expert_tensor in product(
        (False, True), stages, experts, inner
    ):
        yield near.model_copy(
            update={
                **axes,
                "sequence": sequence,
                "virtual_pipeline": virtual,
                "first_stage_layers": first,
                "last_stage_layers": last,
                "count_embedding": embedding,
                "count_output": output,
                "overlap_p2p": near.overlap_p2p or (virtual > 1 and axes["pipeline"] == 2),
                "expert": expert,
                "expert_tensor": expert_tensor,
            }
        )


def _fits(model: ModelConfig, layout: ParallelConfig, batches: Batches) -> bool:
    return not (any(layout.problems()) or any(layout_problems(model, layout)) or any(batch_problems(layout, batches)))


def _changes(near: ParallelConfig, layout: ParallelConfig) -> list[str]:
    return [name for name in ParallelConfig.model_fields if getattr(near, name) != getattr(layout, name)]


def _distance(near: ParallelConfig, layout: ParallelConfig) -> tuple[float, ...]:
    changed = _changes(near, layout)
    sizes = ("tensor", "pipeline", "context", "data", "expert", "virtual_pipeline")
    factors = [abs(math.log2(getattr(layout, name) / getattr(near, name))) for name in sizes]
    kept = len(changed) - ("data" in changed)
    absent = [getattr(layout, name) or 0 for name in ("first_stage_layers", "last_stage_layers", "expert_tensor")]
    return (len(changed), kept, sum(factors), *factors, layout.sequence, *absent)


# -- numbers in words ---------------------------------------------------------------------------------------------


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _dividing(numbers: Iterable[int], wanted: int) -> str:
    """What divides all `numbers`, those nearest to `wanted`: "1, 2 or 4"."""
    return _any_of(_nearest(_divisors(math.gcd(*numbers)), wanted))


def _nearest(values: Sequence[int], wanted: int) -> list[int]:
    return sorted(sorted(values, key=lambda value: abs(value - wanted))[:LISTED])


def _multiples(number: int, of: int) -> list[int]:
    """The multiples of `of` on both sides of `number`."""
    below = number // of * of
    return [below, below + of] if below else [of, 2 * of]


def _any_of(values: Sequence[int]) -> str:
    """`[1, 2, 4]` as "1, 2 or 4"."""
    return " or ".join(filter(None, [", ".join(map(str, values[:-1])), str(values[-1])]))
