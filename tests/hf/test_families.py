"""Every family of hf_models.FAMILIES: Megatron-Core computes what Hugging Face does, and the way back is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import EXPERT_FAMILIES, FAMILIES, assert_close, contents, hf_logits, load, logits, make
from safetensors.torch import load_file
from torch import Tensor

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.config.training import OptimizerConfig
from ra3_megatron.hf.checking import Check
from ra3_megatron.hf.exporting import export_hf
from ra3_megatron.hf.importing import import_hf
from ra3_megatron.mcore import checkpoint
from ra3_megatron.mcore.checkpoint_record import read_record
from ra3_megatron.mcore.startup import Runtime, initialize
from ra3_megatron.mcore.trainer import Trainer
from tests.processes import run_processes

SINGLE = ParallelConfig(threads=1)
TP2 = ParallelConfig(tensor=2, threads=1)
PP2 = ParallelConfig(pipeline=2, threads=1)
EP2 = ParallelConfig(data=2, expert=2, threads=1)
TP2_PP2 = ParallelConfig(tensor=2, pipeline=2, distributed_optimizer=True, threads=1)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each family a folder with `hf` and `checkpoint`, in fp32."""
    root = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        make(name, root / name / "hf")
        assert import_hf(root / name / "hf", root / name / "checkpoint")
    return root


@pytest.fixture(scope="module")
def expected(converted: Path) -> dict[str, Tensor]:
    return {name: hf_logits(converted / name / "hf") for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_in_one_process(name: str, converted: Path, expected: dict[str, Tensor], runtime: Runtime) -> None:
    network = load(converted / name / "checkpoint", converted / name / "hf", SINGLE, runtime)
    found = logits(network, runtime)
    assert found is not None
    assert_close(found, expected[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16(name: str, tmp_path: Path, runtime: Runtime) -> None:
    """bf16 weights, computed with in fp32, and in bf16; the way back is exact, and so is an export as fp32."""
    hf = make(name, tmp_path / "hf", torch.bfloat16)
    import_hf(hf, tmp_path / "checkpoint")
    record = read_record(tmp_path / "checkpoint")
    assert record["precision"] == "bf16"
    theirs = hf_logits(hf)
    found = logits(load(tmp_path / "checkpoint", hf, SINGLE, runtime), runtime)
    assert found is not None
    assert_close(found, theirs)
    if name not in EXPERT_FAMILIES:  # there, bf16 sends some tokens to other experts
        half = logits(load(tmp_path / "checkpoint", hf, SINGLE, runtime, "bf16"), runtime)
        assert half is not None
        assert float((half - theirs).abs().max()) < 0.05 * float(theirs.abs().max())
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", hf)
    export_hf(tmp_path / "checkpoint", tmp_path / "wide", dtype="fp32")
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    original = load_file(hf / "model.safetensors")
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
    assert all(torch.equal(wide[key], original[key].float()) for key in original)


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(name: str, converted: Path, tmp_path: Path) -> None:
    """Tensors, `config.json` and the files beside it come back byte for byte."""
    hf = converted / name / "hf"
    export_hf(converted / name / "checkpoint", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", hf)
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (hf / file).read_bytes()
    assert len(list((tmp_path / "back").iterdir())) == len(list(hf.iterdir())) + 1  # conversion.json


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3-moe"])
def test_the_check_passes(name: str, converted: Path, runtime: Runtime) -> None:
    comparison = Check(converted / name / "hf", converted / name / "checkpoint")
    assert comparison.tensors().different == []
    result = comparison.logits(runtime)
    assert result.passes and result.longest == 512 and result.tokens == 64


def in_two_processes(root: Path) -> dict[str, Tensor | None]:
    """Logits of every family, as the last rank has them."""
    found = {}
    for label, parallel, names in (
        ("tp2", TP2, list(FAMILIES)),
        ("pp2", PP2, list(FAMILIES)),
        ("ep2", EP2, EXPERT_FAMILIES),
    ):
        runtime = initialize(parallel, seed=1)
        for name in names:
            network = load(root / name / "checkpoint", root / name / "hf", parallel, runtime)
            found[f"{label} {name}"] = logits(network, runtime)
    return found


@pytest.mark.multiprocess
def test_logits_at_tp2_pp2_and_ep2(converted: Path, expected: dict[str, Tensor]) -> None:
    found = run_processes(2, in_two_processes, converted)[1]
    assert len(found) == 2 * len(FAMILIES) + len(EXPERT_FAMILIES)
    for key, value in found.items():
        assert_close(value, expected[key.split()[1]])


def in_four_processes(root: Path) -> dict[str, Any]:
    """Logits of every family; and each is saved as training saves, with optimizer state."""
    found = {}
    runtime = initialize(TP2_PP2, seed=1)
    for name in FAMILIES:
        precision = "bf16" if name == "qwen2" else "fp32"
        network = load(root / name / "checkpoint", root / name / "hf", TP2_PP2, runtime, precision)
        if precision == "fp32":
            found[name] = logits(network, runtime)
        trainer = Trainer(network, OptimizerConfig(), TP2_PP2, runtime, steps=2)
        record = {"phase": "estep", "step": 3}
        checkpoint.save(root / name / "trained", trainer.model, runtime, record, trainer)
    return found


@pytest.mark.multiprocess
def test_tp2_pp2_and_export_of_what_it_saves(converted: Path, expected: dict[str, Tensor], tmp_path: Path) -> None:
    """A checkpoint of four processes, in shards and with optimizer state, exports as one of a single process."""
    found = run_processes(4, in_four_processes, converted)[3]
    for name in FAMILIES:
        if name in found:
            assert_close(found[name], expected[name])
        out = tmp_path / name
        hf = converted / name / "hf"
        export_hf(converted / name / "trained", out, template=hf, max_shard_bytes=60_000)
        exported = {key: tensor for file in out.glob("*.safetensors") for key, tensor in load_file(file).items()}
        original = load_file(hf / "model.safetensors")
        dtype = torch.bfloat16 if name == "qwen2" else torch.float32
        assert exported.keys() == original.keys()
        assert all(torch.equal(exported[key], original[key].to(dtype)) for key in original), name
    assert contents(tmp_path / "llama")["conversion.json"].count(b'"phase": "estep"') == 1


def assert_same_tensors(found: Path, expected: Path) -> None:
    first, second = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]), name
