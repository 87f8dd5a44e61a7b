"""`ra3 study`: check all of a study, run its cells or hand them to Slurm, write what came out.

Nothing is written before every cell's configuration has been resolved and every cell's folder checked.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.report.numbers import clock, number, percent
from ra3_megatron.report.run_folder import write_text
from ra3_megatron.study import slurm
from ra3_megatron.study.comparison import first_reference, reference_of
from ra3_megatron.study.flops import with_equal_flops
from ra3_megatron.study.plan import CELLS, Cell, cells_of, resolve
from ra3_megatron.study.process import lock
from ra3_megatron.study.report import build_study_report, statuses
from ra3_megatron.study.results import arms_only, finished, write_results
from ra3_megatron.study.runner import PATIENCE, Command, Outcome, rlvr_command, train_command
from ra3_megatron.study.scaling.report import build_scaling_report
from ra3_megatron.study.scaling.spec import SCALING_FILE
from ra3_megatron.study.spec import STUDY_FILE, StudyConfig, dump_study, load_study
from ra3_megatron.study.state import conflicts, missing_starts, stage, unknown_cells
from ra3_megatron.study.tables import SHORT, Table, results_table
from ra3_megatron.study.transfer.curves import finished_runs
from ra3_megatron.study.transfer.report import build_transfer_report, tables_of
from ra3_megatron.study.transfer.report import write_results as write_transfer_results
from ra3_megatron.verbs.cells import check_folder, describe, exit_code, run_cells
from ra3_megatron.verbs.run_dir import disk_full


def run_file(
    file: Path, overrides: Sequence[str], jobs: int | None, cell: str | None, dry_run: bool, to_slurm: bool
) -> int:
    """Run the study in a YAML file; returns the exit code."""
    return run(load_study(file, overrides), jobs, cell, dry_run, to_slurm)


def run(
    study: StudyConfig,
    jobs: int | None = None,
    cell: str | None = None,
    dry_run: bool = False,
    to_slurm: bool = False,
    command: Command | None = None,
) -> int:
    """Run what is not done of a study (or one cell of it, by name or number); returns the exit code: 1 if cells failed.

    command: what runs a cell; None: the study's verb. Raises UserError when the study cannot run as it is; then nothing
    has been written.
    """
    cells, configs = _checked(study)
    wanted = cells if cell is None else [find_cell(cells, cell)]
    console = Console(highlight=False)
    if dry_run:
        _print_plan(study, cells, wanted, console)
        return 0
    if not to_slurm and (lines := list(missing_starts(study.path, wanted, configs))):  # a job before may write them
        raise UserError("\n".join(lines))
    with disk_full(study.folder):
        if to_slurm:
            return _to_slurm(study, cells, configs, console)
        command = command or (train_command if study.verb == "train" else rlvr_command)
        return _run_here(study, cells, configs, wanted, jobs, command, console)


def report(folder: Path) -> Path:
    """Rebuild the report of a study; its path. Raises UserError when `folder` holds none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such study folder")
    if (folder / SCALING_FILE).is_file():
        return build_scaling_report(folder)
    if not (folder / STUDY_FILE).is_file():
        return build_study_report(folder)  # which says what is missing
    with _one_after_another(folder):
        if load_study(folder / STUDY_FILE).verb == "rlvr":
            return build_transfer_report(folder)
        return build_study_report(folder)


def _checked(study: StudyConfig) -> tuple[list[Cell], dict[str, RunConfig]]:
    """Cells and configurations of a study that can run. `mstep.steps` of equal FLOPs is set where it is known."""
    cells = cells_of(study)
    reference_of(study, cells)
    configs = resolve(study, cells)
    check_folder(study.path, STUDY_FILE, "study")
    if dropped := unknown_cells(study.path, cells):
        raise UserError(dropped)
    open_steps = set()
    for cell in cells:
        if cell.equal_flops is None:
            continue
        other = study.path / CELLS / cell.equal_flops
        if stage(other) == "done":
            configs[cell.name] = with_equal_flops(configs[cell.name], other)
        else:
            open_steps.add(cell.name)
    lines = list(conflicts(study.path, cells, configs, frozenset(open_steps)))
    if lines:
        raise UserError("\n".join(lines))
    return cells, configs


def find_cell(cells: Sequence[Cell], wanted: str) -> Cell:
    """A cell by its name or number. UserError for one that is not there."""
    if wanted.isdecimal():
        if int(wanted) < len(cells):
            return cells[int(wanted)]
        raise UserError(f"--cell {wanted}: there are {len(cells)} cells, numbered from 0")
    for cell in cells:
        if cell.name == wanted:
            return cell
    names = ", ".join(cell.name for cell in cells[:6])
    raise UserError(f"--cell {wanted}: no cell has this name; there are {names}{', …' if len(cells) > 6 else ''}")


def default_jobs(configs: Mapping[str, RunConfig], cores: int) -> int:
    """Cells at once: cores over the processes of the largest layout; one where there are GPUs."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return 1
    return max(1, cores // max(config.parallel.world_size for config in configs.values()))


def _run_here(
    study: StudyConfig,
    cells: Sequence[Cell],
    configs: Mapping[str, RunConfig],
    wanted: Sequence[Cell],
    jobs: int | None,
    command: Command,
    console: Console,
) -> int:
    whole = len(wanted) == len(cells)
    held = lock(study.path) if whole else None
    if whole and held is None:
        raise UserError(f"folder={study.folder}: another `ra3 study run` is at work there: wait for it, or stop it")
    try:
        describe(study.path / STUDY_FILE, dump_study(study), whole)
        outcomes = run_cells(
            study.name,
            study.path,
            cells,
            configs,
            wanted,
            1 if not whole else jobs or default_jobs(configs, len(os.sched_getaffinity(0))),
            command,
            lambda cell, outcome: _line(study, cell, outcome),
            lambda: _update_results(study, cells),
            console,
        )
        done = all(stage(cell.folder(study.path)) == "done" for cell in cells)
        if whole or done:
            page = report(study.path)
            print_results(study, console)
            console.print(Text.assemble(("report      ", "bold"), str(page)), soft_wrap=True)
    finally:
        if held is not None:
            held.close()
    return exit_code(outcomes, console)


def _update_results(study: StudyConfig, cells: Sequence[Cell]) -> None:
    """Write `results.jsonl`, one process after another: each writes what is done when it has the lock."""
    with _one_after_another(study.path):
        if study.verb == "rlvr":
            write_transfer_results(study.path, cells)
        else:
            write_results(study.path, finished(study.path, cells))


@contextmanager
def _one_after_another(folder: Path) -> Iterator[None]:
    """Within it, no other process writes what is beside the cells of a study, such as that of another Slurm task."""
    held = lock(folder / CELLS, PATIENCE)
    try:
        yield
    finally:
        if held is not None:
            held.close()


def _line(study: StudyConfig, cell: Cell, outcome: Outcome) -> str:
    """One line on a cell that is done."""
    if outcome.reason:
        return f"{cell.name}: done {outcome.reason}"
    if study.verb == "rlvr":
        curve = finished_runs(study.path, [cell])[0].curve
        rates = f"held-out pass@1 {percent(curve.rate[0])} → {percent(curve.rate[-1])}"
        return f"{cell.name}: {rates}, in {clock(outcome.seconds)}"
    figures = finished(study.path, [cell])[0].last.figures
    accuracy = f", accuracy {percent(figures['code_accuracy'])}" if figures["code_accuracy"] is not None else ""
    thinks = f"thinks at {percent(figures['think_rate'])} of lines"
    return f"{cell.name}: code CE {number(figures['code_ce'], 4)}{accuracy}, {thinks}, in {clock(outcome.seconds)}"


def print_results(study: StudyConfig, console: Console) -> None:
    """The table of results of the cells that are done."""
    cells = cells_of(study)
    if study.verb == "rlvr":
        for found in tables_of(study.path, study, cells)[:1]:
            _print_table(found.title, found, console)
        return
    rows = results_table(arms_only(finished(study.path, cells)), SHORT, first_reference(study, cells))
    if rows.rows:
        _print_table(study.name, rows, console)


def _print_table(title: str, rows: Table, console: Console) -> None:
    table = RichTable(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, name in enumerate(rows.header):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in rows.rows:
        table.add_row(*map(Text, row))
    console.print()
    console.print(table)


def _print_plan(study: StudyConfig, cells: Sequence[Cell], wanted: Sequence[Cell], console: Console) -> None:
    table = RichTable(title=study.name, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("", "cell", "state", "waits for"):
        table.add_column(name, justify="right" if not name else "left", overflow="fold")
    missing = {status.cell: status.status for status in statuses(study.path, cells)}
    for index, cell in enumerate(cells):
        if cell in wanted:
            state = (
                "done" if cell.name not in missing else "begun" if missing[cell.name] == "not finished" else "to run"
            )
            table.add_row(str(index), Text(cell.name), state, Text(" ".join(cell.after)))
    console.print(table)


def _to_slurm(study: StudyConfig, cells: Sequence[Cell], configs: Mapping[str, RunConfig], console: Console) -> int:
    slurm.check_size(len(cells))
    script = study.path / slurm.SCRIPT
    file = (study.path / STUDY_FILE).resolve()
    describe(study.path / STUDY_FILE, dump_study(study), whole=True)
    write_text(script, slurm.render_script(study.name, file, study.path.resolve(), configs))
    levels = slurm.arrays(cells)
    if slurm.has_sbatch():
        jobs = slurm.submit(script, levels)
        console.print(f"{len(cells)} cells submitted as job arrays {', '.join(jobs)}", markup=False, soft_wrap=True)
    else:
        console.print(
            f"{script} is written. There is no sbatch here; where there is one, submit it with\n"
            f"{slurm.by_hand(script, levels)}",
            markup=False,
            soft_wrap=True,
        )
    console.print(f"afterwards: ra3 study report {study.path}", markup=False, soft_wrap=True)
    return 0
