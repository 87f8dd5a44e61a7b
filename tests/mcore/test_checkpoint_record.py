"""The record of a checkpoint: what is in it, and which folders, records and files are refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.mcore import checkpoint
from ra3_megatron.mcore.checkpoint_record import RECORD, read_record
from ra3_megatron.mcore.startup import Runtime
from tests.mcore.small_models import build, make_trainer, weights
from tests.mcore.test_distributed_checkpoint import SINGLE, assert_identical, train


def test_the_record_says_what_is_in_it(runtime: Runtime, tmp_path: Path) -> None:
    trainer = make_trainer(SINGLE, runtime)
    train(trainer, runtime, 0, 1)
    checkpoint.save(tmp_path / "saved", trainer.model, runtime, {"position": {"epoch": 1}}, trainer)
    record = json.loads((tmp_path / "saved" / RECORD).read_text())
    sizes = dict.fromkeys(("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor", "data"), 1)
    assert record["layout"] == {**sizes, "distributed_optimizer": False} and record["position"] == {"epoch": 1}
    assert record["architecture"]["model.hidden_size"] == 32
    assert record["optimizer"] == "replicated" and record["precision"] == "fp32"
    files = {path.name: path for path in (tmp_path / "saved").iterdir() if path.name != RECORD}
    assert record["files"].keys() == files.keys() == {"__0_0.distcp", ".metadata", "common.pt", "metadata.json"}
    for name, path in files.items():
        content = path.read_bytes()
        facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert record["files"][name] == facts


def test_folders_that_are_no_complete_checkpoint_are_refused(runtime: Runtime, tmp_path: Path) -> None:
    model = build(SINGLE, runtime)
    checkpoint.save(tmp_path / "good", model, runtime, {})
    partial = (tmp_path / "good").rename(tmp_path / "half.partial")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="missing: no such folder"):
        read_record(tmp_path / "missing")
    for folder in (partial, empty):
        with pytest.raises(UserError, match=rf"{folder.name}: is no complete checkpoint"):
            checkpoint.load(folder, model, runtime)
    (empty / RECORD).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(empty, model, runtime)
    whole = json.loads((partial / RECORD).read_text())
    damages = {
        "names no layout": {key: value for key, value in whole.items() if key != "layout"},
        "its content: ": 3,
        "architecture: ": whole | {"architecture": []},
        r"files\.common\.pt\.bytes: ": whole | {"files": {"common.pt": {"bytes": "9", "sha256": ""}}},
        "step: ": whole | {"step": 2.5},
    }
    for said, content in damages.items():
        (empty / RECORD).write_text(json.dumps(content))
        with pytest.raises(UserError, match=rf"empty/checkpoint\.json: {said}.*: not a checkpoint of this version"):
            checkpoint.load(empty, model, runtime)


def test_files_that_are_not_whole_are_refused(runtime: Runtime, tmp_path: Path) -> None:
    """A missing or truncated file always, one of the right size when checksums are asked for."""
    source, model = build(SINGLE, runtime, seed=5), build(SINGLE, runtime, seed=6)
    good = tmp_path / "good"
    checkpoint.save(good, source, runtime, {})
    (data,) = good.glob("*.distcp")
    before, content = weights(model, runtime), data.read_bytes()

    def refusal(verify: bool = False) -> str:
        with pytest.raises(UserError) as caught:
            checkpoint.load(good, model, runtime, verify=verify)
        assert "\n" not in str(caught.value)
        assert_identical(weights(model, runtime), before)
        return str(caught.value)

    data.write_bytes(content[:1000])
    assert f"{data}: is truncated: 1000 bytes instead of {len(content)}" in refusal()
    data.unlink()
    assert f"{data}: is missing" in refusal()
    (good / "common.pt").rename(good / "elsewhere")
    assert "__0_0.distcp: is missing (1 more files are not whole either)" in refusal()
    (good / "elsewhere").rename(good / "common.pt")
    data.write_bytes(bytes([*content[:-2000], content[-2000] ^ 1, *content[-1999:]]))
    assert f"{data}: is damaged: its checksum" in refusal(verify=True)
    data.write_bytes(content)
    checkpoint.load(good, model, runtime, verify=True)
    assert_identical(weights(model, runtime), weights(source, runtime))
