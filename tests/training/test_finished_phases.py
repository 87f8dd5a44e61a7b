"""A phase that has left its final checkpoint is not trained again, and holds nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ra3_megatron.config.runtime import CheckpointConfig
from ra3_megatron.em.loop import EM
from ra3_megatron.mcore.checkpoint_record import RECORD
from ra3_megatron.training.phases import Phase, train_phase


@pytest.mark.parametrize("skipped_by", ["train_phase", "loop"])
def test_what_a_kill_behind_final_left_is_deleted(skipped_by: str, tmp_path: Path) -> None:
    """Checkpoints of the way, however many `checkpoint.keep` keeps on the way; a damaged one stays to be looked at."""
    phase, nothing = Phase("mstep", 1), None
    folder = tmp_path / phase.key
    for name in ("final", "step_000100", "step_000200", "damaged_step_000150"):
        (folder / name).mkdir(parents=True)
        (folder / name / RECORD).write_text("{}")
    run: Any = SimpleNamespace(
        folder=SimpleNamespace(checkpoints=tmp_path),
        config=SimpleNamespace(checkpoint=CheckpointConfig(keep=2), mstep=None),
        runtime=SimpleNamespace(is_main=True, barrier=lambda: None, broadcast=lambda item: item),
    )
    if skipped_by == "train_phase":
        final = train_phase(run, phase, 300, nothing, nothing, nothing, nothing)  # type: ignore[arg-type]
    else:
        loop: Any = SimpleNamespace(run_context=run, config=run.config)
        final = EM.mstep(loop, phase, tmp_path, nothing)
    assert final == folder / "final" and (final / RECORD).is_file()
    assert sorted(os.listdir(folder)) == ["damaged_step_000150", "final"]
