"""Runs the cells of a study on this machine: several at once, each when what it waits for is done.

Invariants: a cell that is done is never touched; a cell that fails stops only those that wait for it; when the runner
is stopped it stops its children and waits for them; one thread does everything, so that the children's parent is alive
as long as the runner.
"""

import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.study.corpora import share_corpus
from ra3_megatron.study.flops import with_equal_flops
from ra3_megatron.study.plan import Cell
from ra3_megatron.study.process import Child, lock, stop_all, wait_any
from ra3_megatron.study.state import LOG, last_line, prepare, record_failure, stage, with_threads

Command = Callable[[Path], Sequence[str]]
"""From the file of a cell to the command that runs it."""

PATIENCE = 30.0
"""Seconds that stopped children have to end, and that an earlier study's child has to leave its cell."""


def train_command(file: Path) -> list[str]:
    """`ra3 train` of one cell."""
    return [sys.executable, "-m", "ra3_megatron", "train", str(file), "--resume"]


def rlvr_command(file: Path) -> list[str]:
    """`ra3 rlvr` of one cell."""
    return [sys.executable, "-m", "ra3_megatron", "rlvr", str(file), "--resume"]


@dataclass(frozen=True)
class Outcome:
    """What became of a cell in this call."""

    status: Literal["done", "failed", "not run"]
    reason: str = ""
    """Why it failed, or was not run; of one that is done, who did it if not this runner."""
    seconds: float = 0.0
    """Time it took."""


@dataclass
class Runner:
    """Runs `wanted` cells of a study in `folder`, at most `jobs` at once."""

    folder: Path
    cells: Sequence[Cell]
    """All cells of the study."""
    configs: Mapping[str, RunConfig]
    """Their configurations by name."""
    jobs: int
    """Cells at once."""
    cores: int
    """Cores that they share."""
    command: Command = train_command
    """What runs a cell."""
    ended: Callable[[Cell, Outcome], None] = lambda cell, outcome: None
    """Told of each cell that ended, or will not run. What it raises of UserError and ValueError stops no cell."""

    def run(self, wanted: Sequence[Cell]) -> dict[str, Outcome]:
        """Run what is not done; the outcome of every wanted cell that was not done before, by name.

        Interrupted (SIGINT, SIGTERM), it ends its children and raises KeyboardInterrupt.
        """
        waiting = [cell for cell in wanted if stage(cell.folder(self.folder)) != "done"]
        outcomes: dict[str, Outcome] = {}
        running: dict[Child, Cell] = {}

        def end(cell: Cell, outcome: Outcome) -> None:
            outcomes[cell.name] = outcome
            try:
                self.ended(cell, outcome)
            except (UserError, ValueError) as error:  # of what it reports; other cells go on
                sys.stderr.write(f"ra3: {cell.name}: cannot be reported: {_first_line(error)}\n")

        with _terminable():
            try:
                while waiting or running:
                    for cell in list(waiting):
                        if reason := self._hopeless(cell, outcomes, waiting, running):
                            waiting.remove(cell)
                            end(cell, Outcome("not run", reason))
                    for cell in [c for c in waiting if self._ready(c)][: self.jobs - len(running)]:
                        waiting.remove(cell)
                        try:
                            begun = self._start(cell)
                        except UserError as error:
                            end(cell, Outcome("failed", _first_line(error)))
                            continue
                        if begun is None:
                            end(cell, Outcome("done", "by another process"))
                        else:
                            running[begun] = cell
                    for child in wait_any(list(running)) if running else []:
                        cell = running.pop(child)
                        end(cell, self._outcome(cell, child))
            except BaseException:
                with _uninterrupted():
                    stop_all(list(running), PATIENCE)
                raise
        return outcomes

    def _ready(self, cell: Cell) -> bool:
        return all(self._done(name) for name in cell.after)

    def _done(self, name: str) -> bool:
        return stage(self._cell(name).folder(self.folder)) == "done"

    def _cell(self, name: str) -> Cell:
        return next(cell for cell in self.cells if cell.name == name)

    def _hopeless(
        self, cell: Cell, outcomes: Mapping[str, Outcome], waiting: Sequence[Cell], running: Mapping[Child, Cell]
    ) -> str:
        """Why a cell can never start; "" when it may."""
        for name in cell.after:
            if name in outcomes and outcomes[name].status != "done":
                return f"{name} {'failed' if outcomes[name].status == 'failed' else 'was not run'}"
            coming = any(other.name == name for other in [*waiting, *running.values()])
            if not coming and not self._done(name):
                return f"{name} is not done"
        return ""

    def _start(self, cell: Cell) -> Child | None:
        """Start a cell; None when it is done by now: whoever had its lock has finished it."""
        folder, config = cell.folder(self.folder), self.configs[cell.name]
        held = lock(folder, PATIENCE)
        if held is None:
            raise UserError("another process is working on it: wait for it, or stop it")
        try:
            if stage(folder) == "done":
                held.close()
                return None
            if cell.equal_flops is not None:
                try:
                    config = with_equal_flops(config, self._cell(cell.equal_flops).folder(self.folder))
                except UserError as error:
                    record_failure(folder, str(error), None)
                    raise
            threads = max(1, self.cores // (self.jobs * config.parallel.world_size))
            file = prepare(folder, with_threads(config, threads))
            share_corpus(folder, config, [other.folder(self.folder) for other in self.cells])
        except BaseException:
            held.close()
            raise
        return Child(self.command(file), folder / LOG, held, threads)

    def _outcome(self, cell: Cell, child: Child) -> Outcome:
        seconds, code, folder = child.seconds, child.result(), cell.folder(self.folder)
        if code == 0 and stage(folder) == "done":
            return Outcome("done", seconds=seconds)
        said = last_line(folder / LOG)
        how = f"killed by {_signal_name(-code)}" if code < 0 else f"exit code {code}"
        if code == 0:
            how = "ended without a summary"
        record_failure(folder, f"{how}: {said}", code)
        return Outcome("failed", f"{how}: {said} ({folder / LOG})", seconds)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _signal_name(number: int) -> str:
    """SIGKILL, say; most real-time signals have no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM interrupts like Ctrl-C."""
    with _handler(signal.SIGTERM, _interrupt):
        yield


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def _uninterrupted() -> Iterator[None]:
    with _handler(signal.SIGTERM, signal.SIG_IGN), _handler(signal.SIGINT, signal.SIG_IGN):
        yield


@contextmanager
def _handler(number: int, action: Any) -> Iterator[None]:
    before = signal.signal(number, action)
    try:
        yield
    finally:
        signal.signal(number, before)
