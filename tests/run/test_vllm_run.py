"""Whole runs that vLLM samples for: the transcripts of the live model; resumed; and when an engine or trainer dies."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import Ra3, metrics, weights

from ra3_megatron.config.errors import UNAVAILABLE

pytest.importorskip("vllm", reason="vllm is not installed")

MODEL = ("model.head_dim=32", "em.iterations=1", "em.control=false")  # vLLM has no smaller heads
DISTURB = """
import os, signal
from ra3_megatron.cli import main, prepare_threads

prepare_threads()
import psutil
import ra3_megatron.mcore
from ra3_megatron.em import steps

name, at = os.environ["DISTURB"].split()
step = steps.EStepSteps.step

def disturbed(self, number):
    if number == int(at):
        for child in psutil.Process().children():
            if "ra3_megatron.rollout.vllm.server" in child.cmdline():
                child.send_signal(signal.Signals[name])
    return step(self, number)

steps.EStepSteps.step = disturbed
main()
"""
"""The `ra3` command; a signal comes to the engine at a step of the E-step."""
STALE = ("rollout.engine=vllm", "rollout.max_staleness=1", "estep.importance_cap=2", "estep.steps=4")


@pytest.fixture(scope="module")
def live(ra3: Ra3, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that samples from the model that it trains."""
    run = tmp_path_factory.mktemp("live") / "run"
    ra3("train", config, *MODEL, f"run_dir={run}")
    return run


@pytest.fixture(scope="module")
def ahead(ra3: Ra3, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that samples one update ahead."""
    run = tmp_path_factory.mktemp("ahead") / "run"
    ra3("train", config, *MODEL, *STALE, f"run_dir={run}")
    return run


def infused(run: Path) -> dict[str, bytes]:
    files = [path for path in (run / "infused").rglob("*") if path.suffix in (".bin", ".idx")]
    assert files
    return {path.name: path.read_bytes() for path in files}


def close(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """The same lines, numbers as close as two ways to compute the same probabilities are.

    The fill rate is about the packing alone, and two replicas have a row each where one replica fills one.
    """
    skipped = {"log_prob_mismatch", "log_prob_difference", "fill_rate"}
    assert [line["phase"] for line in one] == [line["phase"] for line in other]
    for left, right in zip(one, other, strict=True):
        for name in left.keys() & right.keys() - skipped:
            if name == "largest_log_prob_difference":
                assert right[name] < 1e-4
            elif isinstance(left[name], str):
                assert right[name] == left[name]
            else:
                assert right[name] == pytest.approx(left[name], rel=2e-3, abs=1e-4), (left["phase"], name)


@pytest.mark.parametrize(
    "settings",
    [
        ("rollout.vllm.refit_bucket_mb=1",),
        pytest.param(("parallel.data=2", "estep.documents_per_step=3"), marks=pytest.mark.extended),
        pytest.param(("rollout.vllm.tensor=2", "rollout.vllm.threads=1"), marks=pytest.mark.extended),
        pytest.param(
            ("rollout.placement=server", "rollout.replicas=2", "parallel.tensor=2"), marks=pytest.mark.extended
        ),
    ],
    ids=[
        "colocated",
        "colocated_with_each_replica",
        "engine_of_two_processes",
        "two_servers_of_a_tensor_parallel_trainer",
    ],
)
def test_vllm_samples_what_the_live_model_samples(
    ra3: Ra3, config: Path, live: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    ra3("train", config, *MODEL, "rollout.engine=vllm", *settings, f"run_dir={run}")
    close(metrics(live), metrics(run))
    if len(settings) == 1:  # of the same weights, to the bit
        assert infused(run) == infused(live)
    steps = [line for line in read(run) if line["phase"] == "estep" and "refit_seconds" in line]
    assert len(steps) == 2 and all(line["refit_bytes_per_second"] > 0 for line in steps)
    assert all(line["seconds_refit"] >= line["refit_seconds"] and line["seconds_sampling"] > 0 for line in steps)
    assert not engines_of(run), "no engine is left behind"


def test_a_run_ahead_says_how_old_its_transcripts_are(ahead: Path, live: Path) -> None:
    steps = [line for line in metrics(ahead) if line["phase"] == "estep" and "staleness" in line]
    assert [line["staleness"] for line in steps] == [0.0, 1.0, 1.0, 1.0]
    assert steps[0]["log_prob_mismatch"] < 1e-4 < max(line["log_prob_mismatch"] for line in steps)
    first = next(line for line in metrics(live) if line["phase"] == "estep")
    assert steps[0]["reward"] == pytest.approx(first["reward"], rel=1e-4), "the first update is on-policy"


@pytest.mark.extended
@pytest.mark.parametrize("call", [2, 4])
def test_a_killed_run_ahead_ends_as_if_nothing_had_happened(
    ra3: Ra3, config: Path, ahead: Path, tmp_path: Path, call: int
) -> None:
    arguments = ("train", config, *MODEL, *STALE, f"run_dir={tmp_path / 'run'}", "checkpoint.interval=1")
    killed = ra3(*arguments, code=None, kill=["ra3_megatron.em.steps:EStepSteps.step", "before", call])
    assert killed.code == -signal.SIGKILL
    ra3(*arguments, "--resume")
    assert metrics(tmp_path / "run") == metrics(ahead)
    one, other = (weights(run / "checkpoints" / "mstep-1" / "final") for run in (tmp_path / "run", ahead))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not engines_of(tmp_path / "run")


@pytest.mark.extended
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("SIGKILL", "killed by SIGKILL; log "),
        ("SIGSTOP", "within 15 s"),
    ],
)
def test_a_run_goes_on_behind_an_engine_that_dies_or_hangs(
    config: Path, ahead: Path, tmp_path: Path, name: str, said: str
) -> None:
    """It is not the user's mistake: one line, and an exit code that a job script retries."""
    run = tmp_path / "run"
    command = [sys.executable, "-c", DISTURB, "train", str(config), *MODEL, *STALE, f"run_dir={run}"]
    command += ["checkpoint.interval=1", "--resume"]
    outcomes = []
    for more, step in ((["rollout.vllm.call_timeout=15"], 2), ([], 9)):
        environment = {**os.environ, "DISTURB": f"{name} {step}"}
        done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, check=False)
        outcomes.append((done.returncode, [line for line in done.stderr.splitlines() if line.startswith("ra3: ")]))
        assert "Traceback" not in done.stderr and not engines_of(run), done.stderr
    assert [code for code, _ in outcomes] == [UNAVAILABLE, 0], outcomes
    (line,) = outcomes[0][1]
    assert line.startswith("ra3: rollout.engine=vllm: ") and said in line
    assert line.endswith("; the same command with --resume goes on")
    assert metrics(run) == metrics(ahead)


@pytest.mark.extended
def test_a_killed_trainer_leaves_no_engine(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = [*MODEL, "rollout.engine=vllm", "warm_start.steps=1", "estep.steps=100000", f"run_dir={run}"]
    trainer = subprocess.Popen(
        [sys.executable, "-m", "ra3_megatron", "train", str(config), *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert trainer.stdout is not None
    for line in trainer.stdout:
        if line.startswith("estep-1"):
            break
    (engine,) = engines_of(run)
    end = os.pidfd_open(engine)
    trainer.kill()
    trainer.wait()
    assert select.select([end], [], [], 60)[0], "the engine ends with its trainer"
    os.close(end)
    assert not engines_of(run)


def test_heads_that_vllm_does_not_have_are_refused_before_anything_trains(
    ra3: Ra3, config: Path, tmp_path: Path
) -> None:
    line = ra3.refuses("train", config, "rollout.engine=vllm", f"run_dir={tmp_path / 'run'}")
    assert line.startswith("model.head_dim=8: rollout.engine=vllm on CPUs needs one of 32, 64")
    assert not (tmp_path / "run" / "checkpoints").exists()


def read(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def engines_of(run: Path) -> list[int]:
    """Processes that still run and write to an engine's log of this run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            target = os.readlink(process / "fd" / "1")
            zombie = ") Z " in (process / "stat").read_text()
        except OSError:
            continue
        if target.startswith(str(run / "vllm")) and not zombie:
            found.append(int(process.name))
    return found
