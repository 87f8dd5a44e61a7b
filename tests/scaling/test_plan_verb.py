"""`ra3 plan` as a user calls it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ra3_megatron.cli import app
from ra3_megatron.config.load import load_config
from ra3_megatron.scaling.memory import Work
from ra3_megatron.scaling.search import problems_of, search
from ra3_megatron.scaling.tables import architecture_named, gpu_named


def ra3(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


def test_a_table_of_the_best_layouts_and_why_others_were_left_out(tmp_path: Path) -> None:
    out = tmp_path / "8b.yaml"
    result = ra3("--model", "llama3.1-8b", "--gpus", "16", "--top", "3", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "llama3.1-8b: 8.03B parameters" in result.output
    assert "layouts were left out: more than the 79.6 GiB of h100" in result.output
    assert "Predicted, not measured" in result.output and "MFU = 3 * forward FLOPs" in result.output
    config = load_config(out)
    assert config.parallel.world_size == 16 and config.model.num_layers == 32 and config.model.context_length == 8192
    assert config.mstep.global_batch_size == 128 and config.model.precision == "bf16"


def test_one_layout_as_json() -> None:
    layout = "tensor=8,pipeline=8,virtual_pipeline=8,context=2,micro_batch=1"
    result = ra3("--model", "llama3.1-405b", "--gpus", "512", "--global-batch", "256", "--layout", layout, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["layout"]["data"] == 4 and found["layout"]["count_embedding"] is True
    memory = found["memory_gib"]
    parts = {"weights", "gradients", "optimizer", "activations", "logits", "rollouts", "buffers", "scorer"}
    assert memory.keys() == parts | {"total"}
    assert memory["total"] == pytest.approx(sum(memory[part] for part in parts))
    assert found["step_seconds"] == pytest.approx(sum(found["parts"].values()))
    throughput = 256 * 8192 / found["step_seconds"] / 512
    assert found["tokens_per_second_per_gpu"] == pytest.approx(throughput)
    assert 0.4 < found["mfu"] < 0.6


def test_a_hugging_face_folder_and_a_gpu_of_the_users(tmp_path: Path) -> None:
    from ra3_megatron.hf.families import FAMILIES

    made = architecture_named("qwen2.5-1.5b")
    (family,) = (family for family in FAMILIES if family.name == "qwen2")
    folder = tmp_path / "qwen"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(family.config_json(made.model, made.vocab_size)))
    gpu = tmp_path / "mine.yaml"
    gpu.write_text("memory_gib: 48\nbf16_tflops: 362\nmemory_gb_s: 864\nnvlink_gb_s: 32\nnetwork_gb_s: 12.5\n")
    out = tmp_path / "plan.yaml"
    result = ra3("--model", str(folder), "--gpus", "8", "--gpu", str(gpu), "--sequence", "4096", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "1.54B parameters" in result.output and "GiB of 48" in result.output
    assert load_config(out).model.hf == str(folder)
    longest = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    result = ra3("--model", str(folder), "--gpus", "8", "--sequence", str(longest + 1))
    said = f"ra3: --sequence={longest + 1}: --model {folder} reads at most {longest} tokens\n"
    assert (result.exit_code, result.stderr) == (2, said)
    for place in (tmp_path, out / "below"):
        result = ra3("--model", str(folder), "--gpus", "8", "--sequence", "4096", "--out", str(place))
        assert result.exit_code == 2 and result.stderr.startswith(f"ra3: --out={place}: cannot be written (")


def test_published_measurements_beside_predictions() -> None:
    result = ra3("--calibration")
    assert result.exit_code == 0 and result.output.count("fitted") == 3
    assert "llama3.1-405b" in result.output and "NVIDIA Megatron-Bridge" in result.output


WRONG = {
    "--model llama3.1-8b": "plan needs --model and --gpus",
    "--model lama3.1-8b --gpus 8": "--model lama3.1-8b: neither a folder with config.json nor one of",
    "--model llama3.1-8b --gpus 8 --gpu h1000": "--gpu h1000: neither a file nor one of h100, h200, b200, a100",
    "--model llama3.1-8b --gpus 8 --precision fp4": "--precision fp4: must be bf16 or fp8",
    "--model llama3.1-8b --gpus 8 --gpu a100 --precision fp8": "--precision fp8: a100 has no FP8",
    "--model llama3.1-70b --gpus 1": "--gpus 1: no layout of llama3.1-70b fits",
    "--model llama3.1-8b --gpus 8 --think-rate 0.2 --tokens inf": "--tokens inf: must be a finite number",
    "--model llama3.1-8b --gpus 8 --layout tensr=2": "--layout tensr=2: tensr is no key of a layout",
    "--model llama3.1-8b --gpus 8 --layout tensor=3": "--gpus 8 is not a multiple of tensor * pipeline * context = 3",
    "--model llama3.1-8b --gpus 12 --layout tensor=3": "parallel.tensor=3 does not divide",
    "--model llama3.1-8b --gpus 8 --layout data=4": "--layout data=4: is of 4 GPUs, not of --gpus 8",
    "--model llama3.1-8b --gpus 8 --layout micro_batch=0": "--layout micro_batch=0: must be a number of rows",
    "--model llama3.1-8b --gpus 8 --layout micro_batch=3": "is not a multiple of micro_batch=3",
    "--model llama3.1-8b --gpus 8 --layout tensor=two": "--layout tensor=two: ",
    "--model llama3.1-8b --gpus 8 --layout pipeline": "--layout pipeline: pipeline=null: must be an integer",
    "--model llama3.1-8b --gpus 8 --layout pipeline=two": "--layout pipeline=two: pipeline=two: must be an integer",
    "--model llama3.1-8b --gpus 8 --layout pipeline=2,virtual_pipeline=two": "virtual_pipeline=two: must be an integer",
    "--model llama3.1-8b --gpus 8 --layout micro_batch=true": "--layout micro_batch=True: must be a number of rows",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_mistakes_get_one_clear_line(arguments: str) -> None:
    result = ra3(*arguments.split())
    assert result.exit_code == 2, result.output
    assert WRONG[arguments] in result.stderr and "Traceback" not in result.stderr


SHEET = "memory_gib: 48\nbf16_tflops: 300\nmemory_gb_s: 900\nnvlink_gb_s: 50\nnetwork_gb_s: 25\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"memory_gib: 48\nbf16_tflops: fast\n", "bf16_tflops"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"1: 2\n", "1: unknown key"),
        (f"{SHEET}rates: {{memory: 0}}\n".encode(), "rates.memory=0: must be above 0"),
        (f"{SHEET}rates: {{bf16_matmul: -0.5}}\n".encode(), "rates.bf16_matmul=-0.5: must be above 0"),
        (f"{SHEET}rates: {{exposed: -1}}\n".encode(), "rates.exposed=-1: must be at least 0"),
    ],
)
def test_a_gpu_file_with_a_mistake(tmp_path: Path, text: bytes, said: str) -> None:
    file = tmp_path / "gpu.yaml"
    file.write_bytes(text)
    result = ra3("--model", "llama3.1-8b", "--gpus", "8", "--gpu", str(file))
    assert result.exit_code == 2 and f"--gpu {file}: " in result.stderr and said in result.stderr


@pytest.mark.parametrize(("model", "gpus"), [("llama3.1-8b", 24), ("qwen3-30b-a3b", 16), ("llama3.1-405b", 512)])
def test_every_layout_found_can_be_and_fits(model: str, gpus: int) -> None:
    made, gpu = architecture_named(model, 8192), gpu_named("h100")
    batch = 96 if gpus == 24 else 512
    found = search(made, gpus, Work(8192, batch, 1), gpu)
    assert found.best
    for planned in found.best:
        assert planned.parallel.world_size == gpus
        assert planned.memory.total <= gpu.memory_gib
        assert problems_of(made.model, planned.parallel, planned.work) == []
    seconds = [planned.step.total for planned in found.best]
    assert seconds[0] <= min(seconds) * 1.01
