"""The scripts for GPU nodes and conversions: taken by a Slurm that has such nodes, and run on CPU nodes.

What only GPUs can show (NCCL, memory, speed) is not tested here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ra3_megatron.cli import app
from tests.run.small_run import metrics
from tests.slurm.site import ROOT, Site

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
SLURM = ROOT / "slurm"
CPU = ("--partition=cpu", "--gres=none", "--cpus-per-task=1", "--time=30")
NODES = {"ra3_1b": 2, "ra3_1_5b": 2, "ra3_8b": 4, "ra3_70b": 16, "ra3_72b": 16}


@pytest.mark.parametrize(("name", "nodes"), NODES.items())
def test_slurm_takes_the_scripts(site: Site, name: str, nodes: int) -> None:
    command = ["sbatch", "--test-only", "--partition=gpu", str(SLURM / f"{name}.sh")]
    done = subprocess.run(command, env=site.cluster.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"using {128 * nodes} processors on nodes gpu[1-{nodes}] in partition gpu" in done.stderr


def test_slurm_refuses_what_its_nodes_have_not(site: Site) -> None:
    """So the test above can fail."""
    for wrong in ("--gres=gpu:9", "--nodes=17", "--ntasks-per-node=16"):
        command = ["sbatch", "--test-only", "--partition=gpu", wrong, str(SLURM / "ra3_70b.sh")]
        done = subprocess.run(command, env=site.cluster.environment, capture_output=True, text=True, check=False)
        assert done.returncode and "not available" in done.stderr, (wrong, done.stderr)


def convert(site: Site, name: str, *arguments: object) -> str:
    """Run a conversion as a job; its output."""
    job = site.submit(
        name, *map(str, arguments), script=SLURM / "convert.sh", options=("--cpus-per-task=1", "--time=30")
    )
    assert site.cluster.wait(job)["JobState"] == "COMPLETED", site.output(name)
    return site.output(name)


@pytest.fixture(scope="module")
def folder(site: Site) -> Path:
    """A Hugging Face folder of a small model, converted by a job."""
    run, out = site.folder / "scratch", site.folder / "Llama-tiny"
    words = ("warm_start.steps=2", "em.iterations=0", "model.head_dim=32", "evaluation.documents=2", f"run_dir={run}")
    ra3 = Path(sys.prefix) / "bin" / "ra3"
    subprocess.run([ra3, "train", site.config, *words], check=True, capture_output=True, timeout=300)
    convert(site, "to_hf", "megatron-to-hf", "--checkpoint", run / "checkpoints/warm_start/final", "--out", out)
    return out


@pytest.mark.extended
def test_conversions_are_jobs(site: Site, folder: Path) -> None:
    out = site.folder / "converted"
    convert(site, "to_megatron", "hf-to-megatron", "--hf", folder, "--out", out)
    assert "all equal" in convert(site, "check", "check", "--hf", folder, "--checkpoint", out)


def test_the_script_of_8b_runs_with_a_small_model(site: Site, folder: Path) -> None:
    """Its own configuration and layout (TP2, sequence parallelism, bf16, vLLM, exports), on two CPU nodes."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    data = site.folder / "snippets.jsonl"
    code = sorted((site.folder / "code").rglob("*.py"))[:40]
    data.write_text("".join(json.dumps({"text": path.read_text()}) + "\n" for path in code))
    smaller = (
        *("corpus.source=jsonl", "corpus.valid_fraction=0.3", "model.context_length=160", "text.max_latent_tokens=5"),
        *("em.iterations=1", "estep.steps=1", "estep.documents_per_step=2", "estep.group_size=2", "mstep.steps=2"),
        *("mstep.global_batch_size=4", "evaluation.documents=2", "rollout.vllm.kv_cache_gib=0.1"),
        *("rollout.vllm.tensor=1", "parallel.threads=1"),
    )
    job = site.submit(
        "of_8b",
        *smaller,
        script=SLURM / "ra3_8b.sh",
        options=(*CPU, "--nodes=2", "--ntasks-per-node=1"),
        RA3_CONFIG="",
        RA3_MODEL=str(folder),
        RA3_DATA=str(data),
    )
    run = site.folder / "of_8b"
    assert site.cluster.wait(job)["JobState"] == "COMPLETED", site.output("of_8b") + said(site.logs("of_8b"))
    assert [record["phase"] for record in metrics(run)].count("mstep") == 2
    assert (run / "hf" / "ra3" / "model.safetensors").is_file()
    assert list((run / "vllm").glob("engine-*.log"))


def test_what_is_missing_is_said_in_one_line(site: Site) -> None:
    job = site.submit("no_model", script=SLURM / "ra3_8b.sh", options=(*CPU, "--nodes=1", "--ntasks-per-node=1"))
    assert site.cluster.wait(job)["ExitCode"] == "2:0"
    assert "RA3_MODEL is not set: the folder of the Hugging Face model Llama-3.1-8B" in site.output("no_model")


def test_launch_submits(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", site.cluster.environment["SLURM_CONF"])
    options = ("--sbatch", "begin=now+1hour", "--sbatch", "output=/dev/null", "--nodes", "1")
    result = CliRunner().invoke(app, ["launch", "tiny_cpu", *options, "estep.steps=7"])
    assert result.exit_code == 0, result.output
    number = re.search(r"submitted +job (\d+)", result.output)
    assert number, result.output
    job = site.cluster.job(number[1])
    site.cluster.run("scancel", number[1])
    assert (
        job["JobState"] == "PENDING" and job["NumNodes"] == "1-1" and job["Command"] == str(SLURM / "ra3_tiny_cpu.sh")
    )


def said(logs: Path) -> str:
    """The output of the last attempt's first process."""
    file = logs / "latest" / "rank-0.txt"
    return file.read_text() if file.is_file() else str(os.listdir(logs) if logs.is_dir() else "no logs")
