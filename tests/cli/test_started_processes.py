"""The processes of a layout and the one that started them: signals, and none is left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

WORK = """
import os, signal, sys, time
from pathlib import Path
from ra3_megatron.config.errors import StoppedBySignal
from ra3_megatron.verbs.processes import in_process

def work(config, arguments):
    def stop(number, frame):
        raise StoppedBySignal(f"stopped by {signal.Signals(number).name}")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGUSR1, stop)
    Path(arguments[0], os.environ["RANK"]).touch()
    time.sleep(600)

sys.exit(in_process(work))
"""
START = """
import sys
import typer
from ra3_megatron.cli import _Verbs
from ra3_megatron.config.run import RunConfig
from ra3_megatron.verbs.processes import start_processes

app = typer.Typer(cls=_Verbs, pretty_exceptions_enable=False)

@app.command()
def start():
    config = RunConfig.model_validate({"parallel": {"data": 2}})
    raise typer.Exit(start_processes(config, "work", sys.argv[1]))

@app.command()
def another():  # one command alone would make no group
    pass

app(["start"])
"""

BEFORE = """
import signal
import torch.distributed.launcher.api as api

api.elastic_launch = lambda *layout: lambda *command: signal.raise_signal(signal.SIGTERM)
"""


def environment(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": f"{Path(__file__).parents[2]}:{folder}", "PATH": "/usr/bin:/bin"}


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[psutil.Popen, list[psutil.Process]]]:
    """A process with the two that it started, which are at work."""
    (tmp_path / "work.py").write_text(WORK)
    process = psutil.Popen(
        [sys.executable, "-c", START, str(tmp_path)], env=environment(tmp_path), stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 120
    while not all((tmp_path / rank).exists() for rank in "01"):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    children = process.children()
    assert len(children) == 2
    yield process, children
    for each in (process, *children):
        if each.is_running():
            each.kill()
    process.wait()


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGTERM, 75, "ra3: stopped by SIGTERM; the same command with --resume goes on\n"),
        (signal.SIGINT, 130, "ra3: interrupted\n"),
        (signal.SIGHUP, 128 + signal.SIGHUP, ""),
        (signal.SIGUSR2, 128 + signal.SIGUSR2, ""),  # which they do not listen to, as to none while they start
        (signal.SIGKILL, -signal.SIGKILL, ""),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "",
)
def test_a_signal_ends_all(
    number: signal.Signals, code: int, said: str, started: tuple[psutil.Popen, list[psutil.Process]]
) -> None:
    process, children = started
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (code, said)
    _, left = psutil.wait_procs(children, timeout=10)
    assert not left


def test_a_signal_before_there_are_processes_ends_the_start(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BEFORE + START, str(tmp_path)]
    ended = subprocess.run(command, env=environment(tmp_path), stderr=subprocess.PIPE, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGTERM, "")
