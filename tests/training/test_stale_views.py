"""What a file system shows to other nodes may be older than what the main process sees: all go by the main process.

Two processes on one machine; the second one is a node that goes on believing what it has once seen: a file that was
not there (NFS keeps that answer for up to a minute), or an older listing (a folder of its own stands for it).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.config.runtime import CheckpointConfig
from ra3_megatron.em.infuse import infuse
from ra3_megatron.em.latent_stats import BlankTokens
from ra3_megatron.em.loop import EM
from ra3_megatron.mcore import checkpoint
from ra3_megatron.mcore.checkpoint_record import RECORD
from ra3_megatron.mcore.startup import Runtime, initialize
from ra3_megatron.report.held_out import figures_file
from ra3_megatron.report.run_folder import write_json
from ra3_megatron.text.transcript import Role, Transcript
from ra3_megatron.training.phases import Phase, _load_newest, finished
from tests.processes import run_processes

DOCUMENT = Transcript(
    np.arange(3, dtype=np.int32), np.full(3, Role.EXPERT, np.uint8), np.zeros(3, np.int32), np.ones(1, bool)
)


@contextmanager
def believing_what_was_absent() -> Iterator[None]:
    """Within it a file that this process has once found absent stays absent to it."""
    stat, read_text, absent = Path.stat, Path.read_text, set()

    def believing(function: Any) -> Any:
        def call(path: Path, *args: Any, **kwargs: Any) -> Any:
            if path in absent:
                raise FileNotFoundError(2, "No such file or directory", str(path))
            try:
                return function(path, *args, **kwargs)
            except FileNotFoundError:
                absent.add(path)
                raise

        return call

    Path.stat, Path.read_text = believing(stat), believing(read_text)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Path.stat, Path.read_text = stat, read_text  # type: ignore[method-assign]


def start() -> Runtime:
    return initialize(ParallelConfig(data=2, threads=1), seed=1, timeout_minutes=0.2)


def go_by_main(folder: Path) -> tuple[bool, bool, str]:
    """Whether two phases are done, and which checkpoint of the second one is loaded."""
    runtime = start()
    run: Any = SimpleNamespace(
        folder=SimpleNamespace(checkpoints=folder / ("seen" if runtime.is_main else "older")),
        config=SimpleNamespace(checkpoint=CheckpointConfig(keep=2)),
        runtime=runtime,
    )
    loaded: Any = lambda path, *rest: path.name  # noqa: E731
    checkpoint.load = loaded
    phases = Phase("estep", 1), Phase("mstep", 1)
    done = [finished(run, phase) for phase in phases]
    nothing: Any = None
    return done[0], done[1], str(_load_newest(run, run.folder.checkpoints / "mstep-1", nothing, nothing))


@pytest.mark.multiprocess
def test_phases_and_their_checkpoints(tmp_path: Path) -> None:
    """Else one process trains what is done to the others, or loads an older checkpoint than they do."""
    names = {"seen": ("estep-1/final", "mstep-1/step_000001", "mstep-1/step_000002"), "older": ("mstep-1/step_000001",)}
    for view, folders in names.items():
        for name in folders:
            (tmp_path / view / name).mkdir(parents=True)
            (tmp_path / view / name / RECORD).write_text("{}")
    assert run_processes(2, go_by_main, tmp_path) == [(True, False, "step_000002")] * 2


def evaluate_and_infuse(folder: Path) -> tuple[float, list[int], int]:
    """The ELBO of an evaluation; tokens of the chunks of an infusion, and its documents."""
    runtime = start()
    with nullcontext() if runtime.is_main else believing_what_was_absent():
        return _evaluate_and_infuse(folder, runtime)


def _evaluate_and_infuse(folder: Path, runtime: Runtime) -> tuple[float, list[int], int]:
    run = SimpleNamespace(runtime=runtime, folder=SimpleNamespace(path=folder))
    loop: Any = SimpleNamespace(run_context=run, config=None, _figures=lambda *which: EM._figures(loop, *which))
    path = figures_file(folder, "ntp", 1)
    assert not path.is_file()
    runtime.barrier()
    if runtime.is_main:
        write_json(path, {"arm": "ntp", "iteration": 1, "code_ce": 1.0, "raw_code_ce": 1.0, "elbo": -2.0})
    runtime.barrier()
    elbo = EM._read(loop, "ntp", 1)["elbo"]
    policy: Any = SimpleNamespace(
        sample=lambda originals, keys, group: originals, weight_version=DOCUMENT.weight_version
    )
    tokens: list[int] = []
    blank = BlankTokens(frozenset(), frozenset())
    corpus = infuse(
        policy, [DOCUMENT] * 600, (1,), folder / "infused", runtime, blank, lambda _, count: tokens.append(count)
    )
    return elbo, tokens, len(corpus)


@pytest.mark.multiprocess
def test_figures_and_infused_documents(tmp_path: Path) -> None:
    """Else a process misses what the main process has just written, and the run ends."""
    assert run_processes(2, evaluate_and_infuse, tmp_path) == [(-2.0, [3 * 512, 3 * 88], 600)] * 2
