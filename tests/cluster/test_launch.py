"""`ra3 launch`: every script for GPU nodes with the real architectures, planned without a GPU or a Slurm."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ra3_megatron.cli import app
from ra3_megatron.cluster.job_script import Job, directives, find_script, read_job, render
from ra3_megatron.config.load import load_config
from ra3_megatron.scaling.tables import gpu_named
from ra3_megatron.verbs.launch import expectation

ROOT = Path(__file__).parents[2]
ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", **ROPE},
    "num_key_value_heads": 8,
    "hidden_act": "silu",
}
QWEN: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
}


def shape(layers: int, hidden: int, ffn: int, heads: int, tied: bool, **more: Any) -> dict[str, Any]:
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "tie_word_embeddings")
    return dict(zip(names, (layers, hidden, ffn, heads, tied), strict=True)) | more


MODELS = {
    # script: folder of the model, its config.json, processes of a replica, nodes
    "ra3_1b": ("Llama-3.2-1B", LLAMA | shape(16, 2048, 8192, 32, True, head_dim=64), 1, 2),
    "ra3_1_5b": (
        "Qwen2.5-1.5B",
        QWEN | shape(28, 1536, 8960, 12, True, num_key_value_heads=2, vocab_size=151936),
        1,
        2,
    ),
    "ra3_8b": ("Llama-3.1-8B", LLAMA | shape(32, 4096, 14336, 32, False), 2, 4),
    "ra3_70b": ("Llama-3.1-70B", LLAMA | shape(80, 8192, 28672, 64, False), 32, 16),
    "ra3_72b": (
        "Qwen2.5-72B",
        QWEN | shape(80, 8192, 29568, 64, False, num_key_value_heads=8, vocab_size=152064),
        32,
        16,
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as people stage them, with what `ra3 launch` reads of them."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "python").mkdir()
    (folder / "python" / "code.parquet").touch()
    for name, content, *_ in MODELS.values():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(autouse=True)
def site(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("RA3_", "SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RA3_MODELS", str(models))
    monkeypatch.setenv("RA3_DATA", f"{models}/python/*.parquet")
    monkeypatch.setenv("RA3_RUNS", "/shared/runs")


def launch(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["launch", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_fp32_is_planned_as_such() -> None:
    """Weights, logits and the engine's weights of 4 bytes, no second copy of the weights, products at the fp32 peak."""
    job = read_job(find_script("1b"), {}, [])
    settings = [*job.settings, "model.vocab_size=128256", "rollout.vllm.kv_cache_gib=1"]
    gpu = gpu_named("h100")
    bf16, fp32 = (
        expectation(load_config(job.config, [*settings, f"model.precision={name}"]), gpu) for name in ("bf16", "fp32")
    )
    for part, ratio in {"weights": 2, "scorer": 2, "gradients": 1, "optimizer": 8 / 12, "activations": 2}.items():
        assert getattr(fp32.memory, part) == pytest.approx(ratio * getattr(bf16.memory, part)), part
    assert fp32.memory.rollouts - 1 == pytest.approx(2 * (bf16.memory.rollouts - 1))
    assert fp32.planned.step.matmul == pytest.approx(989 / 67 * bf16.planned.step.matmul)


@pytest.mark.parametrize("name", MODELS)
def test_every_script_fits_its_nodes(name: str, models: Path) -> None:
    model, _, replica, nodes = MODELS[name]
    job = read_job(find_script(name), {}, [])
    assert (job.trainers, job.train_nodes, job.rollout_nodes, job.gpus_per_node) == (8 * nodes, nodes, 0, 8)
    config = load_config(job.config, job.settings)
    assert config.model.hf == str(models / model) and config.model.precision == "bf16"
    assert config.parallel.world_size == 8 * nodes and config.parallel.data == 8 * nodes // replica
    assert config.corpus.path == f"{models}/python/*.parquet" and config.rollout.engine == "vllm"
    assert config.rollout.vllm.tensor <= 8 and config.warm_start.steps == 0
    tokens = config.em.iterations * config.mstep.steps * config.mstep.global_batch_size * config.model.context_length
    assert tokens == pytest.approx(1e9, rel=0.01), "the paper's mid-training"
    output = launch(name, "--dry-run")
    used = re.search(r"memory +([\d.]+) GiB of the 79\.6", output)
    assert used and 30 < float(used[1]) < 72, "fits, with a tenth free"
    for part in (
        "gradients",
        "scorer",
        "rollouts",
        "M-step",
        "s an update",
        f"srun --kill-on-bad-exit=1 --nodes={nodes}",
    ):
        assert part in output
    assert f"--run-dir /shared/runs/{name}-JOB" in output and f"#SBATCH --nodes={nodes}\n" in output


def test_rlvr_is_checked_with_the_start_that_it_names(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batches need not go with those of mid-training, and the start's run says the architecture."""
    start = tmp_path / "run" / "checkpoints" / "mstep-2" / "final"
    start.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(
        "model: {num_layers: 4, hidden_size: 256, num_attention_heads: 8, num_query_groups: 4}\n"
    )
    monkeypatch.setenv("RA3_CHECKPOINT", str(start))
    problems = tmp_path / "problems.jsonl"
    problems.touch()
    monkeypatch.setenv("RA3_PROBLEMS", str(problems))
    job = read_job(find_script("rlvr_8b"), {}, [])
    config = load_config(job.config, job.settings)
    assert (job.verb, config.method, config.parallel.world_size, config.parallel.data) == ("rlvr", "rlvr", 32, 16)
    assert (config.model.num_layers, config.model.hidden_size) == (4, 256) and config.model.context_length == 4096
    assert config.rlvr.problems.path == str(problems) and config.rlvr.checkpoint == str(start)
    output = launch("rlvr_8b", "--dry-run")
    assert "ra3 rlvr " in output and "the planner knows mid-training alone" in output and "tensor 2, data 16" in output
    monkeypatch.delenv("RA3_CHECKPOINT")
    assert "rlvr.checkpoint is missing" in launch("rlvr_8b", "--dry-run", code=2)
    monkeypatch.setenv("RA3_MODEL", str(models / "Llama-3.1-8B"))
    assert "model.hf=" in launch("rlvr_8b", "--dry-run")
    problems.unlink()
    said = f"ra3: rlvr.problems.path={problems}: no such file or folder\n"
    assert launch("rlvr_8b", "--dry-run", code=2) == said


def test_data_that_are_not_there(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RA3_DATA", f"{models}/nowhere/*.parquet")
    said = f"ra3: corpus.path={models}/nowhere/*.parquet: the pattern matches no file\n"
    assert launch("8b", "--dry-run", code=2) == said


def test_a_script_by_the_name_of_its_file_and_a_gpu_that_is_none() -> None:
    assert find_script("ra3_8b.sh") == find_script("8b")
    assert "--gpu foo: neither a file nor one of" in launch("tiny_cpu", "--dry-run", "--gpu", "foo", code=2)


def test_what_is_written_where_nothing_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RA3_DATA")
    said = f"ra3: --out={tmp_path}: cannot be written (Is a directory)\n"
    assert launch("tiny_cpu", "--dry-run", "--out", str(tmp_path), code=2).endswith(said)


def test_what_is_asked_for_otherwise_is_what_is_shown() -> None:
    words = ("8b", "--dry-run", "--nodes", "8", "--sbatch", "partition=batch", "--sbatch", "--time=02:00:00")
    output = launch(*words, "parallel.tensor=4", "estep.steps=7")
    for line in ("#SBATCH --nodes=8", "#SBATCH --partition=batch", "#SBATCH --time=02:00:00"):
        assert f"{line}\n" in output
    assert "#SBATCH --time=24:00:00" not in output and "TP4 DP16" in output
    assert output.index("parallel.tensor=2") < output.index("parallel.tensor=4") < output.index("estep.steps=7")


def test_rollouts_on_nodes_of_their_own_leave_the_trainers_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RA3_ROLLOUT_NODES", "2")
    output = launch("8b", "--dry-run", "--nodes", "6")
    assert "4 for training, 2 for vLLM" in output and "--nodes=4 --ntasks=32" in output
    assert "rollout.placement=nodes rollout.replicas=8" in output
    assert ", rollouts " not in output and "as if on the trainer's GPUs" in output


def test_the_rendered_script_is_written(tmp_path: Path) -> None:
    launch("8b", "--dry-run", "--sbatch", "qos=high", "--out", str(tmp_path / "job.sh"))
    text = (tmp_path / "job.sh").read_text()
    assert directives(text) == directives(find_script("8b").read_text()) | {"qos": "high"}
    subprocess.run(["bash", "-n", str(tmp_path / "job.sh")], check=True)
    job = read_job(find_script("8b"), {"qos": "high"}, [])
    assert render(job) == text.removesuffix("\n") + "\n"


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 0),
        ({"gres": "none"}, 0),
        ({"gres": "lscratch:100"}, 0),
        ({"gres": "gpu"}, 1),
        ({"gres": "gpu:8"}, 8),
        ({"gres": "gpu:h100"}, 1),
        ({"gres": "gpu:h100:8"}, 8),
        ({"gres": "gres:gpu:4"}, 4),
        ({"gres": "gres/gpu:4"}, 4),
        ({"gres": "gpu:8,lscratch:100"}, 8),
        ({"gres": "lscratch:100,gpu:8"}, 8),
        ({"gres": "gpu:h100:4,gpu:a100:2"}, 6),
        ({"gres": "gpu:4(S:0-1)"}, 4),
        ({"gres": "gpu:h100:4(S:0,1),lscratch:100"}, 4),
        ({"gpus-per-node": "4"}, 4),
        ({"gpus-per-node": "h100:4"}, 4),
        ({"gpus-per-node": "h100:4,a100:2"}, 6),
        ({"gpus-per-node": "2", "gres": "lscratch:100"}, 2),
    ],
)
def test_gpus_that_are_asked_for(options: dict[str, str], count: int) -> None:
    assert Job(Path("x"), options, "train", Path("c"), [], "", 1, 1, 0, "srun").gpus_per_node == count


def test_a_cpu_job_has_a_layout_and_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RA3_DATA")
    output = launch("tiny_cpu", "--dry-run")
    assert "pipeline 2, data 2" in output and "CPU each" in output and "GiB" not in output


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["9b"], {}, "9b: no such job script; there are ra3_1_5b, ra3_1b, ra3_70b, ra3_72b, ra3_8b, ra3_tiny_cpu"),
        (["8b"], {"RA3_MODELS": ""}, "ra3_8b.sh: RA3_MODEL is not set: the folder of the Hugging Face model"),
        (["8b"], {"RA3_DATA": ""}, "ra3_8b.sh: RA3_DATA is not set: files with the code to train on"),
        (["8b"], {"RA3_MODEL": "/nowhere"}, "model.hf=/nowhere: "),
        (["70b", "--nodes", "3"], {}, "ra3_70b.sh: 24 processes on 3 nodes hold no whole number of replicas of 32"),
        (["8b", "--nodes", "few"], {}, "--nodes few: "),
        (["8b", "--sbatch", "nodes=few"], {}, "ra3_8b.sh: job_num_nodes=few: must be a number"),
        (["8b", "parallel.data=4"], {}, "the layout needs 8 processes, and the job has 32 on 4 nodes; "),
        (
            ["8b", "--sbatch", "gres=gpu:4"],
            {},
            "ra3_8b.sh: 8 processes on each node (ntasks-per-node), and 4 GPUs: every process needs one of its own",
        ),
        (["8b", "estep.stepps=4"], {}, "estep.stepps"),
        (["8b", "mstep.micro_batch_size=16"], {}, "ra3_8b.sh: needs 1"),
        (["8b"], {"RA3_ROLLOUT_NODES": "4"}, "RA3_ROLLOUT_NODES=4 leaves no node to train on: the job has 4"),
        (["8b", "--gpu", "v100"], {}, "--gpu v100: neither a file nor one of"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    words: list[str], environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert message in launch(*words, "--dry-run", code=2)


def test_without_slurm_nothing_is_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bash", "dirname", "date"):  # all that a script calls up to there
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no sbatch here" in launch("8b", code=2)


@pytest.mark.parametrize("name", ["convert", "eval", "mine"])
def test_a_script_that_does_not_train_is_not_run_to_be_asked(name: str, tmp_path: Path) -> None:
    script = ROOT / "slurm" / f"{name}.sh"
    if name == "mine":
        script = tmp_path / "mine.sh"
        script.write_text(f"#!/bin/bash\n# not slurm/body.sh\ntouch {tmp_path}/ran\n")
    said = f"ra3: {script}: is no job script that trains: it does not source slurm/body.sh; sbatch takes it as it is\n"
    for how in (["--dry-run"], []):
        assert launch(str(script), *how, code=2) == said
    assert not (tmp_path / "ran").exists()
