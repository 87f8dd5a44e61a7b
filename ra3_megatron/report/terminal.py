"""The summary of a run on a terminal: arms side by side, speed of the phases, monitors, infused snippets."""

from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from ra3_megatron.report.numbers import ABSENT, count, duration, number, percent
from ra3_megatron.report.snippets import thought_spans
from ra3_megatron.report.summary import Arm, Monitor, Phase, Summary

THOUGHT_STYLE = "bold yellow"


def print_summary(summary: Summary, console: Console | None = None, run_dir: Path | str | None = None) -> None:
    """Print the tables, the monitors that fired, the snippets and, when given, the run folder."""
    console = console or Console()
    console.print()
    console.print(arms_table(summary.arms))
    if summary.phases:
        console.print()
        console.print(phases_table(summary.phases))
    for monitor in summary.monitors:
        console.print()
        console.print(_monitor(monitor))
    for index, snippet in enumerate(summary.snippets, start=1):
        console.print()
        console.print(Rule(f"infused snippet {index} of {len(summary.snippets)}", style="dim", align="left"))
        console.print(Padding(snippet_text(snippet), (0, 0, 0, 2), expand=False))
    if run_dir is not None:
        console.print()
        console.print(Text.assemble(("run folder  ", "bold"), str(run_dir)), soft_wrap=True)


def arm_rows(arms: dict[str, Arm]) -> list[tuple[str, list[str]]]:
    """The headline table: the name of each figure, and its value for every arm."""
    figures = list(arms.values())
    return [
        ("code cross-entropy (nats/token)", [number(arm.code_ce, 4) for arm in figures]),
        ("the same without thoughts", [number(arm.raw_code_ce, 4) for arm in figures]),
        ("thought cross-entropy (nats/token)", [number(arm.thought_ce, 4) for arm in figures]),
        ("thinking rate (lines)", [percent(arm.think_rate) for arm in figures]),
        ("mean thought length (tokens)", [number(arm.mean_thought_tokens, 1) for arm in figures]),
        ("reward (nats/line)", [number(arm.reward, 4) for arm in figures]),
        ("ELBO (nats/line)", [number(arm.elbo, 4) for arm in figures]),
        ("tokens trained on", [count(arm.tokens) for arm in figures]),
        ("time of training on them", [duration(arm.seconds) for arm in figures]),
        ("time with E-steps and infusion", [duration(arm.total_seconds) for arm in figures]),
        ("tokens/s", [count(arm.tokens_per_second) for arm in figures]),
    ]


def arms_table(arms: dict[str, Arm]) -> Table:
    """Held-out figures, one column an arm; rows without any figure are left out."""
    table = Table(title="held-out documents", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in arms:
        table.add_column(name, justify="right", no_wrap=True)
    for name, cells in arm_rows(arms):
        if any(cell != ABSENT for cell in cells):
            table.add_row(name, *cells, style="bold" if name.startswith("code") else None)
    return table


def phases_table(phases: dict[str, Phase]) -> Table:
    """Time and speed of each phase."""
    table = Table(title="phases", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for name in ("time", "tokens", "tokens/s", "documents/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, phase in phases.items():
        table.add_row(
            name,
            duration(phase.seconds),
            count(phase.tokens),
            count(phase.tokens_per_second),
            count(phase.documents_per_second),
        )
    return table


def snippet_text(snippet: str) -> Text:
    """Highlighted Python with the thoughts set apart."""
    text = Syntax("", "python", theme="ansi_dark", background_color="default").highlight(snippet)
    text.rstrip()
    for start, end in thought_spans(snippet):
        text.stylize(THOUGHT_STYLE, start, min(end, len(text)))
    return text


def _monitor(monitor: Monitor) -> Text:
    where = f"{monitor.phase}, iteration {monitor.iteration}"
    return Text.assemble(
        (f"! {monitor.name}", "bold red"), f" ({where}): {monitor.message}\n  ", ("→ ", "bold"), monitor.advice
    )
