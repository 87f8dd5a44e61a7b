"""From a Hugging Face folder through a whole run to Hugging Face folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_run import Ra3, metrics, weights
from transformers import AutoTokenizer, LlamaForCausalLM

LENGTH = 160


@pytest.fixture(scope="module")
def folder(ra3: Ra3, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: the model of a run from scratch."""
    out = tmp_path_factory.mktemp("hf") / "model"
    ra3("convert", "megatron-to-hf", "--checkpoint", finished / "checkpoints" / "mstep-2" / "final", "--out", out)
    return out


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """A run's configuration that says nothing of model, tokenizer or warm start."""
    file = tmp_path_factory.mktemp("config") / "hf.yaml"
    file.write_text(
        f"""
seed: 7
corpus: {{source: folder, path: {source}, valid_fraction: 0.3}}
text: {{max_latent_tokens: 5}}
em: {{iterations: 1}}
estep: {{steps: 1, documents_per_step: 2, group_size: 2, micro_batch_size: 1}}
mstep: {{steps: 1, global_batch_size: 2, micro_batch_size: 1}}
evaluation: {{documents: 4}}
parallel: {{threads: 1}}
"""
    )
    return file


@pytest.fixture(scope="module")
def run(ra3: Ra3, bare: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from the folder, on two pipeline stages, with export."""
    place = tmp_path_factory.mktemp("run") / "run"
    ra3("train", bare, f"model.hf={folder}", "export.hf=true", "parallel.pipeline=2", f"run_dir={place}")
    return place


def test_the_run_starts_from_the_folder(ra3: Ra3, run: Path, folder: Path) -> None:
    assert "all equal" in ra3("convert", "check", "--hf", folder, "--checkpoint", base_of(run)).output
    assert (run / "corpus" / "tokenizer" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert not [line for line in metrics(run) if line["phase"] == "warm_start"], "no step is taken before the E-step"


@pytest.mark.parametrize(("arm", "phase"), [("ra3", "mstep-1"), ("ntp", "ntp-1")])
def test_what_was_trained_is_exported(ra3: Ra3, run: Path, folder: Path, arm: str, phase: str) -> None:
    out, checkpoint = run / "hf" / arm, run / "checkpoints" / phase / "final"
    found = ra3("convert", "check", "--hf", out, "--checkpoint", checkpoint).output
    assert "all equal" in found and "within the tolerance" in found
    assert ra3("convert", "check", "--hf", folder, "--checkpoint", checkpoint, code=1).output.count("differ")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    model = LlamaForCausalLM.from_pretrained(out)
    ids = AutoTokenizer.from_pretrained(out)("def f(x):\n    return x\n", return_tensors="pt").input_ids
    with torch.no_grad():
        assert bool(torch.isfinite(model(ids).logits).all())


def test_a_resumed_run_needs_the_folders_weights_no_more(
    ra3: Ra3, bare: Path, folder: Path, run: Path, tmp_path: Path
) -> None:
    copy, place = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(folder, copy)
    arguments = ("train", bare, f"model.hf={copy}", "export.hf=true", f"run_dir={place}", "checkpoint.interval=1")
    killed = ra3(*arguments, code=None, kill=["ra3_megatron.em.steps:EStepSteps.step", "before", 1])
    assert killed.code == -9
    shutil.move(copy / "model.safetensors", tmp_path / "elsewhere")
    ra3(*arguments, "--resume")
    one, other = (weights(place_ / "checkpoints" / "mstep-1" / "final") for place_ in (place, run))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_a_converted_checkpoint_is_a_start_like_any_other(ra3: Ra3, config: Path, folder: Path, tmp_path: Path) -> None:
    converted, place = tmp_path / "converted", tmp_path / "run"
    ra3("convert", "hf-to-megatron", "--hf", folder, "--out", converted)
    settings = (f"warm_start.checkpoint={converted}", "warm_start.steps=0", "tokenizer.kind=hf")
    small = ("method=ntp", "em.iterations=1", "mstep.steps=1", "evaluation.documents=2", "export.hf=true")
    ra3("train", config, *settings, f"tokenizer.path={folder}", *small, f"run_dir={place}")
    assert "all equal" in ra3("convert", "check", "--hf", folder, "--checkpoint", base_of(place)).output
    assert (place / "hf" / "ntp" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def base_of(run: Path) -> Path:
    return run / "checkpoints" / "warm_start" / "final"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("model.hidden_size=64",), "model.hidden_size=64: model.hf={folder} has 32: leave model.hidden_size out"),
        (("model.context_length=161",), "model.context_length=161: model.hf={folder} reads at most 160 tokens"),
        (
            ("model.rope_scaling.kind=linear", "model.rope_scaling.factor=2"),
            "model.rope_scaling={{factor: 2, kind: linear}}",
        ),
        (("warm_start.checkpoint=x",), "warm_start.checkpoint=x does not go with model.hf={folder}"),
        (
            ("tokenizer.vocab_size=400",),
            "tokenizer.kind=sentencepiece: model.hf={folder} has its tokenizer: leave the section tokenizer out",
        ),
        (("model.hf=nowhere",), "model.hf=nowhere: nowhere: no such folder"),
    ],
)
def test_what_does_not_go_with_the_folder_is_refused(
    ra3: Ra3, bare: Path, folder: Path, tmp_path: Path, settings: tuple[str, ...], said: str
) -> None:
    line = ra3.refuses("train", bare, f"model.hf={folder}", *settings, f"run_dir={tmp_path / 'run'}")
    assert line.startswith(said.format(folder=folder))
    assert not (tmp_path / "run").exists()


def test_a_damaged_folder_leaves_no_checkpoint(ra3: Ra3, bare: Path, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[:-100])
    line = ra3.refuses("train", bare, f"model.hf={copy}", f"run_dir={tmp_path / 'run'}")
    assert "model.safetensors" in line
    assert not list((tmp_path / "run").rglob("checkpoint.json"))
