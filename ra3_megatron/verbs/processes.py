"""Processes of a layout: started through torchrun, unless torchrun or srun started this one already.

A module that runs in them ends in `sys.exit(in_process(function))`. A UserError (or another of `SAID`) in one of them
is written to a file and raised again by the process that started them, so that it is shown once. None of them outlives
that process.
"""

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ra3_megatron.config.errors import HUNG, STOPPED, UNAVAILABLE, StoppedBySignal, Unavailable, UserError
from ra3_megatron.config.load import dump_config, load_config
from ra3_megatron.config.run import RunConfig
from ra3_megatron.report.run_folder import write_text
from ra3_megatron.text.lifetime import end_with

if TYPE_CHECKING:
    from ra3_megatron.mcore.startup import Runtime

SAID: dict[str, tuple[type[Exception], int]] = {
    "stopped": (StoppedBySignal, STOPPED),
    "error": (UserError, 2),
    "unavailable": (Unavailable, UNAVAILABLE),
}
"""Name of the file, exception and exit code of the process, the one that explains most first."""

_STARTER = "starter"
"""File with the number of the process that started the others."""


def runs_here(config: RunConfig) -> bool:
    """Whether this process is one of the layout's: torchrun or srun started it, or the layout needs no other."""
    from ra3_megatron.mcore.launch import launched

    return launched() or config.parallel.world_size == 1


def start_processes(config: RunConfig, module: str, *arguments: str) -> int:
    """Run `python -m module CONFIG FOLDER [ARGUMENT …]` in the processes that the layout needs; returns the exit code.

    Raises UserError, Unavailable or StoppedBySignal when one of them did, KeyboardInterrupt when this process got
    SIGINT.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # processes speak for themselves
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "config.yaml", dump_config(config))
        write_text(folder / _STARTER, str(os.getpid()))
        layout = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=config.parallel.world_size,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            signals_to_handle="SIGINT,SIGHUP,SIGQUIT",  # not SIGTERM, which is passed on
        )
        command = ["-m", module, str(folder / "config.yaml"), str(folder), *arguments]
        try:
            with _signals_passed_on() as passed:
                elastic_launch(layout, sys.executable)(*command)
        except SignalException as stop:  # it ended them
            if stop.sigval is signal.SIGINT:
                raise KeyboardInterrupt from stop
            return 128 + stop.sigval
        except ChildFailedError as failure:
            for name, (kind, _) in SAID.items():
                files = sorted(folder.glob(f"{name}.*"))
                if files:
                    raise kind(files[0].read_text(encoding="utf-8")) from failure
            codes = {each.exitcode for each in failure.failures.values()}
            if HUNG in codes:
                return HUNG
            return next((128 + number for number in passed if -number in codes), 1)  # it came before they listened
        return 0


def in_process(function: Callable[[RunConfig, list[str]], None]) -> int:
    """Call `function(config, arguments)` in one of the processes of `start_processes`; returns the exit code."""
    file, errors, *arguments = sys.argv[1:]
    end_with(int((Path(errors) / _STARTER).read_text()))
    try:
        function(load_config(Path(file), [], resolved=True), arguments)
    except tuple(kind for kind, _ in SAID.values()) as said:
        name, code = next((name, code) for name, (kind, code) in SAID.items() if isinstance(said, kind))
        write_text(Path(errors) / f"{name}.{int(os.environ['RANK']):06d}", str(said))
        return code
    except KeyboardInterrupt:  # the process that started this one says it
        return 130
    return 0


@contextmanager
def process_group(config: RunConfig) -> "Iterator[Runtime]":
    """This process as one of those of the layout, until it leaves them."""
    # imported here: they load torch and Megatron-Core
    import ra3_megatron.mcore  # noqa: F401
    from ra3_megatron.mcore import startup
    from ra3_megatron.mcore.watchdog import group_minutes

    minutes = group_minutes(config.watchdog.timeout_minutes)
    runtime = startup.initialize(config.parallel, config.seed, minutes, advice=config.layout_advice)
    try:
        yield runtime
    finally:
        startup.shutdown()


@contextmanager
def _signals_passed_on() -> Iterator[list[int]]:
    """Within it, what asks a run to save and stop, or to show its stacks (SIGUSR2), goes to the processes of the
    layout, and to nobody else; the signals that did. What asks to stop before there are any ends the start."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    from ra3_megatron.mcore.stopping import SIGNALS

    passed: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        children = psutil.Process().children(recursive=False)
        if not children and number in SIGNALS:
            raise SignalException("no process has been started", signal.Signals(number))
        passed.append(number)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (*SIGNALS, signal.SIGUSR2)}
    try:
        yield passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def on_main(runtime: "Runtime", action: Callable[[], object]) -> None:
    """Run `action`, which may take hours, on the main process; its UserError or Unavailable is raised on
    every process."""

    def alone() -> None:  # what it returns stays there
        action()

    runtime.on_main(alone)
