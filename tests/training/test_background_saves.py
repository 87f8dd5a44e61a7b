"""Checkpoints of a phase that are written while it goes on: one at a time, the newest complete one is never lost."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.config.runtime import CheckpointConfig
from ra3_megatron.mcore import checkpoint
from ra3_megatron.mcore.checkpoint_record import RECORD
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.training.phases import _Saves, latest_checkpoint
from tests.mcore.small_models import make_trainer

# isort: split
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

_write = FileSystemWriterAsync.write_preloaded_data


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """Writers wait until this file exists."""
    path = tmp_path / "gate"

    def write(*args: Any, **kwargs: Any) -> None:
        while not path.exists():
            time.sleep(0.01)
        _write(*args, **kwargs)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write)
    yield path
    FileSystemWriterAsync.write_preloaded_data = staticmethod(_write)


@pytest.fixture
def saves(runtime: Runtime, tmp_path: Path) -> _Saves:
    trainer = make_trainer(ParallelConfig(threads=1), runtime)
    settings = SimpleNamespace(checkpoint=CheckpointConfig(async_save=True, keep=1))
    run: Any = SimpleNamespace(config=settings, runtime=runtime, sync=lambda: None)
    return _Saves(run, tmp_path / "phase", trainer.model, trainer)


def one_complete_one_begun(saves: _Saves, gate: Path) -> None:
    gate.touch()
    saves.begin("step_000001", {"step": 1})
    saves.wait()
    gate.unlink()
    saves.begin("step_000002", {"step": 2})


def test_older_ones_are_kept_until_a_newer_one_is_complete(saves: _Saves, tmp_path: Path, gate: Path) -> None:
    folder = tmp_path / "phase"
    one_complete_one_begun(saves, gate)
    saves.poll()
    assert latest_checkpoint(folder) == folder / "step_000001", "the newer one is not complete"
    gate.touch()
    end = time.monotonic() + 30
    while latest_checkpoint(folder) != folder / "step_000002" and time.monotonic() < end:
        saves.poll()
        time.sleep(0.01)
    assert os.listdir(folder) == ["step_000002"]
    saves.begin("step_000003", {"step": 3})
    saves.begin("step_000004", {"step": 4})  # waits for the one before
    assert (folder / "step_000003" / RECORD).is_file()
    saves.wait()
    saves.finish(folder / "final", {"step": 5})
    assert os.listdir(folder) == ["final"]


def test_one_that_is_abandoned_leaves_the_older_one(saves: _Saves, tmp_path: Path, gate: Path) -> None:
    folder = tmp_path / "phase"
    one_complete_one_begun(saves, gate)
    saves.abandon()
    gate.touch()
    assert latest_checkpoint(folder) == folder / "step_000001"
    saves.begin("step_000002", {"step": 2})
    saves.wait()
    assert os.listdir(folder) == ["step_000002"]


def test_errors_of_the_background_reach_the_user(
    saves: _Saves, tmp_path: Path, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "force_to_disk", fail)
    gate.touch()
    saves.begin("step_000001", {"step": 1})
    with pytest.raises(UserError, match=r"step_000001: cannot be written: .*No space left on device"):
        saves.wait()
