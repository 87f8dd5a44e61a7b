"""Steps with a NaN or a spike that are skipped: nothing moves, the run goes on, and a resumed run decides the same."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small_run import Ra3, metrics, weights

PACKED, ESTEP = "ra3_megatron.em.steps:PackedSteps", "ra3_megatron.em.steps:EStepSteps"
NAN = math.nan
NANS = {PACKED: {5: NAN, 6: NAN}}
WRONG = {PACKED: {3: 1000.0, 5: NAN, 6: NAN}, ESTEP: {0: NAN}}
SETTINGS = (
    "logging.tensorboard=false",
    "logging.interval=8",  # a skipped step is logged all the same
    "warm_start.steps=8",
    "em.iterations=1",
    "em.control=false",
    "evaluation.documents=2",
    "checkpoint.interval=1",
    "checkpoint.keep=9",
)
SKIP = ("monitors.nonfinite=skip", "monitors.spike=skip", "monitors.spike_factor=20", "monitors.spike_window=2")


@pytest.fixture(scope="module")
def skipping(ra3: Ra3, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a spike and two NaN in the warm start, and a NaN in the E-step."""
    run = tmp_path_factory.mktemp("skipping") / "run"
    ra3("train", config, *SETTINGS, *SKIP, f"run_dir={run}", loss_times=WRONG)
    return run


def test_skipped_steps_are_logged_with_their_reason(skipping: Path) -> None:
    lines = metrics(skipping)
    skipped = [(line["phase"], line["step"]) for line in lines if line.get("skipped") == 1]
    assert skipped == [("warm_start", 4), ("warm_start", 6), ("warm_start", 7), ("estep", 1)]
    told = [line for line in lines if line.get("monitor") == "skipped step"]
    assert [(line["phase"], line["step"]) for line in told] == skipped
    assert "is above 20 times" in told[0]["message"] and told[1]["message"] == "loss is nan"
    names = {json.loads(line)["name"] for line in (skipping / "corpus/text/train.jsonl").read_text().splitlines()}
    for line in told:
        dump = next(part for part in line["advice"].split("in ")[1:] if part.startswith("skipped/")).split(";")[0]
        batch = json.loads((skipping / dump).read_text())
        assert batch["step"] == line["step"] and set(batch["documents"]) <= names and batch["documents"]
    said = json.loads((skipping / "summary.json").read_text())["monitors"]
    assert [each["phase"] for each in said if each["name"] == "skipped step"] == [phase for phase, _ in skipped]
    assert lines[-1]["phase"] == "evaluation" and lines[-1]["code_ce"] < 10


def test_a_killed_run_skips_the_same_steps(skipping: Path, ra3: Ra3, config: Path, tmp_path: Path) -> None:
    """It is killed before a spike, between two NaN and behind both; each checkpoint of the way is looked at."""
    run = tmp_path / "run"
    arguments = ("train", config, *SETTINGS, *SKIP, f"run_dir={run}")
    folder = run / "checkpoints" / "warm_start"
    for call, resume in ((4, ()), (4, ("--resume",)), (2, ("--resume",))):
        ra3(*arguments, *resume, code=-9, kill=[f"{PACKED}.step", "before", call], loss_times=WRONG)
    states = [weights(folder / f"step_{step:06d}") for step in range(1, 8)]
    moved = [any(not torch.equal(one[name], two[name]) for name in one) for one, two in pairwise(states)]
    assert moved == [True, True, False, True, False, False], "weights and optimizer"
    assert sum(name.startswith("optimizer") for name in states[0]) > 10
    ra3(*arguments, "--resume", loss_times=WRONG)
    assert metrics(run) == metrics(skipping)


def test_too_many_in_a_row_stop_the_run_and_it_may_go_on_with_another_answer(
    ra3: Ra3, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ("train", config, *SETTINGS, "em.iterations=0", f"run_dir={run}")
    problem = ra3.refuses(*arguments, loss_times=NANS)
    assert problem.startswith("warm_start step 6: loss is nan; its batch ("), "as ever"
    problem = ra3.refuses(*arguments, "monitors.nonfinite=skip", "monitors.max_skips=1", "--resume", loss_times=NANS)
    assert problem.startswith("warm_start step 7: loss is nan, and 1 updates before it were skipped (monitors.max_sk")
    ra3(*arguments, "monitors.nonfinite=skip", "monitors.max_skips=2", "--resume", loss_times=NANS)
    steps = [line for line in metrics(run) if line["phase"] == "warm_start" and "loss" in line]
    assert [(line["step"], line.get("skipped", 0)) for line in steps] == [(6, 1), (7, 1), (8, 0)]
