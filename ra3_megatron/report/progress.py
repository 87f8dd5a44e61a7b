"""Progress of a run for people: bars on a terminal, plain lines elsewhere, nothing on other processes.

Metrics are not progress: everything shown here is also in `metrics.jsonl`.
"""

import time
from collections.abc import Callable
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.progress import Task as BarTask
from rich.table import Column
from rich.text import Text

from ra3_megatron.report.numbers import clock as clock_text
from ra3_megatron.report.numbers import count, number

Kind = Literal["auto", "bar", "plain", "off"]

PLAIN_INTERVAL = 10.0
"""Seconds between two plain lines of one task (its first and last step always get one)."""


class Progress:
    """The display of a run, as a context; `kind` is `logging.progress` of the configuration.

    Only the process with `enabled` shows anything (global rank 0); the others call the same methods for nothing.
    """

    def __init__(
        self,
        kind: Kind = "auto",
        console: Console | None = None,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console()
        self._clock = clock
        self._enabled = enabled
        if not enabled:
            kind = "off"
        elif kind == "auto":
            kind = "bar" if self.console.is_terminal else "plain"
        self.kind: Literal["bar", "plain", "off"] = kind
        self._bars = _bars(self.console) if kind == "bar" else None

    def __enter__(self) -> "Progress":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def task(self, name: str, total: int | None = None, unit: str = "steps", done: int = 0) -> "Task":
        """A new line of work: `total` steps (None: not known) of which `done` are behind it (a resumed run).

        `unit` names what `Task.advance` counts in `units`, for the rate: tokens, documents, …
        """
        return Task(self, name, total, unit, done, self._clock)

    def message(self, text: str, style: str = "", always: bool = False) -> None:
        """A line above the bars, or a plain line: a phase that starts, a monitor that fired.

        always: with `logging.progress=off`, too.
        """
        if self.kind != "off" or (always and self._enabled):
            self.console.print(text, style=style or None, markup=False, highlight=False, soft_wrap=True)


class Task:
    """One line of work. `advance` it after each step; `close` it when it ends before its total."""

    def __init__(
        self, progress: Progress, name: str, total: int | None, unit: str, done: int, clock: Callable[[], float]
    ) -> None:
        self._progress = progress
        self._name = name
        self._total = total
        self._unit = unit
        self._done = done
        self._units = 0
        self._steps = 0
        self._clock = clock
        self._started = clock()
        self._stopped: float | None = None
        self._shown_at = -float("inf")
        self._figures = ""
        self._last_line = ""
        self._bar: TaskID | None = None
        if progress._bars is not None:
            self._bar = progress._bars.add_task(
                name, total=total, completed=done, steps=self._steps_text(), rate="", left="", figures=""
            )

    def advance(self, steps: int = 1, units: int = 0, **figures: float | int | str) -> None:
        """`steps` more steps are done, in which `units` units were processed; `figures` are shown behind them."""
        self._done += steps
        self._steps += steps
        self._units += units
        if figures:
            self._figures = "  ".join(f"{name} {_figure(value)}" for name, value in figures.items())
        if self._total is not None and self._done >= self._total:
            self.close()
        else:
            self._show(last=False)

    def close(self) -> None:
        """Stop the clock and show the last state; safe to call twice."""
        if self._stopped is None:
            self._stopped = self._clock()
            self._show(last=True)

    def __enter__(self) -> "Task":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def rate(self) -> float | None:
        """Units (steps, when no units were counted) per second since the task began; None before the first step."""
        elapsed = self._elapsed
        return (self._units or self._steps) / elapsed if self._steps and elapsed > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Time left at the pace so far; None when it is not known."""
        if self._total is None or not self._steps:
            return None
        return max(0.0, (self._total - self._done) * self._elapsed / self._steps)

    @property
    def _elapsed(self) -> float:
        return (self._clock() if self._stopped is None else self._stopped) - self._started

    def _show(self, last: bool) -> None:
        bars = self._progress._bars
        if bars is not None and self._bar is not None:
            bars.update(
                self._bar,
                completed=self._done,
                steps=self._steps_text(),
                rate=self._rate_text(),
                left=self._left_text(),
                figures=self._figures,
            )
            if last:
                bars.stop_task(self._bar)
        elif self._progress.kind == "plain":
            self._show_plain(last)

    def _show_plain(self, last: bool) -> None:
        now = self._clock()
        if not last and now - self._shown_at < PLAIN_INTERVAL:
            return
        self._shown_at = now
        parts = [self._name, self._steps_text(), self._rate_text(), self._left_text(), self._figures]
        line = "  ".join(part for part in parts if part)
        if line != self._last_line:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._last_line = line

    def _steps_text(self) -> str:
        return f"{self._done}" if self._total is None else f"{self._done}/{self._total}"

    def _rate_text(self) -> str:
        if self.rate is None:
            return ""
        return f"{count(self.rate)} {self._unit if self._units else 'steps'}/s"

    def _left_text(self) -> str:
        if self._stopped is not None:
            return f"in {clock_text(self._elapsed)}"
        return "" if self.seconds_left is None else f"{clock_text(self.seconds_left)} left"


class _Figures(ProgressColumn):
    """The figures of a task; what a narrow terminal has no room for is cut, so that a task stays one line."""

    def render(self, task: BarTask) -> Text:
        return Text(task.fields["figures"], style="dim", no_wrap=True, overflow="ellipsis")


def _bars(console: Console) -> RichProgress:
    def text(field: str, style: str) -> TextColumn:
        return TextColumn(f"{{task.{field}}}", style=style, markup=False, table_column=Column(no_wrap=True))

    return RichProgress(
        text("description", "bold"),
        BarColumn(bar_width=20 if console.width >= 100 else 8, table_column=Column(min_width=8, no_wrap=True)),
        text("fields[steps]", "progress.percentage"),
        text("fields[rate]", "cyan"),
        text("fields[left]", "green"),
        _Figures(),
        console=console,
        refresh_per_second=4,
    )


def _figure(value: float | int | str) -> str:
    return value if isinstance(value, str) else number(value)


def bytes_progress(progress: Progress, name: str) -> Callable[[int], Callable[[int], None]]:
    """Shows work that is counted in bytes as megabytes: call it with the total, and what it gives with each part."""

    def start(total: int) -> Callable[[int], None]:
        return _Megabytes(progress.task(name, total=-(-total // 10**6), unit="B"), total)

    return start


class _Megabytes:
    """Counts bytes, shows megabytes."""

    def __init__(self, task: Task, total: int) -> None:
        self._task, self._total = task, total
        self._done = self._shown = 0

    def __call__(self, count: int) -> None:
        self._done += count
        now = -(-self._done // 10**6) if self._done == self._total else self._done // 10**6
        self._task.advance(now - self._shown, units=count)
        self._shown = now
