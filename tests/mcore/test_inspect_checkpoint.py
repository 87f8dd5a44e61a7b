"""`ra3 inspect` and tools/inspect_checkpoint.py: what is in a checkpoint, and which part of it is damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ra3_megatron.cli import app
from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.mcore import checkpoint, checkpoint_record
from ra3_megatron.mcore.startup import Runtime
from tests.mcore.small_models import make_trainer
from tests.mcore.test_distributed_checkpoint import BF16, train

ROOT = Path(__file__).parents[2]
PARALLEL = ParallelConfig(distributed_optimizer=True, threads=1)
QKV = "decoder.layers.self_attention.linear_qkv.weight"
RECORD = {
    "phase": "estep",
    "iteration": 2,
    "step": 40,
    "weight_version": 41,
    "tokens": 1234567,
    "seconds": 3725.0,
    "tokenizer": "0123abcd",
    "data": {"epoch": 3, "position": 17},
}


@pytest.fixture(scope="module")
def saved(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    trainer = make_trainer(PARALLEL, runtime, model=BF16)
    train(trainer, runtime, 0, 1)
    folder = run / "checkpoints" / "estep-2" / "step_000040"
    checkpoint.save(folder, trainer.model, runtime, RECORD, trainer)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def inspect(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    assert result.exit_code == code, result.output
    if code == 2:
        assert result.stdout == "" and result.stderr.count("\n") == 1
    return result.stderr if code == 2 else result.stdout


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_everything_is_printed(saved: Path) -> None:
    text = inspect(saved)
    found = rows(text)
    assert ["checkpoint", str(saved)] in found
    for row in (
        ["hidden_size", "32"],
        ["vocabulary", "150"],
        ["precision", "bf16"],
        ["parameters", "35k", "(34,976)"],
        ["tensor", "1"],
        ["expert_tensor", "1"],
        ["distributed_optimizer", "yes"],
        ["optimizer", "state", "distributed"],
        ["phase", "estep"],
        ["EM", "iteration", "2"],
        ["step", "40"],
        ["weight", "version", "41"],
        ["tokens", "1,234,567"],
        ["training", "time", "1", "h", "02", "min"],
        ["written", "by", "ra3", checkpoint.__version__],
        ["tokenizer", "0123abcd"],
        ["data", "position", '{"epoch":', "3,", '"position":', "17}"],
        [QKV, "2", "x", "96", "x", "32", "bfloat16", "2", "0.012"],
        [f"optimizer.state.fp32_param.{QKV}", "2", "x", "96", "x", "32", "float32", "2", "0.025"],
        ["weights", "9", "tensors,", "0.070", "MB"],
        ["optimizer", "27", "tensors,", "0.420", "MB"],
    ):
        assert row in found, row
    assert "whole" not in text, "nothing was verified"
    assert QKV not in inspect(saved, "--no-tensors") and "weights" in inspect(saved, "--no-tensors")


def test_json(saved: Path) -> None:
    content = json.loads(inspect(saved, "--json"))
    assert content["layout"]["distributed_optimizer"] is True and content["problems"] is None
    assert {key: content[key] for key in RECORD} == RECORD
    (tensor,) = [tensor for tensor in content["tensors"] if tensor["name"] == QKV]
    assert tensor == {"name": QKV, "shape": [2, 96, 32], "dtype": "bfloat16", "shards": 2, "bytes": 2 * 96 * 32 * 2}
    sizes = sum(path.stat().st_size for path in saved.iterdir() if path.name != checkpoint_record.RECORD)
    assert content["bytes"] == sizes and content["parameters"] == 34976
    assert json.loads(inspect(saved, "--json", "--verify", "--no-tensors"))["problems"] == []


def test_the_tool_does_the_same_without_a_process_group(saved: Path) -> None:
    tool = [sys.executable, ROOT / "tools" / "inspect_checkpoint.py", saved, "--verify"]
    result = subprocess.run(tool, capture_output=True, text=True, cwd=saved, check=True)
    assert result.stdout == inspect(saved, "--verify")
    assert "whole: every file has its checksum, every number is finite" in result.stdout
    assert result.stderr == ""


def test_damage_is_found_by_name(folder: Path) -> None:
    data, index, common = folder / "__0_0.distcp", folder / ".metadata", folder / "common.pt"
    content = data.read_bytes()

    def problems() -> str:
        text = inspect(folder, "--verify", code=1)
        machine = json.loads(inspect(folder, "--verify", "--json", code=1))["problems"]
        lines = [line.removeprefix("! ") for line in text.splitlines() if line.startswith("! ")]
        assert len(lines) == len(machine) and "whole:" not in text
        return "\n".join(lines)

    data.write_bytes(content[:5000])
    assert problems().startswith(f"{data}: is truncated: 5000 bytes instead of {len(content)} (it holds shards of")
    data.write_bytes(content[:30_000] + bytes([content[30_000] ^ 4]) + content[30_001:])
    assert f"{data}: is damaged: its checksum is not" in problems()
    assert "decoder.final_layernorm.weight" in problems() and "more)" in problems()
    inspect(folder)  # whoever does not ask does not wait
    data.write_bytes(content[:5000])
    assert f"! {data}: is truncated: 5000 bytes instead of {len(content)} (" in inspect(folder, code=1), "seen at sight"
    data.unlink()
    common.write_bytes(b"")
    assert f"{data}: is missing" in problems() and f"{common}: is truncated: 0 bytes" in problems()
    data.write_bytes(content)
    index.write_bytes(b"nothing")
    assert f"{index}: is truncated" in problems()
    assert f"{index}: is missing or damaged: see what else is with --verify" in inspect(folder, code=2)


def test_numbers_that_are_not_finite_are_found_by_name(runtime: Runtime, tmp_path: Path) -> None:
    trainer = make_trainer(PARALLEL, runtime, model=BF16)
    train(trainer, runtime, 0, 1)
    named = {name.split("module.")[-1]: p for name, p in trainer.model.named_parameters()}
    with torch.no_grad():
        named["decoder.layers.1.self_attention.linear_qkv.weight"][3, 4] = torch.nan
        named["output_layer.weight"][5, 6] = -torch.inf
    checkpoint.save(tmp_path / "bad", trainer.model, runtime, {}, trainer)
    lines = inspect(tmp_path / "bad", "--verify", code=1).splitlines()
    assert [line for line in lines if line.startswith("!")] == [
        f"! {QKV}: holds NaN",
        "! output_layer.weight: holds infinite numbers",
    ]


def test_other_folders(saved: Path, tmp_path: Path) -> None:
    """A run folder names its checkpoints; anything else is refused in one line."""
    run = saved.parents[2]
    other = saved.with_name("step_000080.0123.partial")
    shutil.copytree(saved, other)
    for folder in (run, run / "checkpoints", saved.parent):
        message = inspect(folder, code=2)
        assert f"{folder}: is no checkpoint itself; those below it, oldest first: {saved}\n" in message
    assert "is no complete checkpoint" in inspect(other, code=2)
    assert "no such folder" in inspect(tmp_path / "missing", code=2)
    assert "is no complete checkpoint (no checkpoint.json)" in inspect(tmp_path, code=2)
    foreign: dict[str, Any] = {"version": 1}
    (tmp_path / checkpoint_record.RECORD).write_text(json.dumps(foreign))
    assert "names no architecture" in inspect(tmp_path, code=2)
