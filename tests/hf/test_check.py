"""The comparison of a folder and a checkpoint, and the scripts in tools/."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import command, load, make
from safetensors.torch import save_file
from typer.testing import CliRunner

from ra3_megatron.cli import app
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.hf.importing import import_hf, model_of
from ra3_megatron.hf.weights import manifest
from ra3_megatron.mcore import checkpoint
from ra3_megatron.mcore.startup import Runtime
from tests.processes import python_path

# isort: split

ROOT = Path(__file__).parents[2]
SINGLE = ParallelConfig(threads=1)


def script(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, str(ROOT / "tools" / name), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": python_path(ROOT)}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.multiprocess
def test_the_scripts(hf: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "checkpoint", tmp_path / "back"
    result = script("convert_hf_to_megatron.py", "--hf", hf, "--out", there, "--dtype", "bf16")
    assert result.returncode == 0 and result.stdout == f"{there}\n", result.stderr
    assert "B/s" in result.stderr
    result = script("convert_megatron_to_hf.py", "--checkpoint", there, "--out", back, "--max-shard-size", "100KB")
    assert result.returncode == 0 and len(list(back.glob("*.safetensors"))) > 3, result.stderr
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    result = script("check_conversion.py", "--hf", hf, "--checkpoint", there)
    assert result.returncode == 0, result.stderr
    assert "tensors: all equal (45 tensors compared in bf16)" in result.stdout
    assert "logits: largest difference" in result.stdout and "within the tolerance" in result.stdout
    inspected = CliRunner().invoke(app, ["inspect", str(there), "--verify"])
    assert inspected.exit_code == 0 and "converted" in inspected.stdout and "whole: every file" in inspected.stdout


@pytest.mark.multiprocess
def test_the_check_finds_differences(hf: Path, tmp_path: Path, runtime: Runtime) -> None:
    """A weight that differs, and a rotary scaling that is lost although all tensors are equal."""
    import_hf(hf, tmp_path / "good")
    network = load(tmp_path / "good", hf, SINGLE, runtime)
    with torch.no_grad():
        dict(network.named_parameters())["0.decoder.layers.1.self_attention.linear_proj.weight"][5, 7] += 0.25
    checkpoint.save(tmp_path / "bad", network, runtime, {})
    result = script("check_conversion.py", "--hf", hf, "--checkpoint", tmp_path / "bad")
    assert result.returncode == 1, result.stderr
    assert "tensors: 1 differ" in result.stdout
    assert "model.layers.1.self_attn.o_proj.weight: largest difference 0.25" in result.stdout
    assert "above the tolerance" in result.stdout
    assert command("check", "--hf", hf, "--checkpoint", tmp_path / "bad", "--tensors-only", code=1).endswith(
        "logits: not compared (--tensors-only)\n"
    )
    other = make("llama", tmp_path / "other")
    error = command("check", "--hf", other, "--checkpoint", tmp_path / "good", code=2)
    assert "does not fit" in error


def test_a_folder_that_transformers_does_not_load_is_the_users_to_mend(tmp_path: Path, runtime: Runtime) -> None:
    """Exit code 1 would mean that the logits differ. transformers 5 refuses 3 heads in 64 channels."""
    from ra3_megatron.hf.checking import Check

    sizes = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10, "num_hidden_layers": 1}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-6, **sizes}
    config |= {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 32, "max_position_embeddings": 128}
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    family, model, vocab_size = model_of(folder)
    tensors = {name: torch.rand(shape) for name, shape in manifest(family.links(model, vocab_size)).items()}
    save_file(tensors, folder / "model.safetensors")
    import_hf(folder, tmp_path / "checkpoint")
    check = Check(folder, tmp_path / "checkpoint")
    assert not check.tensors().different
    with pytest.raises(UserError, match=r"hf: transformers [0-9.]+ cannot load it \(.*not a multiple"):
        check.logits(runtime)


def test_the_check_sees_positions(tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """With frequencies that lack the scaling, far positions differ."""
    from ra3_megatron.hf.checking import Check
    from ra3_megatron.mcore import model
    from ra3_megatron.mcore.rotary import inverse_frequencies

    torch.manual_seed(7)  # the weights that transformers draws: with others a near position may differ as much
    make("llama", tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    none = type(model.ModelConfig().rope_scaling)()
    plain = lambda config: inverse_frequencies(config.model_copy(update={"rope_scaling": none}))  # noqa: E731
    monkeypatch.setattr(model, "inverse_frequencies", plain)
    result = Check(tmp_path / "hf", tmp_path / "checkpoint").logits(runtime)
    assert not result.passes and result.sequence % 2 == 1
