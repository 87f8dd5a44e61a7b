"""The matrix of precisions, hardware and keys: each forbidden combination is refused by name, the others are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ra3_megatron.config.compatibility import hardware_problems, length_multiple
from ra3_megatron.config.layouts import layout_problems
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.config.precision import RECIPES, Hardware, matrix

H100 = Hardware("H100", (9, 0), (13, 0), (2, 11))
B200 = Hardware("B200", (10, 0), (13, 0), (2, 11))
L4 = Hardware("L4", (8, 9), (12, 4), (2, 11))
A100 = Hardware("A100", (8, 0), (13, 0), (2, 11))
DOCS = Path(__file__).parents[2] / "docs" / "gpu.md"


def model(precision: str, **fp8: Any) -> ModelConfig:
    return ModelConfig.model_validate({"precision": precision, "num_layers": 8, "fp8": fp8})


ALLOWED = {
    "H100": (H100, {"fp8_delayed", "fp8_tensorwise", "fp8_blockwise"}),
    "B200": (B200, {"fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8"}),
    "RTX 5090": (Hardware("RTX 5090", (12, 0), (13, 0), (2, 11)), {"fp8_delayed", "fp8_tensorwise", "fp8_blockwise"}),
    "L4": (L4, {"fp8_delayed", "fp8_tensorwise"}),
    "A100": (A100, set()),
    "CPU": (Hardware("the CPU", None), set()),
    "H100 without TE": (Hardware("H100", (9, 0), (13, 0), None, "No module named x"), set()),
    "H100, TE 2.2": (Hardware("H100", (9, 0), (13, 0), (2, 2)), {"fp8_delayed", "fp8_tensorwise"}),
    "H100, CUDA 12.8": (Hardware("H100", (9, 0), (12, 8), (2, 11)), {"fp8_delayed", "fp8_tensorwise"}),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_recipes_of_hardware(name: str) -> None:
    hardware, allowed = ALLOWED[name]
    assert {precision for precision in RECIPES if not list(hardware_problems(model(precision), hardware))} == allowed
    for precision in ("fp32", "bf16"):
        assert not list(hardware_problems(model(precision), hardware))


@pytest.mark.parametrize(
    ("precision", "hardware", "line"),
    [
        (
            "mxfp8",
            H100,
            "needs a GPU of compute capability 10.0, and this one (H100) has 9.0: use model.precision=fp8_",
        ),
        ("fp8_tensorwise", A100, "needs a GPU of compute capability 8.9, and this one (A100) has 8.0: use model.preci"),
        ("fp8_blockwise", ALLOWED["H100, CUDA 12.8"][0], "needs CUDA 12.9, and torch is built with 12.8"),
        ("fp8_blockwise", ALLOWED["H100, TE 2.2"][0], "needs Transformer Engine 2.3, and this is 2.2"),
        ("mxfp8", ALLOWED["RTX 5090"][0], "Transformer Engine does not have it for compute capability 12.0 (RTX 5090)"),
        (
            "fp8_delayed",
            ALLOWED["H100 without TE"][0],
            "needs Transformer Engine, which does not load (No module named",
        ),
        ("fp8_delayed", ALLOWED["CPU"][0], "needs an NVIDIA GPU, and this process runs on the CPU: use model.precisio"),
    ],
)
def test_each_refusal_says_what_is_missing(precision: str, hardware: Hardware, line: str) -> None:
    (said,) = hardware_problems(model(precision), hardware)
    assert said.startswith(f"model.precision={precision}: {line}")


def test_attention_in_fp8_is_refused_where_no_kernel_is() -> None:
    wide = {"head_dim": 128}
    assert not list(hardware_problems(model("fp8_delayed", attention=True).model_copy(update=wide), H100))
    (said,) = hardware_problems(model("fp8_tensorwise", attention=True), H100)
    assert said == (
        "model.fp8.attention=true with model.precision=fp8_tensorwise: needs compute capability 10.0, and this one "
        "(H100) has 9.0; FP8 attention: fp8_delayed from 9.0, fp8_tensorwise from 10.0"
    )
    assert not list(hardware_problems(model("fp8_tensorwise", attention=True), B200))
    for precision in ("fp8_delayed", "fp8_tensorwise"):
        (said,) = hardware_problems(model(precision, attention=True), ALLOWED["RTX 5090"][0])
        assert said == (
            "model.fp8.attention=true: Transformer Engine does not have it for compute capability 12.0 (RTX 5090): "
            "leave it out"
        )


@pytest.mark.parametrize(
    ("channels", "hardware", "end"),
    [
        (64, H100, "(H100) has it for heads of 128 channels, and these have 64 (model.head_dim)"),
        (256, H100, "(H100) has it for heads of 128 channels, and these have 256 (model.head_dim)"),
        (256, B200, "has it for heads of at most 128 channels in multiples of 16, and these have 256 (model.head_dim)"),
        (72, B200, "has it for heads of at most 128 channels in multiples of 16, and these have 72 (model.head_dim)"),
    ],
)
def test_attention_in_fp8_is_refused_for_heads_that_no_kernel_takes(
    channels: int, hardware: Hardware, end: str
) -> None:
    asked = model("fp8_delayed", attention=True).model_copy(update={"head_dim": channels})
    (said,) = hardware_problems(asked, hardware)
    assert said.startswith("model.fp8.attention=true: compute capability") and said.endswith(end)


DISTRIBUTED = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True, "data": 2}


@pytest.mark.parametrize(
    ("precision", "fp8", "parallel", "line"),
    [
        ("bf16", {"attention": True}, {}, "model.fp8.attention=true is not read with model.precision=bf16: it goes wi"),
        ("fp32", {"first_layers_bf16": 1}, {}, "model.fp8.first_layers_bf16=1 is not read with model.precision=fp32"),
        ("fp8_delayed", {"last_layers_bf16": 1}, {}, "model.fp8.last_layers_bf16=1 does not go with model.precision=f"),
        (
            "fp8_tensorwise",
            {"first_layers_bf16": 5},
            {"pipeline": 2},
            "model.fp8.first_layers_bf16=5 is more than the 4",
        ),
        (
            "fp8_tensorwise",
            {"first_layers_bf16": 4, "last_layers_bf16": 4},
            {},
            "model.fp8.first_layers_bf16=4 and last_layers_bf16=4 leave none of model.num_layers=8 in FP8",
        ),
        ("mxfp8", {"amax_history": 16}, {}, "model.fp8.amax_history=16 is not read with model.precision=mxfp8"),
        (
            "fp8_delayed",
            {"parameter_gather": True},
            {},
            "model.fp8.parameter_gather=true needs parallel.distributed_op",
        ),
        (
            "mxfp8",
            {"parameter_gather": True},
            {"distributed_optimizer": True},
            "model.fp8.parameter_gather=true does not go with model.precision=mxfp8: Transformer Engine cannot move su",
        ),
        ("fp8_blockwise", {"attention": True}, {}, "model.fp8.attention=true does not go with model.precision=fp8_blo"),
        (
            "fp8_delayed",
            {"attention": True},
            {"context": 2},
            "model.fp8.attention=true does not go with parallel.conte",
        ),
        (
            "fp8_delayed",
            {"attention": True},
            {"recompute": "selective"},
            "model.fp8.attention=true does not go with parallel.recompute_modules=[…, core_attn]",
        ),
        (
            "fp8_blockwise",
            {},
            {"recompute": "selective", "recompute_modules": ["mlp", "layernorm"]},
            "parallel.recompute_modules=[…, layernorm] does not go with model.precision=fp8_blockwise",
        ),
    ],
)
def test_keys_that_do_not_go_together(precision: str, fp8: dict[str, Any], parallel: dict[str, Any], line: str) -> None:
    (said,) = layout_problems(model(precision, **fp8), ParallelConfig.model_validate(parallel))
    assert said.startswith(line)


@pytest.mark.parametrize(
    ("precision", "fp8", "parallel"),
    [
        ("fp8_tensorwise", {"first_layers_bf16": 1, "last_layers_bf16": 1}, {"pipeline": 2}),
        ("fp8_blockwise", {"parameter_gather": True}, DISTRIBUTED),
        ("fp8_delayed", {"amax_history": 16, "attention": True}, {"tensor": 2}),
        ("fp8_delayed", {"attention": True}, {"recompute": "full"}),
        ("fp8_delayed", {"attention": True}, {"recompute": "selective", "recompute_modules": ["mlp"]}),
        ("fp8_tensorwise", {}, {"recompute": "selective"}),
    ],
)
def test_keys_that_go_together(precision: str, fp8: dict[str, Any], parallel: dict[str, Any]) -> None:
    assert not list(layout_problems(model(precision, **fp8), ParallelConfig.model_validate(parallel)))


def test_mxfp8_has_products_of_multiples_of_32() -> None:
    asked = model("mxfp8").model_copy(update={"ffn_hidden_size": 720})  # 45 * 16
    (said,) = layout_problems(asked, ParallelConfig())
    assert said.startswith("model.ffn_hidden_size=720 does not go with") and "a multiple of 32" in said
    assert asked.row_multiple == 32 and model("fp8_delayed").row_multiple == 16 and model("bf16").row_multiple == 1


def test_blocks_that_are_gathered_are_whole_on_each_process() -> None:
    """Under sequence parallelism Transformer Engine gathers inputs in FP8: with fp8_blockwise, 128 x 128 values."""
    sequence = ParallelConfig(tensor=2, sequence=True)
    wide = {"hidden_size": 512, "num_attention_heads": 8, "ffn_hidden_size": 1024}
    blockwise = model("fp8_blockwise").model_copy(update={**wide, "context_length": 1024})
    assert not list(layout_problems(blockwise, sequence))
    (said,) = layout_problems(blockwise.model_copy(update={"context_length": 1120}), sequence)
    assert said.startswith("model.context_length=1120 is not a multiple of 256") and "1024 or 1280 would be" in said
    (said,) = layout_problems(blockwise.model_copy(update={"hidden_size": 576, "head_dim": 64}), sequence)
    assert said.startswith("model.hidden_size=576 does not go with model.precision=fp8_blockwise and parallel.tensor=2")
    assert "a multiple of 128" in said
    assert length_multiple(blockwise, ParallelConfig(tensor=2)) == 16
    assert length_multiple(blockwise, ParallelConfig(tensor=2, sequence=True, context=2)) == 512
    for precision, multiple in (("fp8_tensorwise", 32), ("mxfp8", 64), ("bf16", 2)):
        assert length_multiple(model(precision), sequence) == multiple


def test_the_page_has_the_matrix() -> None:
    head, *rows = matrix()
    lines = [head, tuple("---" for _ in head), *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    assert table in DOCS.read_text(encoding="utf-8")
