"""Saving in the background: the checkpoint holds what was there at the call, whatever happens while it is written.

Not covered: the copy from a GPU to the host (it is Megatron's, and happens before the writer is forked).
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.mcore import checkpoint
from ra3_megatron.mcore.checkpoint_record import RECORD, read_record
from ra3_megatron.mcore.startup import Runtime, initialize
from tests.mcore.small_models import MODEL, build, make_trainer, weights
from tests.mcore.test_distributed_checkpoint import BF16, assert_identical, stored, train
from tests.processes import ProcessesFailed, run_processes

# isort: split
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

SINGLE = ParallelConfig(threads=1)
DISTRIBUTED = ParallelConfig(distributed_optimizer=True, threads=1)
TP2_DISTRIBUTED = ParallelConfig(tensor=2, distributed_optimizer=True, threads=1)
STEPS = 6
_write = FileSystemWriterAsync.write_preloaded_data


def slow_down(gate: Path) -> None:
    """Writers of this process wait until the file `gate` exists (a minute at most).

    Background ones are in sessions of their own, so they survive their parent. `gate.waiting` tells that one waits,
    `gate.ended` that one has done what it could.
    """

    parent = os.getpid()

    def write(*args: Any, **kwargs: Any) -> None:
        if os.getpid() != parent:
            os.setsid()
        gate.with_suffix(".waiting").touch()
        end = time.monotonic() + 60
        while not gate.exists() and time.monotonic() < end:
            time.sleep(0.01)
        _write(*args, **kwargs)
        gate.with_suffix(".ended").touch()

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write)


def checkpoints(folder: Path) -> list[str]:
    """Folders of checkpoints, whole or not."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("gate"))


@pytest.fixture
def gate(tmp_path: Path) -> Any:
    path = tmp_path / "gate"
    slow_down(path)
    yield path
    FileSystemWriterAsync.write_preloaded_data = staticmethod(_write)


@pytest.mark.parametrize("model", [MODEL, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("parallel", [SINGLE, DISTRIBUTED], ids=["replicated", "distributed"])
def test_it_holds_what_was_there_at_the_call(
    runtime: Runtime, tmp_path: Path, gate: Path, parallel: ParallelConfig, model: Any
) -> None:
    """Bit for bit, although every weight and moment changes right after it and is trained on while it is written."""
    trainer = make_trainer(parallel, runtime, STEPS, model)
    train(trainer, runtime, 0, 2)
    gate.touch()
    checkpoint.save(tmp_path / "synchronous", trainer.model, runtime, {"step": 2}, trainer)
    gate.unlink()
    pending = checkpoint.begin(tmp_path / "background", trainer.model, runtime, {"step": 2}, trainer, background=True)
    with torch.no_grad():
        moments = [state["exp_avg"] for _, state in trainer.optimizer.state.items()]
        assert moments
        for tensor in [*trainer.model.parameters(), *moments]:
            tensor.mul_(1.5)
    for step in range(2, 5):
        train(trainer, runtime, step, step + 1)
        assert not pending.poll()
    assert not (tmp_path / "background").exists()
    gate.touch()
    pending.wait()
    assert pending.poll()
    found, expected = stored(tmp_path / "background"), stored(tmp_path / "synchronous")
    assert_identical(found, expected)
    records = [json.loads((tmp_path / name / RECORD).read_text()) for name in ("background", "synchronous")]
    for record in records:
        record.pop("files")["__0_0.distcp"]
    assert records[0] == records[1]
    data = [(tmp_path / name / "__0_0.distcp").read_bytes() for name in ("background", "synchronous")]
    assert data[0] == data[1]
    other = make_trainer(parallel, runtime, STEPS, model)
    checkpoint.load(tmp_path / "background", other.model, runtime, other, verify=True)
    assert checkpoints(tmp_path) == ["background", "synchronous"]


def test_shared_memory_is_copied(runtime: Runtime, tmp_path: Path, gate: Path) -> None:
    """A forked process would see later values there."""
    model = build(SINGLE, runtime)
    model.share_memory()
    expected = weights(model, runtime)
    pending = checkpoint.begin(tmp_path / "saved", model, runtime, {}, background=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    gate.touch()
    pending.wait()
    other = build(SINGLE, runtime, seed=9)
    checkpoint.load(tmp_path / "saved", other, runtime)
    assert_identical(weights(other, runtime), expected)


def test_polling_completes_it(runtime: Runtime, tmp_path: Path) -> None:
    pending = checkpoint.begin(tmp_path / "saved", build(SINGLE, runtime), runtime, {"step": 4}, background=True)
    end = time.monotonic() + 30
    while not pending.poll() and time.monotonic() < end:
        time.sleep(0.01)
    assert read_record(tmp_path / "saved")["step"] == 4
    pending.wait()
    pending.abandon()
    assert os.listdir(tmp_path) == ["saved"]


def test_an_abandoned_one_stays_absent(runtime: Runtime, tmp_path: Path, gate: Path) -> None:
    model = build(SINGLE, runtime)
    pending = checkpoint.begin(tmp_path / "saved", model, runtime, {}, background=True)
    pending.abandon()
    pending.wait()
    gate.touch()
    assert not (tmp_path / "saved").exists()
    checkpoint.save(tmp_path / "saved", model, runtime, {})
    assert checkpoints(tmp_path) == ["saved"]


# -- trouble ----------------------------------------------------------------------------------------------------------


def test_errors_of_the_writer_are_raised(runtime: Runtime, tmp_path: Path) -> None:
    """And the next save is not disturbed by them."""
    model = build(SINGLE, runtime)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        pending = checkpoint.begin(tmp_path / "bad", model, runtime, {}, background=True)
        with pytest.raises(checkpoint.CheckpointWriteError, match=r"bad: cannot be written: .*earlier checkpoints are"):
            pending.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []
    checkpoint.save(tmp_path / "good", model, runtime, {})
    checkpoint.load(tmp_path / "good", model, runtime, verify=True)


def test_a_writer_that_cannot_be_forked_is_an_error(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the machine has no memory left for the pages of a second process."""

    def refuse(self: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    model = build(SINGLE, runtime)
    checkpoint.save(tmp_path / "good", model, runtime, {})
    before = set(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(multiprocessing.get_context("fork").Process, "start", refuse)
        with pytest.raises(
            checkpoint.CheckpointWriteError, match=r"bad: cannot be written: OSError: .*Cannot allocate"
        ):
            checkpoint.begin(tmp_path / "bad", model, runtime, {}, background=True)
    assert set(os.listdir("/proc/self/fd")) <= before
    assert checkpoints(tmp_path) == ["good"]
    checkpoint.begin(tmp_path / "next", model, runtime, {}, background=True).wait()
    assert checkpoints(tmp_path) == ["good", "next"]


def test_a_writer_that_dies_is_an_error(runtime: Runtime, tmp_path: Path, gate: Path) -> None:
    pending = checkpoint.begin(tmp_path / "bad", build(SINGLE, runtime), runtime, {}, background=True)
    os.kill(pending._writer._process.pid, signal.SIGKILL)
    gate.touch()
    with pytest.raises(checkpoint.CheckpointWriteError, match=r"the writing process died \(exit code -9\)"):
        pending.wait()
    assert checkpoints(tmp_path) == []


def kill_while_writing(folder: Path, gate: Path) -> None:
    runtime = initialize(SINGLE, seed=1)
    trainer = make_trainer(SINGLE, runtime, STEPS)
    train(trainer, runtime, 0, 1)
    checkpoint.save(folder / "step-1", trainer.model, runtime, {"step": 1}, trainer)
    train(trainer, runtime, 50, 51)  # other numbers than those of the run that goes on
    slow_down(gate)
    pending = checkpoint.begin(folder / "step-2", trainer.model, runtime, {"step": 2}, trainer, background=True)
    train(trainer, runtime, 51, 52)
    while not gate.with_suffix(".waiting").exists():
        assert not pending.poll()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.multiprocess
def test_killed_while_writing(runtime: Runtime, tmp_path: Path) -> None:
    """The older checkpoint is there and loads; a writer that lives on does not disturb the next save."""
    folder, gate = tmp_path / "checkpoints", tmp_path / "gate"
    with pytest.raises(ProcessesFailed, match="exit code -9"):
        run_processes(1, kill_while_writing, folder, gate)
    older, unfinished = sorted(os.listdir(folder))
    assert older == "step-1" and unfinished.startswith("step-2.") and unfinished.endswith(".partial")
    trainer = make_trainer(SINGLE, runtime, STEPS)
    assert checkpoint.load(folder / "step-1", trainer.model, runtime, trainer, verify=True)["step"] == 1
    train(trainer, runtime, 1, 2)
    expected = weights(trainer.model, runtime)
    pending = checkpoint.begin(folder / "step-2", trainer.model, runtime, {"step": 2}, trainer, background=True)
    end = time.monotonic() + 30
    while not pending._writer.is_done() and time.monotonic() < end:
        time.sleep(0.01)
    gate.touch()  # the writer of the killed run writes only now, before the new checkpoint has its name
    while not gate.with_suffix(".ended").exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert gate.with_suffix(".ended").exists()
    pending.wait()
    train(trainer, runtime, 2, 3)
    checkpoint.load(folder / "step-2", trainer.model, runtime, trainer, verify=True)
    assert_identical(weights(trainer.model, runtime), expected)
    assert sorted(os.listdir(folder)) == ["step-1", "step-2"]


def in_two_processes(folder: Path) -> tuple[Any, str]:
    runtime = initialize(TP2_DISTRIBUTED, seed=1)
    trainer = make_trainer(TP2_DISTRIBUTED, runtime, STEPS)
    train(trainer, runtime, 0, 2)
    checkpoint.save(folder / "synchronous", trainer.model, runtime, {}, trainer)
    gate = folder / "gate"
    if runtime.rank == 1:
        slow_down(gate)
    pending = checkpoint.begin(folder / "background", trainer.model, runtime, {}, trainer, background=True)
    for step in range(2, 5):  # rank 0 has written its part after the first of them
        train(trainer, runtime, step, step + 1)
        assert not pending.poll(), "complete although one process still writes"
    gate.touch()
    polls = 0
    while not pending.poll():
        polls += 1
        time.sleep(0.02)
    record = read_record(folder / "background")  # on every process at the same poll
    assert {"__0_0.distcp", "__1_0.distcp"} <= record["files"].keys()
    # one process cannot write: all hear of it
    if runtime.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    pending = checkpoint.begin(folder / "bad", trainer.model, runtime, {}, trainer, background=True)
    with pytest.raises(checkpoint.CheckpointWriteError) as caught:
        pending.wait()
    return polls, str(caught.value)


@pytest.mark.multiprocess
def test_two_processes_agree(runtime: Runtime, tmp_path: Path) -> None:
    first, second = run_processes(2, in_two_processes, tmp_path)
    assert first == second and "bad: cannot be written" in first[1]
    assert_identical(stored(tmp_path / "background"), stored(tmp_path / "synchronous"))
    assert checkpoints(tmp_path) == ["background", "synchronous"]
