"""The runner with a command of milliseconds: order, failures, what waits, skipping, kills, locks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from fake_cells import command_of, order, run_cells
from made_study import finish, make, study_of

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import load_config
from ra3_megatron.report.run_folder import write_text
from ra3_megatron.study import runner as runner_module
from ra3_megatron.study.plan import Cell, cells_of, resolve
from ra3_megatron.study.process import lock
from ra3_megatron.study.runner import Outcome, Runner
from ra3_megatron.study.spec import STUDY_FILE, dump_study
from ra3_megatron.study.state import failure_of, stage
from ra3_megatron.verbs.study import _checked


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_cells_run_in_order_and_leave_their_logs(tmp_path: Path) -> None:
    study = study_of(tmp_path, seeds=[1, 2], base={}, arms={"b": {"after": "a"}, "a": {}})
    outcomes = run_cells(study, tmp_path)
    names = ["base,seed=1", "a,seed=1", "b,seed=1", "base,seed=2", "a,seed=2", "b,seed=2"]
    assert order(tmp_path) == names
    assert [outcomes[name].status for name in names] == ["done"] * 6
    cell = study.path / "cells" / "a,seed=1"
    assert (cell / "log.txt").read_text() == "threads 4\n"
    assert "threads: 4" in (cell / "cell.yaml").read_text()


def test_what_is_done_is_skipped_and_never_touched(tmp_path: Path) -> None:
    study = study_of(tmp_path, arms={"a": {}, "b": {}})
    make(study, {}, without=("b,seed=1",))
    done = study.path / "cells" / "a,seed=1"
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    assert run_cells(study, tmp_path).keys() == {"b,seed=1"}
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*")} == before
    assert order(tmp_path) == ["b,seed=1"]
    assert run_cells(study, tmp_path) == {}


def test_a_failure_stops_only_what_waits_for_it(tmp_path: Path) -> None:
    arms = {"bad": {}, "b": {"after": "bad"}, "c": {"after": "b"}, "d": {}, "silent": {}}
    study = study_of(tmp_path, arms=arms)
    outcomes = run_cells(study, tmp_path)
    log = study.path / "cells" / "bad,seed=1" / "log.txt"
    assert outcomes["bad,seed=1"].status == "failed"
    assert outcomes["bad,seed=1"].reason == f"exit code 3: boom ({log})"
    assert (outcomes["b,seed=1"].status, outcomes["b,seed=1"].reason) == ("not run", "bad,seed=1 failed")
    assert (outcomes["c,seed=1"].status, outcomes["c,seed=1"].reason) == ("not run", "b,seed=1 was not run")
    assert outcomes["d,seed=1"].status == "done"
    assert outcomes["silent,seed=1"].reason.startswith("ended without a summary: threads 4")
    assert failure_of(log.parent) == "exit code 3: boom"
    assert not (study.path / "cells" / "b,seed=1").exists()


def test_a_signal_without_a_name_is_told_by_its_number(tmp_path: Path) -> None:
    outcomes = run_cells(study_of(tmp_path, arms={"real": {}, "b": {}}), tmp_path)
    assert outcomes["real,seed=1"].reason.startswith("killed by signal 40: ") and outcomes["b,seed=1"].status == "done"


@pytest.mark.parametrize("kind", [ValueError, UserError])
def test_what_cannot_be_reported_stops_no_cell(
    tmp_path: Path, kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_of(tmp_path, arms={"a": {}, "b": {}})
    cells = cells_of(study)

    def ended(cell: Cell, outcome: Outcome) -> None:
        if cell.arm == "a":
            raise kind("no figures\nmore")

    runner = Runner(study.path, cells, resolve(study, cells), 2, 2, command_of(tmp_path), ended)
    assert {outcome.status for outcome in runner.run(cells).values()} == {"done"}
    assert capsys.readouterr().err == "ra3: a,seed=1: cannot be reported: no figures\n"


def test_one_cell_alone_needs_what_it_waits_for(tmp_path: Path) -> None:
    study = study_of(tmp_path, arms={"a": {}, "b": {"after": "a"}})
    cells = cells_of(study)
    runner = Runner(study.path, cells, resolve(study, cells), 1, 1, command_of(tmp_path))
    assert runner.run(cells[1:])["b,seed=1"].reason == "a,seed=1 is not done"
    assert runner.run(cells[:1])["a,seed=1"].status == "done"
    assert runner.run(cells[1:])["b,seed=1"].status == "done"


def test_jobs_run_at_once_and_share_the_cores(tmp_path: Path) -> None:
    """Two cells that each wait for the other one's file end only when both run."""
    study = study_of(tmp_path, arms={"a": {}, "b": {}, "c": {}})
    cells = cells_of(study)
    meet = (
        'cell=$(dirname "$1"); touch "$cell/here"; for n in $(seq 400); do '
        '[ $(ls -d "$cell"/../*/here | wc -l) -ge 2 ] && break; sleep 0.01; done; '
        f'[ $n -lt 400 ] && cp {tmp_path}/prepared/summary.json "$cell/"; echo "$OMP_NUM_THREADS"'
    )
    command_of(tmp_path)
    runner = Runner(study.path, cells, resolve(study, cells), 2, 4, lambda file: ["sh", "-c", meet, "sh", str(file)])
    assert {outcome.status for outcome in runner.run(cells).values()} == {"done"}
    assert (study.path / "cells" / "b,seed=1" / "log.txt").read_text() == "2\n"


def test_equal_flops_are_set_when_the_other_cell_is_done(tmp_path: Path) -> None:
    study = study_of(tmp_path, arms={"a": {}, "b": {"equal_flops": "a", "settings": {"method": "ntp"}}})
    assert run_cells(study, tmp_path)["b,seed=1"].status == "done"
    # made phases cost 100 each: E-step, infusion and M-step of 4 steps are worth 12 steps
    assert "steps: 12\n" in (study.path / "cells" / "b,seed=1" / "config.yaml").read_text().partition("mstep:")[2]
    study = study.model_copy(update={"folder": str(tmp_path / "again")})
    (tmp_path / "prepared" / "summary.json").write_text('{"phases": {"mstep-1": {}}}')
    outcomes = run_cells(study, tmp_path)
    assert "phases.mstep-1.flops is missing" in outcomes["b,seed=1"].reason
    assert "a,seed=1/summary.json" in (failure_of(tmp_path / "again" / "cells" / "b,seed=1") or "")


def test_equal_flops_of_equal_flops_count_the_steps_that_were_run(tmp_path: Path) -> None:
    """a: 4 steps, FLOPs of 12; b: 12 steps; c, which has b's FLOPs: 12 steps too, and so it says when it goes on."""
    ntp = {"method": "ntp"}
    arms = {"a": {}, "b": {"equal_flops": "a", "settings": ntp}, "c": {"equal_flops": "b", "settings": ntp}}
    study = study_of(tmp_path, arms=arms)
    cells = cells_of(study)
    a, b, c = (cell.folder(study.path) for cell in cells)
    prepared = tmp_path / "prepared"
    command = command_of(tmp_path)
    finish(cells[1], tmp_path / "ntp", "ntp", 0.1)
    plain = (tmp_path / "ntp" / "summary.json").read_text()

    def of_method(file: Path) -> list[str]:
        if file.parent != a:
            (prepared / "summary.json").write_text(plain)
        return command(file)

    outcomes = Runner(study.path, cells, resolve(study, cells), 1, 1, of_method).run(cells)
    assert {outcome.status for outcome in outcomes.values()} == {"done"}
    steps = [load_config(folder / "config.yaml", [], resolved=True).mstep.steps for folder in (a, b, c)]
    assert steps == [4, 12, 12]
    write_text(study.path / STUDY_FILE, dump_study(study))
    _, configs = _checked(study)
    assert [configs[cell.name].mstep.steps for cell in cells] == steps


def start(folder: Path, *arms: str, jobs: int = 2) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("fake_cells.py")
    return subprocess.Popen([sys.executable, str(script), str(folder), str(jobs), *arms])


def pid_of(folder: Path, arm: str) -> int:
    file = folder / "out" / "cells" / f"{arm},seed=1" / "pid"
    until(lambda: file.is_file() and file.read_text().strip() != "")
    return int(file.read_text())


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_runner_ends_its_children_first(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, "slow1", "slow2")
    children = [pid_of(tmp_path, arm) for arm in ("slow1", "slow2")]
    process.send_signal(number)
    assert process.wait(60) == 130
    assert not any(alive(child) for child in children)
    assert len(list((tmp_path / "out" / "cells").glob("*/ended"))) == 2  # they had the time that they need
    assert failure_of(tmp_path / "out" / "cells" / "slow1,seed=1") is None


@pytest.mark.multiprocess
def test_a_killed_runner_leaves_no_writer_and_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path, "once", "after")
    child, cell = pid_of(tmp_path, "once"), tmp_path / "out" / "cells" / "once,seed=1"
    process.kill()
    process.wait()
    study = study_of(tmp_path, arms={"once": None, "after": None})
    outcomes = run_cells(study, tmp_path)  # at once: it waits for the lock that the old child holds
    assert not alive(child) and (cell / "ended").exists()
    ticks = (cell / "ticks").stat().st_size
    assert outcomes["once,seed=1"].status == "done" and stage(cell) == "done"
    assert order(tmp_path).count("once,seed=1") == 2 and order(tmp_path).count("after,seed=1") == 1
    assert (cell / "ticks").stat().st_size == ticks


def test_a_cell_that_another_process_works_on_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "PATIENCE", 0.05)
    study = study_of(tmp_path, arms={"a": {}, "b": {}})
    held = lock(study.path / "cells" / "a,seed=1")
    assert held is not None
    outcomes = run_cells(study, tmp_path)
    assert outcomes["a,seed=1"].reason == "another process is working on it: wait for it, or stop it"
    assert outcomes["b,seed=1"].status == "done"
    held.close()
    assert run_cells(study, tmp_path)["a,seed=1"].status == "done"


def test_a_cell_that_another_process_finishes_meanwhile_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tmp_path, arms={"a": {}, "b": {"after": "a"}})
    command_of(tmp_path)

    def finished_by_another(folder: Path, wait: float = 0.0) -> IO[bytes] | None:
        if folder.name == "a,seed=1":
            make(study, {}, without=("b,seed=1",))
        return lock(folder, wait)

    monkeypatch.setattr(runner_module, "lock", finished_by_another)
    outcomes = run_cells(study, tmp_path)
    assert (outcomes["a,seed=1"].status, outcomes["a,seed=1"].reason) == ("done", "by another process")
    assert outcomes["b,seed=1"].status == "done" and order(tmp_path) == ["b,seed=1"]
    again = lock(study.path / "cells" / "a,seed=1")
    assert again is not None, "its lock is given back"
    again.close()


@pytest.mark.multiprocess
@pytest.mark.parametrize("deaf", [True, False])
def test_processes_in_sessions_of_their_own_end_with_the_child(tmp_path: Path, deaf: bool) -> None:
    """As torch's launcher starts its workers. deaf: the child has to be killed; else its worker alone."""
    from ra3_megatron.study.process import Child, stop_all

    held = lock(tmp_path)
    assert held is not None
    worker = tmp_path / "worker"
    script = f"{'trap : TERM; ' if deaf else ''}setsid sleep 100 & echo $! > {worker}; while :; do sleep 0.05; done"
    child = Child(["sh", "-c", script], tmp_path / "log", held, 1)
    until(lambda: worker.is_file() and worker.read_text().strip() != "")
    pid = int(worker.read_text())
    until(lambda: os.getsid(pid) == pid)
    assert alive(pid)
    stop_all([child], 0.3)
    assert not alive(pid)


def test_a_child_that_ignores_the_signal_is_killed(tmp_path: Path) -> None:
    from ra3_megatron.study.process import Child, stop_all, wait_any

    held = lock(tmp_path)
    assert held is not None
    child = Child(["sh", "-c", "trap '' TERM; echo ready; sleep 60 & wait; sleep 60"], tmp_path / "log", held, 1)
    until(lambda: (tmp_path / "log").read_bytes() == b"ready\n")
    assert lock(tmp_path) is None
    assert wait_any([child], 0.05) == []
    begin = time.monotonic()
    stop_all([child], 0.2)
    assert 0.2 <= time.monotonic() - begin < 10
    until(lambda: (again := lock(tmp_path)) is not None and again.close() is None)
