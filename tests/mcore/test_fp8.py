"""FP8 is Transformer Engine's or refused, never bf16 without a word. Nothing here computes in FP8: that needs a GPU."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

import ra3_megatron.mcore  # noqa: F401
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.layouts import layout_problems
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.config.run import RunConfig
from ra3_megatron.mcore.fp8 import require_fp8, require_fp8_layers
from ra3_megatron.mcore.model import transformer_config
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.training.rows import Planner

RECIPES = ("fp8_delayed", "fp8_tensorwise", "fp8_blockwise")


def model(precision: str = "fp8_tensorwise", **keys: int) -> ModelConfig:
    return ModelConfig.model_validate({"precision": precision, **keys})


@pytest.mark.parametrize("precision", RECIPES)
def test_megatron_is_asked_for_the_recipe_in_bf16(precision: str) -> None:
    config = transformer_config(model(precision), ParallelConfig())
    assert config.fp8_recipe == precision.removeprefix("fp8_") and config.fp8 in ("hybrid", "e4m3")
    assert config.bf16 and config.params_dtype == torch.bfloat16
    assert model(precision).weight_type == "bf16"
    plain = transformer_config(model("bf16"), ParallelConfig())
    assert plain.fp8 is None and plain.bf16


@pytest.mark.parametrize("precision", RECIPES)
def test_a_cpu_is_refused(precision: str) -> None:
    with pytest.raises(UserError, match=f"model.precision={precision}: needs an NVIDIA GPU.*use model.precision=bf16"):
        require_fp8(model(precision), torch.device("cpu"))
    require_fp8(model("bf16"), torch.device("cpu"))


@pytest.mark.parametrize(("capability", "precision"), [((8, 0), "fp8_tensorwise"), ((8, 9), "fp8_blockwise")])
def test_an_older_gpu_is_refused(capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(UserError, match=f"this one has {capability[0]}.{capability[1]}"):
        require_fp8(model(precision), torch.device("cuda"))


def test_a_gpu_without_transformer_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(__import__("sys").modules, "transformer_engine", None)  # as if it were not installed
    with pytest.raises(UserError, match="needs Transformer Engine, which does not load"):
        require_fp8(model(), torch.device("cuda"))


def test_layers_that_are_not_transformer_engines_are_found() -> None:
    layer = torch.nn.ModuleDict({"linear_qkv": torch.nn.Linear(2, 2)})
    with pytest.raises(RuntimeError, match=r"not Transformer Engine's: \['Linear'\]"):
        require_fp8_layers(model(), layer)
    with pytest.raises(RuntimeError, match="not Transformer Engine's: all"):
        require_fp8_layers(model(), torch.nn.ModuleDict())
    require_fp8_layers(model("bf16"), layer)


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


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": {"precision": "fp8_tensorwise"}}, "model.precision=fp8_tensorwise needs rollout.engine=vllm"),
        (
            {"model": {"precision": "fp8_tensorwise", "num_experts": 4}, "rollout": {"engine": "vllm"}},
            "does not go with model.num_experts=4",
        ),
        ({"model": {"precision": "mxfp8"}}, "fp8_blockwise"),
    ],
)
def test_what_fp8_does_not_go_with(keys: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(keys)
