"""Progress: bars, plain lines at their pace, silence elsewhere."""

import io

import pytest
from rich.console import Console

from ra3_megatron.report.progress import Progress


class Clock:
    """A clock that goes when it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), width=100, force_terminal=terminal, color_system=None)


def text(display: Progress) -> str:
    return display.console.file.getvalue()  # type: ignore[attr-defined]


def test_plain_lines_come_first_last_and_every_ten_seconds() -> None:
    clock = Clock()
    with Progress("plain", console(False), clock=clock) as display:
        task = display.task("warm start", total=100, unit="tokens")
        for step in range(100):
            clock.now += 0.5
            task.advance(1, units=4096, loss=3.25 - step / 100)
    lines = text(display).splitlines()
    assert lines[0] == "warm start  1/100  8.19k tokens/s  0:50 left  loss 3.250"
    assert lines[1] == "warm start  21/100  8.19k tokens/s  0:40 left  loss 3.050"
    assert lines[-1] == "warm start  100/100  8.19k tokens/s  in 0:50  loss 2.260"
    assert len(lines) == 6


def test_resumed_task_counts_its_rate_from_its_own_steps() -> None:
    clock = Clock()
    display = Progress("plain", console(False), clock=clock)
    task = display.task("M-step", total=50, done=40)
    clock.now += 2
    task.advance(1)
    assert task.rate == 0.5
    assert task.seconds_left == 18
    assert text(display) == "M-step  41/50  0.5 steps/s  0:18 left\n"


def test_task_without_total_ends_by_close_once() -> None:
    clock = Clock()
    display = Progress("plain", console(False), clock=clock)
    with display.task("reading", unit="documents") as task:
        clock.now += 4
        task.advance(3, units=30)
    task.close()
    clock.now += 100
    assert text(display).splitlines() == ["reading  3  7.5 documents/s", "reading  3  7.5 documents/s  in 0:04"]


def test_auto_is_bars_on_a_terminal_and_lines_elsewhere() -> None:
    assert Progress("auto", console(True)).kind == "bar"
    assert Progress("auto", console(False)).kind == "plain"


def test_bars_show_steps_rate_and_figures() -> None:
    with Progress("bar", console(True)) as display:
        task = display.task("E-step [1]", total=2, unit="documents")
        display.message("a monitor [fired]")
        task.advance(1, units=16, reward=-1.5)
        task.advance(1, units=16, reward=-1.25)
    shown = text(display)
    assert "E-step [1]" in shown
    assert "a monitor [fired]" in shown
    assert "2/2" in shown
    assert "documents/s" in shown
    assert "reward -1.250" in shown


@pytest.mark.parametrize(("kind", "enabled"), [("off", True), ("bar", False), ("plain", False), ("auto", False)])
def test_silent(kind: str, enabled: bool) -> None:
    with Progress(kind, console(True), enabled=enabled) as display:  # type: ignore[arg-type]
        display.message("nothing")
        with display.task("x", total=1) as task:
            task.advance(1, loss=1.0)
        assert text(display) == ""
        display.message("stopped by SIGUSR1: saved", always=True)
    assert text(display) == ("stopped by SIGUSR1: saved\n" if enabled else "")
