"""`ra3 doctor` says what is here and what is missing, and exits with 1 for a configuration that cannot run here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ra3_megatron.cli import app
from ra3_megatron.config.precision import RECIPES, Hardware
from ra3_megatron.config.run import RunConfig
from ra3_megatron.verbs import doctor

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "examples" / "quickstart.yaml")
GPU = torch.cuda.is_available()


def ra3(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "60"}).invoke(app, ["doctor", *arguments])


def test_what_is_here_and_what_is_missing() -> None:
    result = ra3("--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    parts = {part["name"]: part for part in found["parts"]}
    assert parts["torch"]["found"] == importlib.metadata.version("torch")
    assert (parts["vLLM"]["found"] is not None) == (importlib.util.find_spec("vllm") is not None)
    assert parts["Slurm"]["found"] == shutil.which("sbatch")
    for part in parts.values():
        assert part["purpose"] and part["without"] and part["install"]
    assert list(found["precisions"]) == ["fp32", "bf16", *RECIPES]
    assert found["precisions"]["bf16"] == "" and found["problems"] == []
    if not GPU:
        assert parts["Transformer Engine"]["found"] is None and "no NVIDIA GPU" in found["device"]
        assert all("needs an NVIDIA GPU" in found["precisions"][name] for name in RECIPES)


def test_the_words_for_people() -> None:
    result = ra3(QUICKSTART)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("computes on  ") and lines[1].startswith("precisions   fp32, bf16")
    assert any(line.split()[:2] == ["found", "megatron-core"] and line.endswith("train step") for line in lines)
    assert lines[-1].startswith("can run")
    missing = [number for number, line in enumerate(lines) if line.startswith("missing")]
    assert missing
    for number in missing:
        assert lines[number + 1].startswith("  without it   ") and lines[number + 2].startswith("  to get it    ")


@pytest.mark.skipif(GPU, reason="needs a machine without a GPU")
def test_a_configuration_that_cannot_run_here() -> None:
    result = ra3(QUICKSTART, "model.precision=fp8_blockwise", "rollout.engine=vllm")
    assert result.exit_code == 1
    lines = [line for line in result.stdout.splitlines() if line.startswith("cannot run")]
    assert lines[0] == (
        "cannot run   model.precision=fp8_blockwise: needs an NVIDIA GPU, and this process runs on the CPU: use "
        "model.precision=bf16"
    )
    assert "can run   " not in result.stdout.replace("cannot run", "")


def test_a_mistake_in_the_configuration_is_one() -> None:
    result = ra3(QUICKSTART, "model.precision=fp9")
    assert result.exit_code == 2 and result.stdout == ""
    assert "model.precision" in result.stderr


def test_each_missing_thing_is_a_problem_of_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without vLLM, and a GPU that is too small."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else real(name, *a))
    h100 = Hardware("H100", (9, 0), (13, 0), (2, 11))
    config = RunConfig.model_validate({"rollout": {"engine": "vllm"}, "model": {"precision": "fp8_tensorwise"}})
    assert list(doctor._problems(config, h100)) == ["rollout.engine=vllm: vLLM is not installed"]
    assert not list(doctor._problems(RunConfig(), h100))
    large = {"vocab_size": 128_256, "hidden_size": 8192, "num_layers": 80, "ffn_hidden_size": 28672}
    config = RunConfig.model_validate(
        {"model": {**large, "precision": "bf16", "num_attention_heads": 64}, "tokenizer": {"kind": "hf", "path": "x"}}
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("", (), {"total_memory": 80 * 2**30}))
    (line,) = doctor._problems(config, h100)
    assert line.startswith("the planner expects ") and "H100 has 80" in line
