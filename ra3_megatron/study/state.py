"""Where each cell stands, read from its folder: done, begun, untouched, or occupied by another run."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ra3_megatron.config.differences import differences
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import dump_config, load_config
from ra3_megatron.config.run import RunConfig
from ra3_megatron.report.run_folder import RunFolder, read_json, write_json, write_text
from ra3_megatron.study.plan import CELLS, Cell
from ra3_megatron.study.settings import value_text

CELL_FILE = "cell.yaml"
"""What the cell's command is given."""
LOG = "log.txt"
"""Output of the cell's command, all attempts one behind the other."""
FAILURE = "failure.json"
"""Why the last attempt failed; gone when another one begins."""

Stage = Literal["done", "begun", "new"]


def stage(folder: Path) -> Stage:
    """Whether a run has ended there, has left anything, or nothing."""
    run = RunFolder(folder)
    if run.summary.is_file():
        return "done"
    return "begun" if run.checkpoints.is_dir() else "new"


def conflicts(
    study: Path, cells: Sequence[Cell], configs: Mapping[str, RunConfig], open_steps: frozenset[str] = frozenset()
) -> Iterator[str]:
    """One line for each cell whose folder holds a run with another configuration.

    open_steps: cells whose `mstep.steps` is not known yet. A run that has left no checkpoint has nothing to lose.
    """
    for cell in cells:
        folder = cell.folder(study)
        run = RunFolder(folder)
        if stage(folder) == "new" or not run.config.is_file():
            continue
        try:
            there = load_config(run.config, [], resolved=True)
        except UserError as error:
            yield f"cell {cell.name}: {str(error).splitlines()[0]}: delete {folder} or choose another folder"
            continue
        left_out = {"mstep.steps"} if cell.name in open_steps else set()
        changed = [d for d in differences(there, configs[cell.name]) if d.key not in left_out]
        if changed:
            first = changed[0]
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            yield (
                f"cell {cell.name}: its folder holds a run with {first.key}={first.one}, and the study asks for "
                f"{first.other}{more}: set it back, delete {folder}, or choose another folder for the study"
            )


def unknown_cells(study: Path, cells: Sequence[Cell]) -> str | None:
    """A line on cells in the folder that this study lacks, whose results it would drop; None: there are none."""
    known = {cell.name for cell in cells}
    folders = sorted((study / CELLS).iterdir()) if (study / CELLS).is_dir() else []
    found = [path.name for path in folders if path.name not in known and stage(path) != "new"]
    if not found:
        return None
    more = f", … ({len(found)} in all)" if len(found) > 3 else ""
    return (
        f"folder={study}: holds cells that this study does not have: {'; '.join(found[:3])}{more}: name their arms, "
        "values and seeds too, delete them, or choose another folder"
    )


def missing_starts(study: Path, cells: Sequence[Cell], configs: Mapping[str, RunConfig]) -> Iterator[str]:
    """One line for each cell that is not done and starts from a checkpoint that is not there, and that no cell of the
    study will write."""
    inside = study.resolve()
    for cell in cells:
        if stage(cell.folder(study)) == "done":
            continue
        for key, path in configs[cell.name].starts.items():
            if inside not in path.resolve().parents and not path.is_dir():
                yield f"cell {cell.name}: {key}={path}: no such folder"


def prepare(folder: Path, config: RunConfig) -> Path:
    """Write what the cell's command reads; the path of it. The folder becomes that of a run."""
    run = RunFolder(folder)
    text = dump_config(config)
    if not run.checkpoints.is_dir():
        write_text(run.config, text)
    write_text(folder / CELL_FILE, text)
    (folder / FAILURE).unlink(missing_ok=True)
    return folder / CELL_FILE


def with_threads(config: RunConfig, threads: int) -> RunConfig:
    """The same run with this many CPU threads a process, unless the study says how many."""
    if config.parallel.threads is not None:
        return config
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"threads": threads})})


def record_failure(folder: Path, reason: str, exit_code: int | None) -> None:
    """Leave a note of a failed attempt."""
    write_json(folder / FAILURE, {"reason": reason, "exit_code": exit_code})


def failure_of(folder: Path) -> str | None:
    """Why the last attempt failed; None when none did."""
    file = folder / FAILURE
    return str(read_json(file)["reason"]) if file.is_file() else None


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 65536))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return "no output"
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def json_value(value: Any) -> Any:
    """A value of a grid for JSON, which has no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return value_text(value)
    return json.loads(json.dumps(value))
