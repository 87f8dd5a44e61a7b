"""SIGUSR1 or SIGTERM: a run saves behind the step that it came in and stops; `--resume` ends as if nothing had been."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from small_run import Ra3, metrics, weights

from ra3_megatron.config.errors import STOPPED

STEPS = "ra3_megatron.em.steps"
LOOP = "ra3_megatron.em.loop"
INFUSE = "ra3_megatron.em.infuse"

PLACES: list[tuple[str, str, str, int, str, str]] = [
    ("in the warm start", f"{STEPS}:PackedSteps.step", "before", 3, "SIGUSR1", "saved behind step 3 of warm_start"),
    ("in its last step", f"{STEPS}:PackedSteps.step", "before", 21, "SIGTERM", "before the evaluation of base 0"),
    ("in E-step 1", f"{STEPS}:EStepSteps.step", "after", 1, "SIGTERM", "saved behind step 1 of estep-1"),
    ("at the end of E-step 1", f"{STEPS}:EStepSteps.step", "after", 1, "SIGUSR1", "before infuse-1"),
    ("in infusion 1", f"{LOOP}:infuse", "before", 1, "SIGUSR1", "saved 8 of 33 documents of infuse-1"),
    ("at its last chunk", f"{INFUSE}:_write", "after", 4, "SIGTERM", "saved 33 of 33 documents of infuse-1"),
    ("in M-step 1", f"{STEPS}:PackedSteps.step", "before", 1, "SIGUSR1", "saved behind step 1 of mstep-1"),
]
"""A place, where the signal comes, which one, and what the run says."""


@pytest.fixture(scope="module")
def resumed(ra3: Ra3, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped at every one of PLACES, one after another, and brought to its end."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    arguments = ("train", config, f"run_dir={run}")
    for number, (place, target, when, call, name, said) in enumerate(PLACES):
        resume = ["--resume"] if number else []
        outcome = ra3(*arguments, *resume, code=None, signal=[target, when, call, name])
        assert outcome.code == STOPPED, f"{place}: exit code {outcome.code}\n{outcome.output}\n{outcome.errors}"
        assert outcome.errors == f"ra3: stopped by {name}: {said}; the same command with --resume goes on\n", place
    infused = run / "infused" / "iteration_1"
    part = infused / "chunk_00001_ids.bin"
    part.write_bytes(part.read_bytes()[:-1])
    size = part.stat().st_size
    said = ra3.refuses(*arguments, "--resume")
    assert said == f"{part}: {size} bytes instead of {size + 1}: delete {infused} to infuse again"
    shutil.rmtree(infused)  # the M-step that has begun goes on with the same documents, infused once more
    ra3(*arguments, "--resume")
    return run


def test_a_finished_run_does_without_its_infused_documents(ra3: Ra3, config: Path, resumed: Path) -> None:
    kept, before = resumed.with_name("kept"), (resumed / "summary.json").read_text()
    (resumed / "infused").rename(kept)
    try:
        outcome = ra3("train", config, f"run_dir={resumed}", "--resume")
    finally:
        kept.rename(resumed / "infused")
    assert outcome.errors == "" and (resumed / "summary.json").read_text() == before


def test_metrics_are_those_of_the_uninterrupted_run(finished: Path, resumed: Path) -> None:
    assert metrics(finished) == metrics(resumed)


def test_weights_are_bit_identical(finished: Path, resumed: Path) -> None:
    for phase in sorted(path.name for path in (finished / "checkpoints").iterdir()):
        expected, found = (weights(run / "checkpoints" / phase / "final") for run in (finished, resumed))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), phase


def test_a_damaged_checkpoint_is_left_for_the_one_before(
    finished: Path, ra3: Ra3, config: Path, tmp_path: Path
) -> None:
    """A file of the last checkpoint is cut short: the run goes on from the one before, to the same numbers."""
    run = tmp_path / "run"
    arguments = ("train", config, f"run_dir={run}", "checkpoint.interval=2")
    outcome = ra3(*arguments, code=STOPPED, signal=[f"{STEPS}:PackedSteps.step", "before", 7, "SIGTERM"])
    folder = run / "checkpoints" / "warm_start"
    assert sorted(path.name for path in folder.iterdir()) == ["step_000006", "step_000007"]
    shard = max((folder / "step_000007").rglob("*.distcp"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-100])
    outcome = ra3(*arguments, "--resume")
    said = " ".join(outcome.output.split())
    assert f"warning: {shard}: " in said and f"use another checkpoint; going on from {folder / 'step_000006'}" in said
    assert metrics(finished) == metrics(run)
    assert sorted(path.name for path in folder.iterdir()) == ["damaged_step_000007", "final"]


def test_without_a_whole_checkpoint_the_run_says_so(ra3: Ra3, config: Path, tmp_path: Path) -> None:
    arguments = ("train", config, f"run_dir={tmp_path / 'run'}", "checkpoint.keep=1")
    ra3(*arguments, code=STOPPED, signal=[f"{STEPS}:PackedSteps.step", "before", 3, "SIGTERM"])
    (saved,) = (tmp_path / "run" / "checkpoints" / "warm_start").iterdir()
    shard = min(saved.rglob("*.distcp"))
    shard.unlink()
    assert ra3.refuses(*arguments, "--resume") == f"{shard}: is missing: use another checkpoint"
    assert saved.is_dir()


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(
    "to_all",
    [False, pytest.param(True, marks=pytest.mark.extended)],
    ids=["to the command", "to one process of the layout"],
)
def test_processes_of_a_layout_stop_together(to_all: bool, config: Path, tmp_path: Path) -> None:
    """The signal goes to the process that the user started, or to one that it started."""
    run = tmp_path / "run"
    code = "from ra3_megatron.cli import main; main()"
    settings = ["warm_start.steps=100000", "parallel.data=2", f"run_dir={run}"]
    command = [sys.executable, "-c", code, "train", str(config), *settings]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or len((run / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    target = process.children()[-1] if to_all else process
    number = signal.SIGUSR1 if to_all else signal.SIGTERM
    target.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == STOPPED, errors
    assert f"ra3: stopped by {number.name}: saved behind step" in errors and "Traceback" not in errors
    (saved,) = (run / "checkpoints" / "warm_start").iterdir()
    step = int(saved.name.removeprefix("step_"))
    assert max(record["step"] for record in metrics(run)) == step
