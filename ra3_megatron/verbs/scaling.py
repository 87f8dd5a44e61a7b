"""`ra3 study scaling`: measure every cell of a scaling study that is not done, one at a time, and write what came out.

Nothing is written before every cell's configuration has been resolved and every cell's folder checked. The corpus is
built once, for all cells. A cell that failed is reported and stops no other.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from ra3_megatron.config.differences import flat
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import load_config
from ra3_megatron.report.numbers import clock, count
from ra3_megatron.report.progress import Progress
from ra3_megatron.report.run_folder import RunFolder, read_json, write_text
from ra3_megatron.study import slurm
from ra3_megatron.study.plan import Cell
from ra3_megatron.study.process import lock
from ra3_megatron.study.runner import Command, Outcome
from ra3_megatron.study.scaling import jobs
from ra3_megatron.study.scaling.points import Measured, measured, rows_of_corpora
from ra3_megatron.study.scaling.report import write_report
from ra3_megatron.study.scaling.results import CellFigures
from ra3_megatron.study.scaling.spec import SCALING_FILE, ScalingConfig, dump_scaling
from ra3_megatron.study.scaling.tables import short
from ra3_megatron.study.state import stage, unknown_cells
from ra3_megatron.study.tables import Table
from ra3_megatron.verbs import scaling_cell
from ra3_megatron.verbs.cells import check_folder, describe, exit_code, run_cells
from ra3_megatron.verbs.run_dir import disk_full
from ra3_megatron.verbs.study import find_cell

CORPORA = "corpora"
"""Folder of the corpora that all cells share, by what they are made from."""
PATIENCE = 3600.0
"""Seconds that a task waits for another one that builds the corpus or writes the report."""


def scaling(study: ScalingConfig, cell: str | None = None, dry_run: bool = False, to_slurm: bool = False) -> int:
    """Run what is not done (or one cell, by name or number); the exit code: 1 if cells failed.

    Raises UserError when the study cannot run as it is; then nothing has been written.
    """
    found = measured(study)
    wanted = found.cells if cell is None else [find_cell(found.cells, cell)]
    check_folder(study.path, SCALING_FILE, "scaling study")
    if dropped := unknown_cells(study.path, found.cells):
        raise UserError(dropped)
    lines = list(_conflicts(study, found))
    if lines:
        raise UserError("\n".join(lines))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 180
    if dry_run:
        _print_plan(study, found, console)
        return 0
    with disk_full(study.folder):
        if to_slurm:
            return _to_slurm(study, found, console)
        return _run_here(study, found, wanted, console)


def _conflicts(study: ScalingConfig, found: Measured) -> Iterator[str]:
    """One line for each cell that was measured with other settings. The layout counts here."""
    for cell in found.cells:
        run = RunFolder(cell.folder(study.path))
        if stage(run.path) != "done":
            continue
        summary = read_json(run.summary)
        there = flat(load_config(run.config, [], resolved=True).model_dump())
        here = flat(found.configs[cell.name].model_dump())
        asked = {"rows": study.rows, "warmup": study.warmup}
        there, here = {**there, **{key: summary.get(key) for key in asked}}, {**here, **asked}
        free = ("run_dir", "logging.")
        changed = [key for key in here if there.get(key) != here[key] and not key.startswith(free)]
        if changed:
            key = changed[0]
            yield (
                f"cell {cell.name}: was measured with {key}={there.get(key)}, and the study asks for {here[key]}: set "
                f"it back, delete {run.path}, or choose another folder for the study"
            )


def _run_here(study: ScalingConfig, found: Measured, wanted: list[Cell], console: Console) -> int:
    whole = len(wanted) == len(found.cells)
    held = lock(study.path) if whole else None
    if whole and held is None:
        raise UserError(f"folder={study.folder}: another `ra3 study scaling` is at work there: wait for it, or stop it")
    try:
        describe(study.path / SCALING_FILE, dump_scaling(study), whole)
        corpora = _corpora(study, found, console)
        outcomes = _run_cells(study, found, wanted, corpora, console)
        page, tables = _report(study, found)
        if whole:
            _print_tables(study, tables, console)
            console.print(Text.assemble(("report      ", "bold"), str(page)), soft_wrap=True)
    finally:
        if held is not None:
            held.close()
    return exit_code(outcomes, console)


def _corpora(study: ScalingConfig, found: Measured, console: Console) -> dict[str, Path]:
    """The corpus of each cell, by its name. Built here, once for all that share it."""
    from ra3_megatron.corpus.build import build_corpus

    folders: dict[str, Path] = {}
    by_hash = rows_of_corpora(found.configs.values())
    held = lock(study.path / CORPORA, PATIENCE)
    try:
        with Progress(console=console) as progress:
            for name, config in by_hash.items():
                build_corpus(config, study.path / CORPORA / name, progress)
    finally:
        if held is not None:
            held.close()
    for cell in found.cells:
        (name,) = rows_of_corpora([found.configs[cell.name]])
        folders[cell.name] = study.path / CORPORA / name
    return folders


def _run_cells(
    study: ScalingConfig, found: Measured, wanted: list[Cell], corpora: dict[str, Path], console: Console
) -> dict[str, Outcome]:
    """One at a time: what runs beside a measurement is in it."""
    return run_cells(
        study.name,
        study.path,
        found.cells,
        found.configs,
        wanted,
        1,
        _command(study, found, corpora),
        lambda cell, outcome: _line(study, found, cell, outcome),
        lambda: None,
        console,
    )


def _command(study: ScalingConfig, found: Measured, corpora: dict[str, Path]) -> Command:
    """What measures the cell in a file: processes of this machine, or a step of the Slurm job that this is."""

    def command(file: Path) -> list[str]:
        name = file.parent.name
        busy = f"{psutil.cpu_percent(1.0) / 100 * (psutil.cpu_count() or 1):.2f}"  # nothing of the study runs now
        words = scaling_cell.command(file, corpora[name].resolve(), study.rows, study.warmup, study.estep, busy)
        if not jobs.in_batch_job():
            return words
        config = found.configs[name]
        nodes, each = study.on_nodes(config.parallel.world_size)
        return jobs.step_command(words, nodes, each, config.parallel.threads or 1)

    return command


def _line(study: ScalingConfig, found: Measured, cell: Cell, outcome: Outcome) -> str:
    """One line on a cell that is done."""
    if outcome.reason:
        return f"{cell.name}: done {outcome.reason}"
    figures = CellFigures(cell, found.configs[cell.name], read_json(RunFolder(cell.folder(study.path)).summary))
    return (
        f"{cell.name}: {figures.step_seconds:.3g} s a step, {count(figures.tokens_per_second)} tokens/s, in "
        f"{clock(outcome.seconds)}"
    )


def _report(study: ScalingConfig, found: Measured) -> tuple[Path, list[Table]]:
    """Write it, one process after another."""
    held = lock(study.path / CORPORA, PATIENCE)
    try:
        return write_report(study, found)
    finally:
        if held is not None:
            held.close()


def _print_tables(study: ScalingConfig, tables: list[Table], console: Console) -> None:
    for one in map(short, tables):
        table = RichTable(title=f"{study.name}: {one.title}", title_justify="left", title_style="bold", box=None)
        for index, name in enumerate(one.header):
            table.add_column(name, justify="right" if index > 1 else "left", overflow="fold")
        for row in one.rows:
            table.add_row(*map(Text, row))
        console.print()
        console.print(table)


def _print_plan(study: ScalingConfig, found: Measured, console: Console) -> None:
    table = RichTable(title=study.name, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("", "cell", "processes", "nodes", "rows", "state"):
        table.add_column(name, justify="right" if name in ("", "processes", "nodes", "rows") else "left")
    for index, cell in enumerate(found.cells):
        config = found.configs[cell.name]
        world = config.parallel.world_size
        state = "done" if stage(cell.folder(study.path)) == "done" else "to run"
        rows = str(config.warm_start.global_batch_size)
        table.add_row(str(index), Text(cell.name), str(world), str(study.on_nodes(world)[0]), rows, state)
    console.print(table)


def _to_slurm(study: ScalingConfig, found: Measured, console: Console) -> int:
    slurm.check_size(len(found.cells))
    describe(study.path / SCALING_FILE, dump_scaling(study), whole=True)
    _corpora(study, found, console)  # before any node waits for it
    script = study.path / jobs.SCRIPT
    file = (study.path / SCALING_FILE).resolve()
    write_text(script, jobs.render_script(study, file, study.path.resolve()))
    done = [cell.name for cell in found.cells if stage(cell.folder(study.path)) == "done"]
    threads = {cell.name: found.configs[cell.name].parallel.threads or 1 for cell in found.cells}
    commands = [
        jobs.command_of(script, group, max(threads[found.cells[n].name] for n in group.cells), study.sbatch)
        for group in jobs.groups(study, found.cells, found.configs, done)
    ]
    if slurm.has_sbatch():
        numbers = jobs.submit(commands)
        number = len(found.cells) - len(done)
        console.print(f"{number} cells submitted as job arrays {', '.join(numbers)}", markup=False, soft_wrap=True)
    else:
        text = "\n".join(shlex.join(command) for command in commands)
        console.print(
            f"{script} is written. There is no sbatch here; where there is one, submit it with\n{text}",
            markup=False,
            soft_wrap=True,
        )
    console.print(f"afterwards: ra3 study report {study.path}", markup=False, soft_wrap=True)
    return 0
