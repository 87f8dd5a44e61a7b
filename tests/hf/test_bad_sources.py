"""Hugging Face folders that are damaged or do not fit: one clear line, exit code 2, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import make
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from ra3_megatron.cli import app

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
Q = "model.layers.1.self_attn.q_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("good")
    return {
        "single": make("llama", root / "single"),
        "shards": make("llama", root / "shards", max_shard_size="150KB"),
        "tied": make("llama-tied", root / "tied"),
    }


def convert(folder: Path, *arguments: object, code: int = 2) -> str:
    """Import `folder`; the one line of an error, or what was printed."""
    out = folder.parent / "out"
    words = ["convert", "hf-to-megatron", "--hf", folder, "--out", out, *arguments]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == code, result.output
    if code == 2:
        assert [path.name for path in folder.parent.iterdir()] == [folder.name], "something was left behind"
        lines = result.stderr.splitlines()
        errors = [line for line in lines if line.startswith("ra3: ")]
        assert len(errors) == 1 and lines[-1] == errors[0] and result.stdout == ""
        return errors[0]
    return result.stdout


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def change_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def change_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of the file, and leave the data as it is."""
    content = (folder / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    text = change(header)
    text = (text if isinstance(text, str) else json.dumps(header)).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def set_to(name: str, value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[17] = value

    return lambda folder: change_tensors(folder, change)


def write(file: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(text)


def twice(header: dict[str, Any]) -> str:
    return json.dumps(header)[:-1] + f', "{Q}": ' + json.dumps(header[Q]) + "}"


def only_pickles(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def both(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {}}')


def other_head(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()
    tensors[HEAD][299, 63] += 1


def in_two_files(folder: Path) -> None:
    first = load_file(folder / "model-00001-of-00004.safetensors")
    second = load_file(folder / "model-00002-of-00004.safetensors")
    name = next(iter(first))
    save_file({**second, name: first[name]}, folder / "model-00002-of-00004.safetensors")


def elsewhere(places: dict[str, str]) -> None:
    places[Q] = next(file for file in sorted(places.values()) if file != places[Q])


SINGLE_CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown": (
        lambda f: change_tensors(f, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(96, 64)})),
        "model.safetensors: holds model.layers.2.mlp.up_proj.weight, which this family's map does not know",
    ),
    "missing": (lambda f: change_tensors(f, lambda t: t.pop(Q)), f": lacks {Q}"),
    "many missing": (
        lambda f: change_tensors(f, lambda t: [t.pop(n) for n in list(t) if ".1." in n]),
        "self_attn.k_proj.weight and 6 more",
    ),
    "misshapen": (
        lambda f: change_tensors(f, lambda t: t.update({Q: torch.ones(64, 128)})),
        f"model.safetensors: {Q} has shape [64, 128], but [128, 64] follows from config.json",
    ),
    "NaN": (set_to(Q, float("nan")), f"model.safetensors: {Q} holds NaN or infinite numbers"),
    "infinite": (set_to("model.norm.weight", float("-inf")), "model.norm.weight holds NaN or infinite numbers"),
    "quantised": (
        lambda f: change_tensors(f, lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)})),
        f"{Q} is F8_E4M3: only F32, BF16, F16 are read",
    ),
    "truncated": (lambda f: cut(f / SINGLE, 100_000), "model.safetensors: is truncated: 100000 bytes instead of "),
    "truncated header": (lambda f: cut(f / SINGLE, 400), "model.safetensors: is truncated: its header has "),
    "empty": (lambda f: cut(f / SINGLE, 0), "model.safetensors: is damaged or no safetensors file"),
    "longer": (
        lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes() + b"more"),
        "model.safetensors: is damaged: ",
    ),
    "header is no JSON": (lambda f: change_header(f, lambda h: "{" + "x" * 50), "is damaged: its header is not JSON"),
    "twice": (lambda f: change_header(f, twice), f"model.safetensors: names {Q} twice"),
    "overlap": (
        lambda f: change_header(f, lambda h: h[Q].update(data_offsets=h["model.norm.weight"]["data_offsets"])),
        f"is damaged: {Q} has 256 bytes, which are not those of its shape",
    ),
    "gap": (
        lambda f: change_header(f, lambda h: h.pop("model.layers.0.mlp.up_proj.weight") and None),
        "does not begin where the tensor before it ends",
    ),
    "two at one place": (
        lambda f: change_header(f, lambda h: h[Q].update(data_offsets=h[Q.replace(".1.", ".0.")]["data_offsets"])),
        "does not begin where the tensor before it ends",
    ),
    "negative": (
        lambda f: change_header(f, lambda h: h[Q].update(shape=[-128, -64])),
        f"is damaged: its header does not say where {Q} is",
    ),
    "pickles": (only_pickles, ": holds pytorch_model.bin, which is not read: save its weights as safetensors"),
    "no weights": (lambda f: (f / SINGLE).unlink(), ": holds no weights (neither model.safetensors nor"),
    "both": (both, f": holds both model.safetensors and {INDEX}: remove the one"),
    "no config": (lambda f: (f / "config.json").unlink(), ": is no Hugging Face checkpoint (no config.json)"),
    "config is no JSON": (write("config.json", "{"), "config.json: cannot be read: "),
    "tokenizer": (write("tokenizer.json", "{}"), "tokenizer.json is not a tokenizer.json: it has no model"),
    "other sizes": (
        lambda f: change_config(f, num_attention_heads=3),
        "config.json: cannot be represented: model.num_query_groups=2 does not divide model.num_attention_heads=3",
    ),
}
SHARD_CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is gone": (
        lambda f: (f / "model-00002-of-00004.safetensors").unlink(),
        f"{INDEX}: names model-00002-of-00004.safetensors, which is not there",
    ),
    "a shard is truncated": (
        lambda f: cut(f / "model-00003-of-00004.safetensors", 5000),
        "model-00003-of-00004.safetensors: is truncated: 5000 bytes",
    ),
    "index names what is nowhere": (
        lambda f: change_index(f, lambda p: p.update(extra=p[Q])),
        f"{INDEX}: says that extra is in ",
    ),
    "index names another file": (lambda f: change_index(f, elsewhere), f"{INDEX}: says that {Q} is in "),
    "index leaves one out": (lambda f: change_index(f, lambda p: p.pop(Q)), f"holds {Q}, which {INDEX} does not name"),
    "in two files": (in_two_files, "model-00001-of-00004.safetensors holds too"),
    "file outside of the folder": (
        lambda f: change_index(f, lambda p: p.update({Q: "../other.safetensors"})),
        f'{INDEX}: {Q} must be in a file of this folder, not "../other.safetensors"',
    ),
    "index is no JSON": (write(INDEX, "]"), f"{INDEX}: cannot be read: it must hold an object weight_map"),
    "index without a map": (write(INDEX, '{"metadata": {}}'), f"{INDEX}: cannot be read: it must hold an object"),
    "index names one twice": (write(INDEX, '{"weight_map": {"a": "b", "a": "c"}}'), f"{INDEX}: names a twice"),
}
TIED_CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another output layer": (
        lambda f: change_tensors(f, other_head),
        f"{HEAD} differs from {EMBEDDING}, although config.json says tie_word_embeddings",
    ),
}


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kind", ["single", "shards", "tied"])
def test_the_undamaged_folders_are_converted(kind: str, good: dict[str, Path], tmp_path: Path) -> None:
    assert convert(Path(shutil.copytree(good[kind], tmp_path / kind)), code=0) == f"{tmp_path / 'out'}\n"


@pytest.mark.parametrize(
    ("kind", "name", "cases"),
    [
        (kind, name, cases)
        for kind, cases in (("single", SINGLE_CASES), ("shards", SHARD_CASES), ("tied", TIED_CASES))
        for name in cases
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(kind: str, name: str, cases: dict[str, Any], good: dict[str, Path], tmp_path: Path) -> None:
    damage, line = cases[name]
    folder = Path(shutil.copytree(good[kind], tmp_path / "hf"))
    damage(folder)
    error = convert(folder)
    assert line in error and str(folder) in error


def test_an_error_in_another_process(good: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ra3_megatron.hf import importing

    monkeypatch.setattr(importing, "UNIT_BYTES", 50_000)
    folder = Path(shutil.copytree(good["single"], tmp_path / "hf"))
    set_to(Q, float("nan"))(folder)
    assert f"{Q} holds NaN" in convert(folder, "--workers", 2)


def test_harmless_additions(good: dict[str, Path], tmp_path: Path) -> None:
    """The output layer of a tied model that is its embedding; buffers of old checkpoints."""
    folder = Path(shutil.copytree(good["tied"], tmp_path / "hf"))

    def add(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    change_tensors(folder, add)
    convert(folder, code=0)


def test_options(good: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good["single"], tmp_path / "hf"))
    assert "--dtype=fp16: must be fp32 or bf16" in convert(folder, "--dtype", "fp16")
    assert "--workers=0: must be at least 1" in convert(folder, "--workers", 0)
