"""Layouts are refused with a line that says what would be right, and the layouts that it proposes do fit.

Not covered: that Megatron-Core runs every layout that passes (tests/parallel runs those of its table).
"""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.layouts import (
    batch_problems,
    changed_keys,
    chunk_layers,
    fitting_layouts,
    layout_advice,
    layout_problems,
    stage_layers,
)
from ra3_megatron.config.load import load_config
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.config.training import MStepConfig, WarmStartConfig

BAD_KEYS = [
    ("virtual_pipeline=2", "parallel.virtual_pipeline=2 needs parallel.pipeline >= 2"),
    ("first_stage_layers=1", "parallel.first_stage_layers=1 needs parallel.pipeline >= 2"),
    ("last_stage_layers=3", "parallel.last_stage_layers=3 needs parallel.pipeline >= 2"),
    ("sequence=true", "parallel.sequence=true needs parallel.tensor >= 2"),
    (
        "pipeline=2 virtual_pipeline=2 overlap_p2p=false",
        "parallel.overlap_p2p=false does not go with parallel.pipeline=2 and parallel.virtual_pipeline=2 (messages "
        "between two stages would arrive in the wrong order): use parallel.overlap_p2p=true",
    ),
    (
        "data=2 overlap_param_gather=true overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true",
    ),
    (
        "data=2 overlap_param_gather=true distributed_optimizer=true",
        "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true",
    ),
    ("grad_bucket_size=100", "parallel.grad_bucket_size=100 needs parallel.overlap_grad_reduce=true"),
    (
        "recompute=selective recompute_modules=[]",
        "parallel.recompute_modules=[] with parallel.recompute=selective: name a module (core_attn, say)",
    ),
    (
        "recompute=full recompute_modules=[mlp]",
        "parallel.recompute_modules=[mlp] is not read with parallel.recompute=full: it goes with selective",
    ),
    (
        "recompute=selective recompute_layers=2",
        "parallel.recompute_layers=2 is not read with parallel.recompute=selective: it goes with full",
    ),
    (
        "recompute_method=block",
        "parallel.recompute_method=block is not read with parallel.recompute=none: it goes with full",
    ),
]
"""Keys of `parallel` that do not go together."""

BAD_MODELS = [
    ("experts_per_token=5 num_experts=4", "model.experts_per_token=5 is more than model.num_experts=4"),
    (
        "experts_per_token=1 num_experts=4",
        "model.experts_per_token=1 needs model.normalize_expert_weights=false: normalised weights of a token's experts "
        "sum to 1, so a single one's is always 1 and its router cannot learn",
    ),
    (
        "expert_ffn_hidden_size=64",
        "model.expert_ffn_hidden_size=64 needs model.num_experts (dense layers have model.ffn_hidden_size)",
    ),
    ("experts_per_token=1", "model.experts_per_token=1 is not read without experts: set model.num_experts"),
    (
        "normalize_expert_weights=false",
        "model.normalize_expert_weights=false is not read without experts: set model.num_experts",
    ),
]
"""Keys of `model` that do not go together."""

BAD_LAYOUTS = [
    (
        "parallel.tensor=3 parallel.context=4 model.ffn_hidden_size=96",
        "parallel.tensor=3 does not divide model.num_attention_heads=8 and model.num_query_groups=4: 1, 2 or "
        "4 would; what would fit 12 processes with other batch sizes: parallel.tensor=1 parallel.data=3, or "
        "parallel.tensor=2 parallel.context=2 parallel.data=3, or parallel.tensor=4 parallel.context=1 "
        "parallel.data=3",
    ),
    (
        "parallel.pipeline=3",
        "parallel.pipeline=3 does not divide model.num_layers=4: 1, 2 or 4 would (or set "
        "parallel.first_stage_layers or parallel.last_stage_layers); what would fit 3 processes with other "
        "batch sizes: parallel.pipeline=1 parallel.data=3",
    ),
    (
        "parallel.pipeline=2 parallel.virtual_pipeline=3",
        "parallel.virtual_pipeline=3 does not divide the 2 layers of a stage (model.num_layers=4, "
        "parallel.pipeline=2): 1 or 2 would; what would fit 2 processes: parallel.virtual_pipeline=2, or "
        "parallel.virtual_pipeline=1",
    ),
    (
        "parallel.pipeline=2 parallel.first_stage_layers=1 parallel.last_stage_layers=2",
        "parallel.first_stage_layers=1 + parallel.last_stage_layers=2 = 3 is not model.num_layers=4, and "
        "parallel.pipeline=2 has no other stage; what would fit 2 processes: "
        "parallel.first_stage_layers=null, or parallel.last_stage_layers=null",
    ),
    (
        "parallel.pipeline=3 parallel.first_stage_layers=3 model.context_length=513",
        "parallel.first_stage_layers=3 leaves 1 of model.num_layers=4 for the other 2 stages: each needs at "
        "least 1; what would fit 3 processes with other batch sizes: parallel.pipeline=1 "
        "parallel.first_stage_layers=null parallel.data=3",
    ),
    (
        "parallel.pipeline=3 parallel.last_stage_layers=1 model.context_length=513",
        "parallel.last_stage_layers=1 leaves 3 of model.num_layers=4 for the other 2 stages, which need a "
        "multiple of 2; what would fit 3 processes with other batch sizes: parallel.pipeline=1 "
        "parallel.last_stage_layers=null parallel.data=3",
    ),
    (
        "parallel.pipeline=2 parallel.virtual_pipeline=2 parallel.first_stage_layers=2 parallel.last_stage_layers=2",
        "parallel.first_stage_layers=2 + parallel.last_stage_layers=2 with parallel.virtual_pipeline=2 and "
        "parallel.pipeline=2: give one of them, the other stage has the rest; what would fit 2 processes: "
        "parallel.first_stage_layers=null, or parallel.last_stage_layers=null, or parallel.virtual_pipeline=1",
    ),
    (
        "model.num_layers=5 parallel.pipeline=2 parallel.virtual_pipeline=2 parallel.first_stage_layers=3",
        "parallel.virtual_pipeline=2 does not divide parallel.first_stage_layers=3: 1 or 3 would; what would "
        "fit 2 processes: parallel.virtual_pipeline=1",
    ),
    (
        "model.num_layers=5 parallel.pipeline=2 parallel.virtual_pipeline=2 parallel.first_stage_layers=2",
        "parallel.virtual_pipeline=2 does not divide the 3 layers of the other stage: 1 or 3 would; what "
        "would fit 2 processes: parallel.virtual_pipeline=1",
    ),
    (
        "parallel.context=2 parallel.tensor=2 parallel.sequence=true model.context_length=500",
        "model.context_length=500 is not a multiple of 8, for parallel.context=2 and parallel.sequence=true "
        "with parallel.tensor=2: 496 or 504 would be; what would fit 4 processes: parallel.sequence=false, or"
        " parallel.context=1 parallel.data=2, or parallel.pipeline=2 parallel.context=1",
    ),
    (
        "parallel.expert=2",
        "parallel.expert=2 needs a mixture of experts: set model.num_experts; what would fit 1 process: "
        "parallel.expert=1",
    ),
    (
        "parallel.expert_tensor=2",
        "parallel.expert_tensor=2 needs a mixture of experts: set model.num_experts; what would fit 1 "
        "process: parallel.expert_tensor=null",
    ),
    (
        "model.num_experts=4 parallel.tensor=2",
        "parallel.tensor=2 with model.num_experts=4 needs parallel.sequence=true; what would fit 2 processes:"
        " parallel.sequence=true, or parallel.tensor=1 parallel.data=2, or parallel.tensor=1 "
        "parallel.context=2",
    ),
    (
        "model.num_experts=4 parallel.data=4 parallel.expert=3",
        "parallel.expert=3 does not divide model.num_experts=4: 1, 2 or 4 would; what would fit 4 processes: "
        "parallel.expert=4, or parallel.expert=2, or parallel.expert=1",
    ),
    (
        "model.num_experts=4 parallel.data=2 parallel.expert=4",
        "parallel.expert=4 * parallel.tensor=1 does not divide parallel.tensor * parallel.context * "
        "parallel.data = 2: parallel.expert=1 or 2 would; what would fit 2 processes: parallel.expert=2, or "
        "parallel.expert=1",
    ),
    (
        "model.num_experts=4 parallel.data=2 parallel.expert_tensor=4",
        "parallel.expert=1 * parallel.expert_tensor=4 does not divide parallel.tensor * parallel.context * "
        "parallel.data = 2: parallel.expert_tensor=1 or 2 would; what would fit 2 processes: "
        "parallel.expert_tensor=null",
    ),
    (
        "model.num_experts=2 model.expert_ffn_hidden_size=9 parallel.data=2 parallel.expert_tensor=2",
        "parallel.expert_tensor=2 does not divide model.expert_ffn_hidden_size=9: 1, 3 or 9 would; what would"
        " fit 2 processes: parallel.expert_tensor=null",
    ),
    (
        "parallel.recompute=selective parallel.recompute_modules=[core_attn,moe]",
        "parallel.recompute_modules: moe needs a mixture of experts: set model.num_experts, or use mlp",
    ),
    (
        "parallel.recompute=selective parallel.recompute_modules=[mlp] model.num_experts=4",
        "parallel.recompute_modules: mlp is of dense layers; model.num_experts=4 needs moe",
    ),
    (
        "parallel.recompute=full parallel.recompute_layers=3",
        "parallel.recompute_layers=3 does not divide the layers of a model chunk (4), which "
        "parallel.recompute_method=uniform needs: 1, 2 or 4 would",
    ),
    (
        "parallel.recompute=full parallel.recompute_layers=3 parallel.pipeline=2 parallel.first_stage_layers=1",
        "parallel.recompute_layers=3 does not divide the layers of a model chunk (1 and 3), which "
        "parallel.recompute_method=uniform needs: 1 would",
    ),
    (
        "parallel.recompute=full parallel.recompute_method=block parallel.recompute_layers=5",
        "parallel.recompute_layers=5 is more than the layers of a model chunk (4)",
    ),
    (
        "parallel.data=3 mstep.global_batch_size=12",
        "warm_start.global_batch_size=16 is not a multiple of warm_start.micro_batch_size * parallel.data = "
        "12: 12 or 24 would be",
    ),
    (
        "parallel.pipeline=2 parallel.virtual_pipeline=2 mstep.global_batch_size=4",
        "mstep.global_batch_size=4 is not a multiple of mstep.micro_batch_size * parallel.data * "
        "parallel.pipeline = 8, which parallel.virtual_pipeline > 1 needs: 8 or 16 would be",
    ),
    (
        "estep.micro_batch_tokens=511",
        "estep.micro_batch_tokens=511 is less than the longest document, model.context_length=512",
    ),
]
"""What cannot be laid out over processes: overrides, and the one line."""


@pytest.mark.parametrize(
    ("overrides", "line"),
    [(" ".join(f"parallel.{key}" for key in keys.split()), line) for keys, line in BAD_KEYS]
    + [(" ".join(f"model.{key}" for key in keys.split()), line) for keys, line in BAD_MODELS]
    + BAD_LAYOUTS,
)
def test_one_line_says_what_would_be_right(overrides: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, overrides.split())
    assert str(caught.value) == line


def test_a_configuration_with_several_problems_gives_its_advice_once() -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, ["parallel.tensor=3", "parallel.expert=2", "parallel.data=2", "text.max_latent_tokens=200"])
    tensor, expert, last = str(caught.value).splitlines()
    assert tensor.endswith(": 1, 2 or 4 would")
    assert expert.startswith("parallel.expert=2 needs") and "; what would fit 6 processes" in expert
    assert last.startswith("text.max_latent_tokens=200")


MODEL = ModelConfig(num_layers=8)
BATCHES = {"warm_start": WarmStartConfig(global_batch_size=48), "mstep": MStepConfig(global_batch_size=48)}


@pytest.mark.parametrize(
    ("keys", "world_size", "advice"),
    [
        ({"data": 3}, 3, [""]),
        ({"tensor": 2, "data": 2}, 2, ["parallel.data=1", "parallel.tensor=1"]),
        ({"tensor": 2, "data": 2}, 6, ["parallel.data=3"]),
        (
            {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 4},
            8,
            ["parallel.data=2", "parallel.context=2", "parallel.tensor=4"],
        ),
        ({"pipeline": 4, "first_stage_layers": 2}, 2, ["parallel.pipeline=2"]),
        ({}, 7, []),
    ],
)
def test_the_nearest_layouts_come_first(keys: dict[str, Any], world_size: int, advice: list[str]) -> None:
    near = ParallelConfig(**keys)
    found = fitting_layouts(MODEL, world_size, near, BATCHES)
    assert [changed_keys(near, layout) for layout in found][: len(advice)] == advice
    assert advice or not found


def test_advice_falls_back_to_other_batch_sizes_and_then_to_nothing() -> None:
    near = ParallelConfig(tensor=2)
    batches = {"mstep": MStepConfig(global_batch_size=12)}
    assert layout_advice(MODEL, 6, near, batches).startswith("what would fit 6 processes: parallel.data=3")
    other = layout_advice(MODEL, 14, near, batches)
    assert other.startswith("what would fit 14 processes with other batch sizes: parallel.data=7, or ")
    wrong_at_any_size = near.model_copy(update={"recompute": "selective", "recompute_modules": ["moe"]})
    assert layout_advice(MODEL, 6, wrong_at_any_size) == ""


def test_token_budgets_need_no_batch_sizes() -> None:
    parallel = ParallelConfig(data=2)
    assert not list(batch_problems(parallel, {"mstep": MStepConfig(global_batch_size=5, micro_batch_tokens=512)}))
    assert list(batch_problems(parallel, {"mstep": MStepConfig(global_batch_size=5, micro_batch_size=1)}))


# -- any layout ---------------------------------------------------------------------------------------------------

SIZE = st.sampled_from([1, 1, 2, 3, 4])


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    groups = draw(st.sampled_from([1, 2, 4, 6]))
    experts = draw(st.none() | st.sampled_from([2, 3, 4, 6]))
    return ModelConfig(
        num_layers=draw(st.integers(1, 12)),
        num_attention_heads=groups * draw(st.sampled_from([1, 2])),
        num_query_groups=groups,
        head_dim=8,
        ffn_hidden_size=draw(st.sampled_from([12, 16, 24])),
        context_length=draw(st.sampled_from([24, 32, 36, 48, 50])),
        num_experts=experts,
        expert_ffn_hidden_size=draw(st.none() | st.sampled_from([9, 12, 16])) if experts else None,
    )


@st.composite
def parallels(draw: st.DrawFn) -> ParallelConfig:
    """Any layout whose own keys go together."""
    pipeline, tensor = draw(SIZE), draw(SIZE)
    ends = st.none() | st.integers(1, 5) if pipeline > 1 else st.none()
    full = draw(st.booleans())
    return ParallelConfig(
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=draw(SIZE) if pipeline > 1 else 1,
        first_stage_layers=draw(ends),
        last_stage_layers=draw(ends),
        context=draw(SIZE),
        expert=draw(SIZE),
        expert_tensor=draw(st.none() | SIZE),
        data=draw(SIZE),
        sequence=draw(st.booleans()) and tensor > 1,
        recompute="full" if full else "none",
        recompute_method=draw(st.sampled_from(["uniform", "block"])) if full else "uniform",
        recompute_layers=draw(st.integers(1, 4)) if full else 1,
    )


def whole(number: Fraction) -> bool:
    return number.denominator == 1 and number > 0


def splits_evenly(model: ModelConfig, parallel: ParallelConfig) -> bool:
    """What Megatron needs, written down anew: every split is a whole number and nothing is left over."""
    tensor, experts = parallel.tensor, model.num_experts
    inner = parallel.expert_tensor or tensor
    tokens = Fraction(model.context_length, 2 * parallel.context if parallel.context > 1 else 1)
    parts = [Fraction(model.num_attention_heads, tensor), Fraction(model.num_query_groups, tensor)]
    parts.append(tokens / tensor if parallel.sequence else tokens)
    if experts is None:
        parts.append(Fraction(model.ffn_hidden_size, tensor))
        if parallel.expert > 1 or parallel.expert_tensor is not None:
            return False
    else:
        parts.append(Fraction(experts, parallel.expert))
        parts.append(Fraction(model.expert_ffn_hidden_size or model.ffn_hidden_size, inner))
        parts.append(Fraction(parallel.world_size, inner * parallel.expert * parallel.pipeline))
        if tensor > 1 and not parallel.sequence:
            return False
    stages: list[int | None] = [None] * parallel.pipeline
    if parallel.first_stage_layers:
        stages[0] = parallel.first_stage_layers
    if parallel.last_stage_layers:
        stages[-1] = parallel.last_stage_layers
    free, given_layers = stages.count(None), sum(filter(None, stages))
    if free == 0 and (given_layers != model.num_layers or parallel.virtual_pipeline > 1):
        return False
    each = Fraction(model.num_layers - given_layers, free or 1)
    chunks = [Fraction(layers or each) / parallel.virtual_pipeline for layers in stages]
    if not all(map(whole, chunks)):
        return False
    if parallel.recompute == "full" and parallel.recompute_method == "uniform":
        parts += [chunk / parallel.recompute_layers for chunk in chunks]
    if (
        parallel.recompute == "full"
        and parallel.recompute_method == "block"
        and parallel.recompute_layers > max(chunks)
    ):
        return False
    return all(map(whole, parts))


@settings(max_examples=400, deadline=None)
@given(model=models(), parallel=parallels())
def test_layouts_that_pass_are_those_that_split_evenly(model: ModelConfig, parallel: ParallelConfig) -> None:
    lines = list(layout_problems(model, parallel))
    assert (lines == []) == splits_evenly(model, parallel), lines
    if lines == []:
        layers = stage_layers(model.num_layers, parallel)
        assert len(layers) == parallel.pipeline and sum(layers) == model.num_layers
        assert all(number > 0 and number % parallel.virtual_pipeline == 0 for number in layers)
        assert parallel.first_stage_layers in (None, layers[0])
        assert parallel.last_stage_layers in (None, layers[-1])


def test_megatron_takes_every_pipeline_that_passes_and_deals_out_the_same_layers() -> None:
    from ra3_megatron.mcore.model import transformer_config

    from megatron.core.transformer.transformer_block import get_num_layers_to_build  # isort: skip
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset  # isort: skip

    ends = (None, 1, 2, 3, 4)
    kinds = set()
    for size, pipeline, virtual, first, last in product(range(2, 13), (2, 3, 4), (1, 2, 3), ends, ends):
        model = MODEL.model_copy(update={"num_layers": size})
        parallel = ParallelConfig(
            pipeline=pipeline, virtual_pipeline=virtual, first_stage_layers=first, last_stage_layers=last
        )
        if any(layout_problems(model, parallel)):
            continue
        kinds.add((pipeline, virtual > 1, first is None, last is None))
        config = transformer_config(model, parallel)
        stages = stage_layers(size, parallel)
        layers: list[int] = []
        for chunk in range(virtual):
            number = chunk if virtual > 1 else None
            for stage, held in enumerate(stages):
                assert get_num_layers_to_build(config, number, stage) == held // virtual
                begin = get_transformer_layer_offset(config, number, stage)
                layers += range(begin, begin + held // virtual)
        assert layers == list(range(size)), parallel
    assert len(kinds) == 3 * 2 * 2 * 2 - 1, "all but both ends of two stages with virtual ones"


def test_megatron_deals_out_the_same_layers_when_ends_count() -> None:
    from ra3_megatron.mcore.model import transformer_config

    from megatron.core.transformer.transformer_block import get_num_layers_to_build  # isort: skip
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset  # isort: skip

    kinds = set()
    sizes = product(range(2, 25), (2, 3, 4), (1, 2, 3), *2 * [(False, True)])
    for size, pipeline, virtual, embedding, output in sizes:
        model = MODEL.model_copy(update={"num_layers": size})
        parallel = ParallelConfig(
            pipeline=pipeline, virtual_pipeline=virtual, count_embedding=embedding, count_output=output
        )
        if any(layout_problems(model, parallel)):
            continue
        kinds.add((pipeline, virtual, embedding, output))
        config = transformer_config(model, parallel)
        held = chunk_layers(size, parallel)
        layers: list[int] = []
        for chunk in range(virtual):
            number = chunk if virtual > 1 else None
            for stage in range(pipeline):
                assert get_num_layers_to_build(config, number, stage) == held[stage][chunk] > 0
                begin = get_transformer_layer_offset(config, number, stage)
                layers += range(begin, begin + held[stage][chunk])
        assert layers == list(range(size)), parallel
    assert len(kinds) == 3 * 3 * 2 * 2


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ("parallel.count_output=true", "parallel.count_output=true needs parallel.pipeline >= 2"),
        (
            "parallel.pipeline=2 parallel.count_output=true parallel.first_stage_layers=1",
            "parallel.first_stage_layers=1 does not go with parallel.count_embedding or parallel.count_output",
        ),
        (
            "parallel.pipeline=2 parallel.count_output=true",
            "parallel.pipeline=2 does not divide model.num_layers=4 + 1 (parallel.count_embedding, "
            "parallel.count_output): 1 or 5 would",
        ),
        (
            "parallel.pipeline=5 parallel.count_output=true parallel.threads=1",
            "parallel.count_embedding or parallel.count_output with model.num_layers=4 + 1 "
            "(parallel.count_embedding, parallel.count_output) leaves a model chunk without layers",
        ),
    ],
)
def test_ends_that_count_are_checked(settings: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, settings.split())
    assert line in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(model=models(), near=parallels(), world_size=st.integers(1, 24), rows=st.sampled_from([4, 6, 12]))
def test_proposed_layouts_fit(model: ModelConfig, near: ParallelConfig, world_size: int, rows: int) -> None:
    batches = {"mstep": MStepConfig(global_batch_size=rows, micro_batch_size=2)}
    proposed = fitting_layouts(model, world_size, near, batches)
    assert len(proposed) <= 3
    changes = []
    for layout in proposed:
        assert layout.world_size == world_size
        assert ParallelConfig.model_validate(layout.model_dump()) == layout
        assert splits_evenly(model, layout)
        processes = layout.data * (layout.pipeline if layout.virtual_pipeline > 1 else 1)
        assert whole(Fraction(rows, 2 * processes))
        values = dict(text.removeprefix("parallel.").split("=") for text in changed_keys(near, layout).split())
        different = {name for name in type(near).model_fields if getattr(near, name) != getattr(layout, name)}
        assert set(values) == different
        changes.append(set(values.items()))
    assert [len(keys) for keys in changes] == sorted(len(keys) for keys in changes)
    assert not any(a <= b for i, a in enumerate(changes) for b in changes[i + 1 :])
    if near.world_size == world_size and splits_evenly(model, near) and not list(batch_problems(near, batches)):
        assert proposed == [near]
