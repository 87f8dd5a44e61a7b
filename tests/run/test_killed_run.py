"""`kill -9` at every kind of place, then `--resume`: the run ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_run import Ra3, curves, metrics, timeless, weights

from ra3_megatron.report.metrics import TIME_FIELDS

STEPS = "ra3_megatron.em.steps"
CHECKPOINT = "ra3_megatron.mcore.checkpoint"
LOOP = "ra3_megatron.em.loop"

PLACES: list[tuple[str, str, str, int]] = [
    ("in the corpus, before it is whole", "ra3_megatron.corpus.build:write_manifest", "before", 1),
    ("in the warm start, before any checkpoint", f"{STEPS}:PackedSteps.step", "before", 3),
    ("in the warm start, behind a checkpoint", f"{STEPS}:PackedSteps.step", "before", 6),
    ("while saving, the weights not yet written", f"{CHECKPOINT}:dist_checkpointing.save", "before", 2),
    ("while saving, the weights written", f"{CHECKPOINT}:dist_checkpointing.save", "after", 2),
    ("while saving, before the rename", f"{CHECKPOINT}:force_to_disk", "before", 3),
    ("while an old checkpoint is deleted", "ra3_megatron.training.phases:Path.unlink", "after", 1),
    ("in the evaluation of the base", f"{LOOP}:evaluate", "before", 1),
    ("behind the evaluation's metrics, before its figures", f"{LOOP}:write_json", "before", 1),
    ("in NTP of iteration 1", f"{STEPS}:PackedSteps.step", "before", 2),
    ("at the end of NTP, before its last checkpoint", f"{STEPS}:PackedSteps.step", "after", 3),
    ("in E-step 1, its first step", f"{STEPS}:EStepSteps.step", "before", 1),
    ("in E-step 1, behind its checkpoint", f"{STEPS}:EStepSteps.step", "before", 2),
    ("in E-step 1, its transcripts written", "ra3_megatron.em.steps:write_transcripts", "after", 1),
    ("in infusion 1, a chunk half-written", "ra3_megatron.corpus.indexed:TranscriptWriter._finish", "before", 2),
    ("in infusion 1, a chunk written, its figures not", "ra3_megatron.em.infuse:_write", "after", 1),
    ("behind infusion 1, before its metrics", f"{LOOP}:infuse", "after", 1),
    ("in M-step 1", f"{STEPS}:PackedSteps.step", "before", 2),
    ("in the evaluation of RA3 1, with its warnings", f"{LOOP}:transcript_records", "before", 1),
    ("in E-step 2", f"{STEPS}:EStepSteps.step", "before", 2),
    ("in M-step 2", f"{STEPS}:PackedSteps.step", "before", 2),
    ("behind the last step, before the summary", "ra3_megatron.em.outcome:summarize", "before", 1),
]


@pytest.fixture(scope="module")
def resumed(ra3: Ra3, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed at every one of PLACES, one after another, and brought to its end."""
    run = tmp_path_factory.mktemp("killed") / "run"
    arguments = ("train", config, f"run_dir={run}", "checkpoint.keep=1")
    for number, (place, target, when, call) in enumerate(PLACES):
        settings = [
            "checkpoint.interval=4" if number < 8 else "checkpoint.interval=1",
            f"checkpoint.async_save={'true' if number % 2 else 'false'}",
            *(["--resume"] if number else []),
        ]
        outcome = ra3(*arguments, *settings, code=None, kill=[target, when, call])
        assert outcome.code == -9, f"{place}: exit code {outcome.code}\n{outcome.output}\n{outcome.errors}"
        whole = [path.parent for path in run.rglob("checkpoint.json") if not path.parent.name.endswith(".partial")]
        assert all((path / ".metadata").is_file() for path in whole), place
    ra3(*arguments, "--resume")
    return run


def test_metrics_are_those_of_the_uninterrupted_run(finished: Path, resumed: Path) -> None:
    expected, found = metrics(finished), metrics(resumed)
    for line, (one, two) in enumerate(zip(expected, found, strict=False)):
        assert one == two, f"line {line}"
    assert len(expected) == len(found)


def test_tensorboard_draws_every_step_once(finished: Path, resumed: Path) -> None:
    expected, found = curves(finished), curves(resumed)
    assert expected.keys() == found.keys()
    for tag in expected:
        if tag.split("/")[1] not in TIME_FIELDS:
            assert expected[tag] == found[tag], tag


def test_weights_are_bit_identical(finished: Path, resumed: Path) -> None:
    phases = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert phases == sorted(path.name for path in (resumed / "checkpoints").iterdir())
    for phase in phases:
        expected, found = (weights(run / "checkpoints" / phase / "final") for run in (finished, resumed))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), phase


def test_infused_documents_are_byte_identical(finished: Path, resumed: Path) -> None:
    files = sorted(p.relative_to(finished) for p in (finished / "infused").rglob("*") if p.suffix in (".bin", ".idx"))
    assert len(files) >= 2 * 2 * 6, "several chunks of three parts for each iteration"
    for file in files:
        assert (finished / file).read_bytes() == (resumed / file).read_bytes(), file


def test_summary_and_transcripts_are_the_same(finished: Path, resumed: Path) -> None:
    expected, found = (timeless(json.loads((run / "summary.json").read_text())) for run in (finished, resumed))
    assert expected == found
    names = {path.name for path in (finished / "transcripts").iterdir()}
    assert names == {path.name for path in (resumed / "transcripts").iterdir()}
    for name in names:
        assert (finished / "transcripts" / name).read_bytes() == (resumed / "transcripts" / name).read_bytes()


def test_nothing_half_written_is_left(resumed: Path) -> None:
    assert not [path for path in resumed.rglob("*") if path.name.endswith((".partial", ".tmp"))]
    for phase in (resumed / "checkpoints").iterdir():
        assert {path.name for path in phase.iterdir()} <= {"final"}, phase.name


def test_resuming_a_finished_run_changes_nothing(resumed: Path, ra3: Ra3, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "moved"  # run_dir is no part of what a run computes
    shutil.copytree(resumed, run)
    before = (run / "metrics.jsonl").read_bytes()
    ra3("train", config, f"run_dir={run}", "checkpoint.interval=7", "--resume")
    assert (run / "metrics.jsonl").read_bytes() == before
