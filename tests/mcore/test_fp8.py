"""FP8 is Transformer Engine's or refused, never bf16 without a word. Nothing here computes in FP8: that needs a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

import ra3_megatron.mcore  # noqa: F401
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.layouts import layout_problems
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.config.precision import RECIPES, Fp8Config
from ra3_megatron.config.run import RunConfig
from ra3_megatron.mcore.fp8 import computed, keep_exact, require_computed, require_fp8, require_fp8_layers
from ra3_megatron.mcore.model import (
    build_model,
    chunks_of,
    has_layers_of_transformer_engine,
    require_recompute,
    transformer_config,
)
from ra3_megatron.mcore.startup import Runtime, initialize
from ra3_megatron.training.rows import Planner
from tests.mcore.small_models import (
    MODEL,
    VOCAB,
    build,
    make_documents,
    make_trainer,
    micro_batches,
    put_in_rows,
    token_sets,
)


def model(precision: str = "fp8_tensorwise", **keys: Any) -> ModelConfig:
    return ModelConfig.model_validate({"precision": precision, **keys})


@pytest.mark.parametrize("precision", RECIPES)
def test_megatron_is_asked_for_the_recipe_in_bf16(precision: str) -> None:
    config = transformer_config(model(precision), ParallelConfig())
    assert config.fp8_recipe == precision.removeprefix("fp8_")
    assert config.fp8 == ("hybrid" if precision in ("fp8_delayed", "fp8_tensorwise") else "e4m3")
    assert config.bf16 and config.params_dtype == torch.bfloat16
    assert model(precision).weight_type == "bf16"
    plain = transformer_config(model("bf16"), ParallelConfig())
    assert plain.fp8 is None and plain.bf16


@pytest.mark.parametrize("precision", RECIPES)
def test_a_cpu_is_refused(precision: str) -> None:
    with pytest.raises(UserError, match=f"model.precision={precision}: needs an NVIDIA GPU.*use model.precision=bf16"):
        require_fp8(model(precision), torch.device("cpu"))
    require_fp8(model("bf16"), torch.device("cpu"))


class Product(torch.nn.Module):
    """The attributes with which Transformer Engine's modules say what they computed in."""

    def __init__(self, recipe: type | None, ran: bool = True) -> None:
        super().__init__()
        self.fp8, self.fp8_meta = recipe is not None, {"recipe": recipe and recipe()}
        self.activation_dtype = torch.bfloat16 if ran else None


class Float8CurrentScaling:
    pass


class DelayedScaling:
    pass


class TEDelayedScaling(DelayedScaling):
    """As Megatron-Core derives one."""


def layers(*recipes: type | None, ran: bool = True) -> torch.nn.Module:
    """A chunk of a model with one product a layer."""
    chunk = torch.nn.Module()
    chunk.layers = torch.nn.ModuleList(torch.nn.Module() for _ in recipes)
    for number, (layer, recipe) in enumerate(zip(chunk.layers, recipes, strict=True)):
        layer.layer_number = number + 1
        layer.linear_qkv = Product(recipe, ran)
    return chunk


def test_layers_that_cannot_say_what_they_compute_in_are_refused() -> None:
    layer = torch.nn.ModuleDict({"linear_qkv": torch.nn.Linear(2, 2)})
    with pytest.raises(RuntimeError, match=r"not Transformer Engine's: \['Linear'\]"):
        require_fp8_layers(model(), layer)
    with pytest.raises(RuntimeError, match="not Transformer Engine's: all"):
        require_fp8_layers(model(), torch.nn.ModuleDict())
    require_fp8_layers(model(), layers(Float8CurrentScaling))
    require_fp8_layers(model("bf16"), layer)


def test_layers_that_did_not_compute_as_asked_end_the_run() -> None:
    asked = model("fp8_tensorwise", num_layers=3, fp8={"last_layers_bf16": 1})
    found = computed([layers(Float8CurrentScaling, Float8CurrentScaling, None)])
    assert found == {"0.linear_qkv": "fp8_tensorwise", "1.linear_qkv": "fp8_tensorwise", "2.linear_qkv": "bf16"}
    require_computed(asked, found)
    with pytest.raises(RuntimeError, match=r"=fp8_tensorwise: computed layer 1.linear_qkv in bf16$"):
        require_computed(asked, computed([layers(Float8CurrentScaling, None, None)]))
    with pytest.raises(RuntimeError, match=r"computed layer 2.linear_qkv in fp8_delayed$"):
        require_computed(asked, computed([layers(Float8CurrentScaling, Float8CurrentScaling, TEDelayedScaling)]))
    assert computed([layers(None, None, ran=False)]) == {}, "what never ran has computed in nothing"
    require_computed(model("bf16"), {"0.linear_qkv": "bf16"})


def test_attention_that_was_asked_for_in_fp8_is_asked_too() -> None:
    class Recipe(TEDelayedScaling):
        fp8_dpa = True

    chunk = layers(Recipe)
    inner = torch.nn.Module()
    inner.core_attention = torch.nn.Module()
    inner.core_attention.kernel = Product(Recipe)
    chunk.layers[0].self_attention = inner
    asked = model("fp8_delayed", num_layers=1, fp8={"attention": True})
    assert computed([chunk]) == {"0.linear_qkv": "fp8_delayed", "0.attention": "fp8_delayed"}
    require_computed(asked, computed([chunk]))
    Recipe.fp8_dpa = False
    with pytest.raises(RuntimeError, match=r"computed layer 0\.attention in bf16"):
        require_computed(asked, computed([chunk]))
    with pytest.raises(RuntimeError, match=r"computed layer 0\.attention in no FP8 kernel"):
        require_computed(asked, computed([layers(Recipe)]))


def test_layers_of_megatron_core_say_nothing() -> None:
    """On a CPU nothing is listed, and nothing is an error without FP8."""
    parallel = ParallelConfig(threads=1)
    assert computed(chunks_of(build(parallel, initialize(parallel, seed=1)))) == {}


def test_weights_in_fp8_keep_what_they_were_made_of() -> None:
    rounded, plain = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    rounded._high_precision_init_val = torch.zeros(2)  # type: ignore[attr-defined]
    value = torch.tensor([1.0, 2.0])
    keep_exact(rounded, value)
    keep_exact(plain, value)
    value.zero_()
    assert rounded._high_precision_init_val.tolist() == [1.0, 2.0]  # type: ignore[attr-defined]
    assert not hasattr(plain, "_high_precision_init_val")


@pytest.mark.parametrize("seed", [None, 5])
def test_weights_in_fp8_never_see_what_memory_happens_to_hold(
    monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    """The largest value that was written to them decides on their scale for `amax_history` steps."""
    for check in ("require_fp8", "require_fp8_layers"):
        monkeypatch.setattr(f"ra3_megatron.mcore.model.{check}", lambda *_: None)
    parallel = ParallelConfig(threads=1)
    runtime = initialize(parallel, seed=1)
    gathered = MODEL.model_copy(update={"precision": "fp8_delayed", "fp8": Fp8Config(parameter_gather=True)})
    torch.use_deterministic_algorithms(True)  # what is not written is NaN
    try:
        found = build_model(gathered, parallel, runtime, VOCAB, token_sets(), seed)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(bool(weight.isfinite().all()) for weight in found.parameters())


def test_weights_in_fp8_that_were_gathered_at_once_have_their_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transposed ones, which the backward pass multiplies: else they would be those of an earlier update."""
    overlapped = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    parallel = ParallelConfig.model_validate({"threads": 1, **overlapped})
    trainer = make_trainer(parallel, initialize(parallel, seed=1))
    rounded = dict(trainer.model.named_parameters())["0.module.decoder.layers.0.mlp.linear_fc1.weight"]
    renewed: list[torch.Tensor] = []
    monkeypatch.setattr("ra3_megatron.mcore.trainer.is_float8tensor", lambda parameter: parameter is rounded)
    monkeypatch.setattr("ra3_megatron.mcore.trainer.post_all_gather_processing", renewed.extend)
    trainer.synchronize()
    assert len(renewed) == 1 and renewed[0] is rounded


def test_a_frozen_model_has_scales_without_a_history() -> None:
    delayed = model("fp8_delayed", fp8={"attention": True, "amax_history": 16, "parameter_gather": True})
    assert delayed.frozen.precision == "fp8_tensorwise" and delayed.frozen.fp8 == Fp8Config()
    blockwise = model("fp8_blockwise", fp8={"first_layers_bf16": 1, "parameter_gather": True})
    assert blockwise.frozen.precision == "fp8_blockwise" and blockwise.frozen.fp8 == Fp8Config(first_layers_bf16=1)
    assert model("bf16").frozen == model("bf16")
    for asked in (delayed, blockwise):
        assert not list(layout_problems(asked.frozen, ParallelConfig(distributed_optimizer=True)))


def test_layers_in_fp32_multiply_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's would in TF32, whatever torch is told."""
    monkeypatch.setattr("ra3_megatron.mcore.model.has_transformer_engine", lambda device: device.type == "cuda")
    cuda = torch.device("cuda")
    assert not has_layers_of_transformer_engine(model("fp32"), cuda)
    assert has_layers_of_transformer_engine(model("bf16"), cuda) and has_layers_of_transformer_engine(model(), cuda)
    assert not has_layers_of_transformer_engine(model("bf16"), torch.device("cpu"))


def test_norms_inside_of_products_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ra3_megatron.mcore.model.has_transformer_engine", lambda device: device.type == "cuda")
    asked = ParallelConfig(recompute="selective", recompute_modules=["mlp", "layernorm"])
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(UserError, match=r"^parallel.recompute_modules=\[…, layernorm\] does nothing here"):
        require_recompute(model("bf16"), asked, cuda)
    for other in (model("bf16"), model("fp32")):
        require_recompute(other, asked, cpu)
    require_recompute(model("fp32"), asked, cuda)
    require_recompute(model("bf16", num_experts=2), asked, cuda)
    require_recompute(model("bf16"), ParallelConfig(recompute="selective", recompute_modules=["mlp"]), cuda)


def test_keys_of_fp8_reach_megatron() -> None:
    ends = transformer_config(
        model(fp8={"first_layers_bf16": 1, "last_layers_bf16": 2}, num_layers=4), ParallelConfig()
    )
    assert ends.first_last_layers_bf16
    assert (ends.num_layers_at_start_in_bf16, ends.num_layers_at_end_in_bf16) == (1, 2)
    delayed = transformer_config(
        model("fp8_delayed", fp8={"attention": True, "amax_history": 16, "parameter_gather": True}), ParallelConfig()
    )
    assert delayed.fp8_dot_product_attention and delayed.fp8_param and delayed.fp8_amax_history_len == 16
    plain = transformer_config(model(), ParallelConfig())
    assert not (plain.fp8_param or plain.fp8_dot_product_attention or plain.first_last_layers_bf16)


def test_dimensions_are_multiples_of_16_on_each_process() -> None:
    assert not list(layout_problems(model(), ParallelConfig(tensor=4, data=1)))
    narrow = model(ffn_hidden_size=720)  # 45 * 16
    assert not list(layout_problems(narrow, ParallelConfig()))
    (line,) = layout_problems(narrow, ParallelConfig(tensor=2))
    assert line.startswith("model.ffn_hidden_size=720 does not go with model.precision=fp8_tensorwise")
    (line,) = layout_problems(model(context_length=520), ParallelConfig())
    assert (
        line
        == "model.context_length=520 is not a multiple of 16, for model.precision=fp8_tensorwise: 512 or 528 would be"
    )


def test_rows_are_multiples_of_16() -> None:
    keys = {"model": {"precision": "fp8_tensorwise"}, "rollout": {"engine": "vllm"}}
    config = RunConfig.model_validate(keys)
    runtime = Runtime(device=torch.device("cpu"), rank=0, world_size=1)
    assert Planner(config, config.mstep, runtime).sequence_multiple == 16
    assert Planner(RunConfig(), config.mstep, runtime).sequence_multiple == 1
    keys["model"]["precision"] = "fp8_blockwise"
    split = RunConfig.model_validate({**keys, "parallel": {"tensor": 2, "sequence": True}})
    assert Planner(split, split.mstep, runtime).sequence_multiple == 256


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": {"precision": "fp8_tensorwise"}}, "model.precision=fp8_tensorwise needs rollout.engine=vllm"),
        (
            {"model": {"precision": "fp8_tensorwise", "num_experts": 4}, "rollout": {"engine": "vllm"}},
            "does not go with model.num_experts=4",
        ),
        ({"model": {"precision": "fp8"}}, "fp8_blockwise"),
    ],
)
def test_what_fp8_does_not_go_with(keys: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(keys)


@pytest.mark.parametrize(("precision", "may_skip"), [("delayed", True), ("delayed", False), ("tensorwise", True)])
def test_a_skipped_update_leaves_delayed_scales_as_they_were(
    precision: str, may_skip: bool, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what Transformer Engine's modules have for it; a forward pass changes their scales."""
    trainer = make_trainer(ParallelConfig(threads=1), runtime)
    trainer.may_skip, trainer._delayed_scales = may_skip, precision == "delayed"
    module = chunks_of(trainer.model)[0].decoder.layers[0].self_attention.linear_qkv
    scale, fresh = torch.ones(2), torch.ones(2)
    monkeypatch.setattr(module, "get_fp8_meta_tensors", scale.clone, raising=False)
    monkeypatch.setattr(module, "reset_fp8_meta_tensors", scale.copy_, raising=False)

    def halve(*_: Any) -> None:
        scale.div_(2)

    module.register_forward_hook(halve)
    batches = micro_batches(put_in_rows(make_documents(4, seed=1)), runtime, 2)
    for judge, kept in ((lambda *_: "a spike", may_skip and precision == "delayed"), (lambda *_: "", False)):
        trainer.judge = judge
        trainer.step(batches)
        assert torch.equal(scale, fresh) == kept
        scale.fill_(1)
