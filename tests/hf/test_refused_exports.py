"""Checkpoints that cannot be exported: one line each, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import command, load, make

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.hf.distcp import ShardReader
from ra3_megatron.hf.exporting import export_hf
from ra3_megatron.hf.importing import import_hf, model_of
from ra3_megatron.hf.weights import Link
from ra3_megatron.mcore import checkpoint
from ra3_megatron.mcore.checkpoint_contents import read_contents
from ra3_megatron.mcore.startup import Runtime

# isort: split
from torch.distributed.checkpoint.filesystem import FileSystemReader

SINGLE = ParallelConfig(threads=1)


def test_refused_exports(hf: Path, tmp_path: Path) -> None:
    import_hf(hf, tmp_path / "good")
    out = tmp_path / "out"

    def refusal(*options: object) -> str:
        error = command("megatron-to-hf", "--checkpoint", tmp_path / "bad", "--out", out, *options, code=2)
        assert not out.exists() and not (tmp_path / "out.partial").exists()
        return error

    def bad() -> Path:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        return Path(shutil.copytree(tmp_path / "good", tmp_path / "bad"))

    assert "no such folder" in refusal()
    (file,) = bad().glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-5000])
    assert f"{file}: is truncated" in refusal()
    (file,) = bad().glob("*.distcp")
    index = FileSystemReader(tmp_path / "bad").read_metadata()
    place = next(info for key, info in index.storage_data.items() if "linear_qkv.weight" in key.fqn)
    content = bytearray(file.read_bytes())
    content[place.offset + place.length // 2] ^= 64
    file.write_bytes(content)
    assert f"{file}: is damaged: a shard of decoder.layers.self_attention.linear_qkv.weight" in refusal()
    (bad() / ".metadata").unlink()
    assert ".metadata: is missing" in refusal()
    (bad() / "checkpoint.json").unlink()
    assert "is no complete checkpoint" in refusal()
    shutil.rmtree(bad() / "hf")
    assert "neither it nor a run around it holds a config.json: name a folder that has one, with --hf" in refusal()
    assert "hf/chat_template.jinja: is missing" in refusal("--hf", hf)  # the record names it
    record = json.loads((tmp_path / "bad" / "checkpoint.json").read_text())
    record["files"] = {name: facts for name, facts in record["files"].items() if not name.startswith("hf/")}
    (tmp_path / "bad" / "checkpoint.json").write_text(json.dumps(record))
    other = make("qwen3-moe", tmp_path / "other", num_hidden_layers=1)
    assert "holds a model with model.num_layers=2, but this model has model.num_layers=1" in refusal("--hf", other)
    shutil.copytree(hf, other, dirs_exist_ok=True)
    (other / "tokenizer_config.json").write_text('{"eos_token": "<|other|>"}')
    assert f"was trained with another tokenizer than the one in {other}" in refusal("--hf", other)
    assert "--max-shard-size=many" in refusal("--max-shard-size", "many")
    command("megatron-to-hf", "--checkpoint", tmp_path / "bad", "--out", out, "--hf", hf)


def test_tensors_that_are_not_those_of_the_model(hf: Path, tmp_path: Path) -> None:
    """A shard that the index lacks, a tensor that is not there, and one that nobody asks for."""
    import_hf(hf, tmp_path / "checkpoint")
    family, model, vocab_size = model_of(hf)
    links = family.links(model, vocab_size)
    norm, fc1 = "decoder.final_layernorm.weight", "decoder.layers.mlp.experts.experts.linear_fc1.weight"

    def refusal(change: Callable[[dict[str, Any]], object], links: list[Link]) -> str:
        found = read_contents(tmp_path / "checkpoint")
        assert found.index is not None
        change(found.index.state_dict_metadata)
        with pytest.raises(UserError) as caught:
            ShardReader(found, links)
        return str(caught.value)

    assert f"holds no whole {fc1} at [1, 3] of shape [96, 64]" in refusal(lambda e: e[fc1].chunks.pop(), links)
    assert f"holds no whole {norm} of shape [64]" in refusal(lambda e: e[norm].chunks.clear(), links)
    assert "holds output_layer.weight, which this family's map does not know" in refusal(lambda e: None, links[:-1])


def test_numbers_that_are_not_finite_are_not_exported(hf: Path, tmp_path: Path, runtime: Runtime) -> None:
    import_hf(hf, tmp_path / "good")
    network = load(tmp_path / "good", hf, SINGLE, runtime)
    with torch.no_grad():
        dict(network.named_parameters())["0.decoder.final_layernorm.weight"][3] = torch.inf
    checkpoint.save(tmp_path / "bad", network, runtime, {})
    with pytest.raises(UserError, match=r"bad: model.norm.weight holds NaN or infinite numbers"):
        export_hf(tmp_path / "bad", tmp_path / "out", template=hf)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
