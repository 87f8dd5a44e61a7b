"""What every verb that runs the cells of a study does: check its folder, run with a progress bar, name what failed."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.report.progress import Progress
from ra3_megatron.report.run_folder import write_text
from ra3_megatron.study.plan import Cell
from ra3_megatron.study.process import LOCK
from ra3_megatron.study.runner import Command, Outcome, Runner
from ra3_megatron.study.state import stage


def check_folder(folder: Path, file: str, kind: str) -> None:
    """UserError for a folder that holds something, but not `file`, the description of such a study."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"folder={folder}: is a file: choose another folder")
    holds = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if file not in holds and holds - {LOCK}:
        raise UserError(f"folder={folder}: exists and holds no {kind}: choose another folder")


def describe(file: Path, text: str, whole: bool) -> None:
    """Write the description of a study; a task of one cell leaves the one that is there."""
    if whole or not file.is_file():
        write_text(file, text)


def run_cells(
    name: str,
    folder: Path,
    cells: Sequence[Cell],
    configs: Mapping[str, RunConfig],
    wanted: Sequence[Cell],
    jobs: int,
    command: Command,
    line: Callable[[Cell, Outcome], str],
    ended: Callable[[], None],
    console: Console,
) -> dict[str, Outcome]:
    """Run the wanted cells that are not done, `jobs` at once. `line` tells of one that is done; `ended` comes after."""
    before = sum(stage(cell.folder(folder)) == "done" for cell in wanted)
    with Progress(console=console) as progress:
        task = progress.task(name, total=len(wanted), unit="cells", done=before)
        if before:
            progress.message(f"{before} of {len(wanted)} cells are done already")

        def one_ended(cell: Cell, outcome: Outcome) -> None:
            if outcome.status == "done":
                progress.message(line(cell, outcome))
            else:
                progress.message(f"{cell.name}: {outcome.status}: {outcome.reason}", style="red")
            task.advance(1, units=1)
            ended()

        cores = len(os.sched_getaffinity(0))
        outcomes = Runner(folder, cells, configs, jobs, cores, command, one_ended).run(wanted)
        task.close()
    return outcomes


def exit_code(outcomes: Mapping[str, Outcome], console: Console) -> int:
    """0, or 1 with a line for each cell that failed."""
    failed = {name: outcome for name, outcome in outcomes.items() if outcome.status != "done"}
    for name, outcome in failed.items():
        console.print(f"{name}: {outcome.status}: {outcome.reason}", style="red", markup=False, soft_wrap=True)
    return 1 if failed else 0
