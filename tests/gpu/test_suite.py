"""The suite's own code, on a CPU: every part in its small form, and what decides whether its results can be believed.

What only a GPU can run (Transformer Engine, CUDA's profiler, IPC) is not here: `make gpu` is that test.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import alternate
from ra3_megatron.config.compatibility import key_problems
from ra3_megatron.config.model import ModelConfig
from ra3_megatron.config.precision import RECIPES
from ra3_megatron.mcore.trainer import forward
from ra3_megatron.scaling.tables import Architecture, architecture_named
from tests.gpu import checkpoints, equality, fp8, kernels, offload, profiles, rates, rollouts, throughput, training
from tests.gpu.evidence import Evidence
from tests.gpu.part import setting_of
from tests.gpu.parts import PARTS
from tests.gpu.setting import Setting, full_rows, relative, release, with_precision
from tests.gpu.table import table

ROW = {"name", "value", "unit", "low", "high", "at_most", "at_least", "holds", "note"}
SLOW = ("equality", "checkpoints", "hopprog")
MACHINE = {
    "date": "today",
    "commit": None,
    "modified": None,
    "gpu": None,
    "processor": "a processor",
    "cores": 2,
    "python": "3.11",
    "cuda": None,
    "compiler": None,
    "packages": dict.fromkeys(("torch", "transformer-engine", "megatron-core", "transformers", "triton")),
}

Run = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a part in its small form, once; what it left on disk."""
    done: dict[str, dict[str, Any]] = {}

    def once(name: str) -> dict[str, Any]:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            file = folder / f"{name}.json"
            evidence = Evidence(file, name, PARTS[name], small=True, seconds=600)
            import_module(f"tests.gpu.{name}").run(evidence, setting_of(True, folder, folder))
            evidence.end("complete")
            assert file.stat().st_size < 50_000
            done[name] = json.loads(file.read_text())
        return done[name]

    return once


def rows(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in content["rows"]}


# -- every part -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in PARTS])
def test_a_part_in_its_small_form(run: Run, name: str) -> None:
    """It comes to its end without an error, its checks hold, nothing is called evidence, and it forms a table."""
    found = run(name)
    assert found["status"] == "complete" and found["errors"] == [] and found["evidence"] is False
    assert found["part"] == name and found["title"] == PARTS[name] and found["rows"]
    for row in found["rows"]:
        assert row.keys() <= ROW and row.keys() >= {"name", "value"}
        if isinstance(row["value"], float):
            assert math.isfinite(row["value"])
        if "holds" in row:
            assert row["holds"] is True and ("at_most" in row or "at_least" in row)
        if "low" in row:
            assert row["low"] <= row["value"] <= row["high"]
    assert len(rows(found)) == len(found["rows"]), "names are unique"
    assert all(entry["name"] and entry["why"] for entry in found["missing"])
    text = table({"machine": MACHINE, "evidence": False, "parts": {name: found}})
    assert "No figure here is evidence" in text and all(row["name"] in text for row in found["rows"])


def test_what_needs_a_gpu_is_named_and_has_no_number(run: Run) -> None:
    for name in ("kernels", "fp8", "training", "throughput"):
        found = run(name)
        missing = {entry["name"] for entry in found["missing"]}
        assert {"fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8"} <= missing
        assert not any("fp8_" in row["name"] or "mxfp8" in row["name"] for row in found["rows"])


@pytest.mark.slow
def test_equal_sides_are_equal_and_identical_checkpoints_are_identical(run: Run) -> None:
    found = [row["value"] for row in run("equality")["rows"]]
    assert len(found) == 6 and max(found) == 0.0  # the same program twice: to the bit
    counts = [row for row in run("checkpoints")["rows"] if "bit for bit" in row["name"]]
    assert len(counts) == 5 and all(row["value"] == 0 for row in counts)


def test_rounding_to_bf16_is_seen_by_as_much_as_it_is(run: Run) -> None:
    for row in run("kernels")["rows"]:
        if "log-probabilities" in row["name"] and "output" in row["name"]:
            assert row["value"] < 1e-3  # they are large, and only logits are rounded
        elif "Adam" not in row["name"]:
            assert 1e-3 < row["value"] < 5e-3  # 8 bits of significand


def test_python_functions_have_thoughts_to_sample(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(training, "LIMIT", 400)
    monkeypatch.setattr(training, "VOCABULARY", 600)
    found = training.python_functions(types.SimpleNamespace(folder=tmp_path))  # type: ignore[arg-type]
    assert len(found.documents) == len(found.plain) > 200
    lines = sum(document.num_lines for document in found.documents)
    assert sum(document.think.sum() for document in found.documents) > 2 * training.THINKS * lines
    for thinking, plain in zip(found.documents, found.plain, strict=True):
        assert not plain.think.any() and thinking.num_lines == plain.num_lines and plain.offered.any()
        assert thinking.is_code.sum() == plain.is_code.sum()


def test_training_learns_in_every_precision(run: Run) -> None:
    series = run("training")["series"]
    for precision in ("fp32", "bf16"):
        loss = series[f"M-step loss, {precision}"]
        assert loss[-1] < 0.9 * loss[0]
        assert len(series[f"E-step reward, {precision}"]) == 2
    assert series["M-step loss, fp32"] != series["M-step loss, bf16"]


# -- what the parts judge by ------------------------------------------------------------------------------------------


def test_a_layer_that_computes_wrong_does_not_pass(evidence: Evidence, setting: Setting) -> None:
    layer = torch.nn.Linear(32, 16, bias=False, dtype=torch.bfloat16)

    def judged(forward: Callable[[torch.Tensor], torch.Tensor]) -> list[bool]:
        evidence.content["rows"].clear()
        case = kernels.Case(forward, {"weight": layer.weight}, torch.enable_grad)
        kernels.judge(evidence, "a layer", case, kernels.reference_linear, (64, 32), "bf16", setting)
        return [row["holds"] for row in evidence.content["rows"]]

    assert judged(layer) == [True, True, True]
    assert judged(lambda x: 1.02 * layer(x)) == [False, False, False]
    assert judged(lambda x: torch.nn.functional.linear(x.float(), layer.weight.float())) != [True, True, True]


@pytest.mark.parametrize("precision", ["fp8_delayed", "fp8_blockwise"])
def test_bounds_of_fp8_leave_no_room_for_bf16(precision: str) -> None:
    for what in ("output", "input gradient", "weight gradient"):
        least, most = kernels.bounds(precision, what)
        assert 0.005 < least < most  # bf16 is at 0.003, as measured above
    exact = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    error = float((exact.to(torch.float8_e4m3fn).float() - exact).norm() / exact.norm())
    coarse = float((exact.to(torch.float8_e5m2).float() - exact).norm() / exact.norm())
    assert kernels.LEAST < math.hypot(error, error) < kernels.MOST["e4m3"]
    assert kernels.LEAST < math.hypot(error, coarse) < kernels.MOST["e5m2"]


def test_a_wrong_optimizer_does_not_pass(evidence: Evidence, setting: Setting) -> None:
    settings = {"lr": 1e-3, "weight_decay": 0.1}

    def differs(make: Any) -> float:
        one, other = (
            kernels.changes(each, [(8, 8)], settings, 2, setting.device) for each in (make, torch.optim.AdamW)
        )
        return max(relative(a, b) for a, b in zip(one, other, strict=True))

    assert differs(torch.optim.AdamW) == 0.0
    assert differs(torch.optim.Adam) > kernels.ADAM_MOST  # decay that is part of the gradient


def test_a_gpu_without_transformer_engine_names_it_as_missing(
    monkeypatch: pytest.MonkeyPatch, evidence: Evidence, setting: Setting
) -> None:
    def nothing(*_: object) -> None:
        pass

    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    for name in ("megatron", "rotary", "swiglu", "log_probabilities", "events", "documents", "release"):
        monkeypatch.setattr(kernels, name, nothing)
    monkeypatch.setattr(kernels, "changes", lambda *_: [torch.ones(2)])
    monkeypatch.setattr(kernels, "chunks_of", lambda _: [None])
    monkeypatch.setattr(Setting, "build", nothing)
    monkeypatch.setattr(Setting, "recipes", lambda *_: [])
    kernels.run(evidence, replace(setting, runtime=replace(setting.runtime, device=torch.device("cuda"))))
    assert evidence.content["errors"] == []
    missing = {"name": "te.Linear and FusedAdam", "why": "Transformer Engine does not load"}
    assert evidence.content["missing"] == [missing]
    assert [row["name"].split(",")[0] for row in evidence.content["rows"]] == ["torch's fused AdamW"] * 2


def test_a_difference_between_the_sides_is_seen() -> None:
    one: equality.Numbers = {"logits": {"": torch.ones(100)}, "weights": {"a": torch.ones(3), "b": torch.ones(3)}}
    other: equality.Numbers = {"logits": {"": torch.ones(100)}, "weights": {"a": torch.ones(3), "b": torch.ones(3)}}
    assert equality.differences(one, other) == {"logits": 0.0, "weights": 0.0}
    other["weights"]["b"] = torch.tensor([1.0, 1.0, 1.001])
    assert equality.differences(one, other)["weights"] > equality.MOST["weights"]
    other["weights"]["b"] = torch.tensor([1.0, 1.0, math.nan])
    assert math.isnan(equality.differences(one, other)["weights"])
    del other["weights"]["a"]
    with pytest.raises(ValueError, match="different tensors"):
        equality.differences(one, other)


def test_bits_are_compared_as_bits() -> None:
    first = {"a": torch.tensor([1.0, math.nan, 0.0]), "b": torch.ones(2, dtype=torch.bfloat16)}
    assert checkpoints.unequal({k: v.clone() for k, v in first.items()}, first) == 0
    assert checkpoints.unequal({**first, "a": torch.tensor([1.0, math.nan, -0.0])}, first) == 1
    assert checkpoints.unequal({**first, "b": torch.ones(2)}, first) == 1
    assert checkpoints.unequal({"a": first["a"]}, first) == 1


def test_resumed_runs_are_compared_whatever_becomes_of_the_cpu_processes(
    monkeypatch: pytest.MonkeyPatch, evidence: Evidence, setting: Setting
) -> None:
    def late(role: str, folder: Path) -> None:
        raise subprocess.TimeoutExpired(role, checkpoints.SECONDS)

    resumed: list[str] = []
    monkeypatch.setattr(checkpoints, "_on_cpu", late)
    monkeypatch.setattr(checkpoints, "pass_on", lambda *_: None)
    monkeypatch.setattr(checkpoints, "resume", lambda evidence, setting, precision: resumed.append(precision))
    checkpoints.run(evidence, setting)
    assert resumed == ["bf16"]
    failed = [entry["name"] for entry in evidence.content["errors"]]
    assert failed[:2] == ["a CPU process that trains and saves", "a CPU process that loads and saves"]


class Float8TensorStorage:
    """Called as Transformer Engine's class is, which is no tensor."""


def test_products_are_counted_by_what_they_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    """On stand-ins for the modules that hold Transformer Engine's call; the call itself is not replaced."""
    for name in ("", ".pytorch", ".pytorch.module", *(f".pytorch.module.{each}" for each in fp8.MODULES)):
        module = types.ModuleType(f"transformer_engine{name}")
        module.general_gemm = lambda one, other, layout="TN": layout  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    linear = sys.modules["transformer_engine.pytorch.module.linear"]
    before = linear.general_gemm
    plain, rounded = torch.ones(2, dtype=torch.bfloat16), Float8TensorStorage()
    with fp8.products() as seen:
        assert linear.general_gemm(rounded, rounded, layout="NN") == "NN"
        linear.general_gemm(torch.nn.Parameter(plain), plain)
    assert seen == {("Float8TensorStorage",) * 2: 1, ("bfloat16",) * 2: 1}
    assert linear.general_gemm is before
    assert fp8.is_quantized("Float8BlockwiseQTensorStorage") and fp8.is_quantized("MXFP8TensorStorage")
    assert not fp8.is_quantized("bfloat16") and not fp8.is_quantized("float8_e4m3fn")


def test_an_fp8_recipe_that_trains_worse_is_told(evidence: Evidence) -> None:
    def curves(end: float, mismatch: float) -> dict[str, list[float]]:
        loss = [4.0, 4.0, 4.0, *[end] * 20]
        return {"M-step loss": loss, "E-step reward": [-1.0], "E-step log_prob_mismatch": [0.01, mismatch]}

    for end, mismatch, holds in ((2.01, 0.01, True), (2.1, 0.01, False), (2.01, 0.25, False), (2.01, math.nan, False)):
        evidence.content["rows"].clear()
        found = {"bf16": curves(2.0, 0.01), "fp8_tensorwise": curves(end, mismatch)}
        training.judge(evidence, found, "fp8_tensorwise", "bf16")
        assert all(row.get("holds", True) for row in evidence.content["rows"]) is holds


def test_a_graph_that_leaves_nan_does_not_pass(
    monkeypatch: pytest.MonkeyPatch, evidence: Evidence, setting: Setting
) -> None:
    """In any pass behind the one that is recorded."""

    def broken(function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        out = function()

        def run_again() -> None:
            out.fill_(math.nan)

        return out, run_again

    work = rollouts.toy(setting)
    model = work.model(setting.runtime)
    for record, holds in ((rollouts.again, True), (broken, False)):
        monkeypatch.setattr(rollouts, "again", record)
        rollouts.agree(evidence, setting, "toy", work, model)
        assert evidence.content["rows"][-1]["holds"] is holds


@pytest.mark.parametrize("failing", [False, True])
def test_an_offloading_arm_is_never_compared_with_itself(
    monkeypatch: pytest.MonkeyPatch, evidence: Evidence, setting: Setting, failing: bool
) -> None:
    def steps(_: Setting, made: Architecture, keys: dict[str, Any]) -> offload.Found:
        if failing and not keys:
            raise ValueError("no memory")
        return offload.Found({"a": torch.ones(2)}, 1.0, 1.0)

    monkeypatch.setattr(offload, "steps", steps)
    monkeypatch.setattr(offload, "scorer", lambda *_: None)
    offload.run(evidence, replace(setting, runtime=replace(setting.runtime, device=torch.device("cuda"))))
    compared = {row["name"].split(":")[0] for row in evidence.content["rows"] if "holds" in row}
    named = {entry["name"].split(":")[0] for entry in evidence.content["missing"]}
    offloading = {name for name, keys in offload.ARMS.items() if keys}
    assert compared == (set() if failing else offloading | {"nothing, again"})
    assert named == (offloading if failing else set())


# -- throughput -------------------------------------------------------------------------------------------------------


def test_flops_are_those_that_torch_counts_and_those_by_hand(evidence: Evidence, setting: Setting) -> None:
    case = throughput.cases_of(small=True)["tiny"]
    model, sequence, size = case.made.model, case.sequence, case.made.vocab_size
    # by hand: 64 wide, 4 heads and 2 groups of 16 channels, 96 wide feed-forward, 2 layers, 256 tokens
    layer = 64 * (2 * 64 + 2 * 32) + 3 * 64 * 96
    attention = 4 * 64 * (sequence + 1) / 2
    assert case.tokens == 2 * 2 * 64
    assert case.flops == 3 * case.tokens * (2 * (2 * layer + attention) + 2 * 64 * 256)
    network = setting.build(model, size, "fp32")
    batch = full_rows(2, sequence, size, seed=1)
    with FlopCounterMode(display=False) as counted:
        forward(network, [batch], setting.runtime)
    products = sum(value for name, value in counted.get_flop_counts()["Global"].items() if "attention" not in str(name))
    scored = 2 * (sequence - 1)  # the last token of a row predicts nothing
    assert products == 2 * 2 * 2 * sequence * layer + 2 * scored * 64 * 256
    release()


def test_the_formula_knows_llama() -> None:
    """Against the number of weights that the model is published with: 6 FLOPs a weight and token, and attention."""
    made = architecture_named("llama3.1-8b", 8192)
    tokens = 8192
    found = throughput.step_flops(made, 8192, tokens)
    weights = 8_030_261_248 - 128_256 * 4096 - 65 * 4096  # without the embedding's look-up and the norms
    attention = 3 * tokens * 4 * 32 * 4096 * 8193 / 2
    assert found == pytest.approx(6 * weights * tokens + attention, rel=1e-9)


def test_tokens_per_second_and_mfu_of_a_step_that_takes_a_known_time(evidence: Evidence, setting: Setting) -> None:
    case = throughput.cases_of(small=True)["tiny"]
    steps = []

    def step() -> None:
        steps.append(1)
        time.sleep(0.05)

    throughput.measured(evidence, setting, case, "sleep", step, {"bf16": 2 * case.flops / 0.05})
    found = rows(evidence.content)
    assert len(steps) == 1 + 3  # a warm-up that does not count
    assert 0.6 * case.tokens / 0.05 < found["sleep: tokens/s"]["value"] <= case.tokens / 0.05
    assert 0.3 < found["sleep: MFU, of torch's bf16 product"]["value"] <= 0.5


def test_the_device_is_waited_for_before_and_behind_every_repeat() -> None:
    order: list[str] = []
    timings = alternate({"a": lambda: order.append("a")}, repeats=2, warm_up=1, wait=lambda: order.append("wait"))
    assert order == ["wait", "a", "wait"] * 3 and len(timings["a"].seconds) == 2


def test_a_baseline_is_compiled_for_its_own_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not for any number of rows, because the one before had another one."""
    symbols: list[bool] = []

    def backend(graph: torch.fx.GraphModule, given: list[Any]) -> Callable[..., Any]:
        symbols.append(any(isinstance(each, torch.SymInt) for each in given))
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend=backend))
    for width, rows_ in ((4, 1), (8, 4)):
        throughput.compiled(torch.nn.Embedding(10, width))(torch.zeros(rows_, 6, dtype=torch.long))
    assert symbols == [False, False]


def test_as_many_layers_as_fit(setting: Setting) -> None:
    case = throughput.Case(architecture_named("llama3.1-8b", 8192), 8192, 1, 2)
    sizes = [throughput.fitting(case, setting, room, None) for room in (1.0, 68.0, 119.0, 1000.0)]
    assert sizes[0] == 0 < sizes[1] < sizes[2] < sizes[3] == 32
    fits, more = (
        throughput.planned_gib(throughput.with_layers(case, n), setting, "bf16", None) for n in (sizes[1], sizes[1] + 1)
    )
    assert fits <= 68.0 < more


@pytest.mark.parametrize("precision", RECIPES)
def test_the_full_sizes_go_with_every_recipe(setting: Setting, precision: str) -> None:
    """What only a GPU runs can at least be asked for."""
    full = replace(setting, small=False)
    material = replace(training.toy(setting), model=training.MODEL)
    config = training.configuration(full, material, precision)
    assert config.model.precision == precision and config.mstep.steps == 200
    shapes = [kernels.WIDTHS, fp8.MODEL, checkpoints.architecture("bf16")]
    shapes += [case.made.model for case in throughput.cases_of(small=False).values()]
    for shape in shapes:
        assert list(key_problems(with_precision(shape, precision), setting.parallel)) == []


def test_the_products_that_are_measured_are_those_of_the_model() -> None:
    shape = ModelConfig(
        num_layers=1, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, context_length=32
    )
    found = rates.shapes_of(Architecture("x", shape, 200), tokens=10)
    assert found["qkv"] == (10, 64, 128) and found["fc1"] == (10, 64, 192) and found["fc2"] == (10, 96, 64)
    assert found["attention's output"] == (10, 64, 64) and found["output layer"] == (10, 64, 256)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_TNN", "matrix products"),
        ("sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128_warpgroupsize1x1x1_execute", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>(Params)", "matrix products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, cutlass::bfloat16_t>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3_64x128x128", "attention"),
        ("void transformer_engine::multi_tensor_adam::AdamFunctorMaster<float>", "optimizer"),
        ("void multi_tensor_apply_kernel<TensorListMetadata<1>, L2NormFunctor<float>>", "optimizer"),
        ("void transformer_engine::detail::cast_transpose_general_kernel<8, 8>", "casts and scales of FP8"),
        ("block_scaled_1d_cast_transpose_kernel", "casts and scales of FP8"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::SiluFunctor>", "elementwise and rest"),
        ("transformer_engine::normalization::rmsnorm_fwd_tuned_kernel", "elementwise and rest"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
    ],
)
def test_kernels_are_grouped_by_their_names(name: str, group: str) -> None:
    assert profiles.group_of(name) == group


def test_idle_is_what_no_kernel_covers() -> None:
    assert profiles.covered([(0, 2), (1, 3), (5, 6)]) == 4
    kernels_ = [("nvjet_a", 0.0, 2.0), ("flash_fwd", 1.0, 3.0), ("elementwise", 5.0, 6.0)]
    groups, longest = profiles.by_group(kernels_, total=10.0, busy=4.0)
    assert groups == {"matrix products": 0.2, "attention": 0.2, "elementwise and rest": 0.1, "idle": 0.6}
    assert list(longest) == ["nvjet_a", "flash_fwd", "elementwise"]
