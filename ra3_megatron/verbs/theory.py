"""`ra3 theory`: the studies of the theory room, with progress, `theory.json`, figures, a page and a table.

The output folder holds `theory.json` (every number and verdict; the same bytes for the same seed and size),
`theory.html` and `figures/*.png`. It may be written again; a folder that holds something else is refused.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

import ra3_megatron
from ra3_megatron.config.errors import UserError
from ra3_megatron.report.pages import render_page, write_picture
from ra3_megatron.report.progress import Progress
from ra3_megatron.report.run_folder import write_json, write_text
from ra3_megatron.theory.figures import CAPTIONS, draw_figures
from ra3_megatron.theory.findings import Study, Verdict
from ra3_megatron.theory.studies import FULL, QUICK, plans
from ra3_megatron.verbs.run_dir import disk_full

NUMBERS, PAGE, FIGURES = "theory.json", "theory.html", "figures"
STYLES = {"confirmed": "bold green", "refuted": "bold red", "undecided": "bold yellow"}
PLACES = {
    "regret": ("regret",),
    "pruning": ("pruning",),
    "convergence": ("convergence", "speed_up"),
    "prior": ("price",),
}
"""Figures of each study."""


def theory(out: Path, seed: int, quick: bool) -> None:
    """Run all studies and write what came out to the folder `out`.

    Raises UserError when `out` holds something else or cannot be written.
    """
    _check_out(out)
    console = Console(highlight=False)
    with disk_full(str(out)):
        studies = _run(seed, quick, console)
        write_json(out / NUMBERS, _json(studies, seed, quick))
        pictures = _write_figures(out, studies)
        write_text(out / PAGE, _render(studies, pictures, seed, quick))
    _print(studies, out, console)


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file: name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / NUMBERS).is_file():
        raise UserError(f"--out {out}: holds something else than the output of ra3 theory: choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}): choose another folder") from error


def _run(seed: int, quick: bool, console: Console) -> dict[str, Study]:
    studies = {}
    with Progress(console=console) as progress:
        for plan in plans(seed, QUICK if quick else FULL):
            with progress.task(plan.name, total=plan.units) as task:
                studies[plan.name] = plan.run(task.advance)
    return studies


def _json(studies: dict[str, Study], seed: int, quick: bool) -> dict[str, Any]:
    return {
        "seed": seed,
        "quick": quick,
        "versions": {"ra3": ra3_megatron.__version__, "numpy": np.__version__},
        "studies": {name: asdict(study) for name, study in studies.items()},
    }


def _write_figures(out: Path, studies: dict[str, Study]) -> dict[str, str]:
    """Write `figures/*.png`; data URIs by name."""
    (out / FIGURES).mkdir(exist_ok=True)
    return {
        name: write_picture(out / FIGURES / f"{name}.png", figure) for name, figure in draw_figures(studies).items()
    }


def _render(studies: dict[str, Study], uris: dict[str, str], seed: int, quick: bool) -> str:
    sections = [
        {
            "name": name,
            "title": study.title,
            "verdicts": [verdict for verdict in study.verdicts if verdict.cell is None],
            "table": _cells(study),
            "pictures": [{"uri": uris[figure], "caption": CAPTIONS[figure]} for figure in PLACES[name]],
        }
        for name, study in studies.items()
    ]
    return render_page("theory.html", sections=sections, seed=seed, quick=quick)


def _cells(study: Study) -> dict[str, dict[str, Verdict]]:
    """Verdicts that are cells of a table, by row and column."""
    table: dict[str, dict[str, Verdict]] = {}
    for verdict in study.verdicts:
        if verdict.cell is not None:
            table.setdefault(verdict.cell.row, {})[verdict.cell.column] = verdict
    return table


def _print(studies: dict[str, Study], out: Path, console: Console) -> None:
    """The verdicts, the table of speed-ups, and where everything is."""
    table = Table(title="claims", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("study", "outcome", "claim", "evidence"):
        table.add_column(name, no_wrap=name in ("study", "outcome"), overflow="fold")
    for name, study in studies.items():
        for verdict in study.verdicts:
            if verdict.cell is None:
                outcome = Text(verdict.outcome, STYLES[verdict.outcome])
                table.add_row(name, outcome, Text(verdict.claim), Text(verdict.evidence, "dim"))
    console.print()
    console.print(table)
    for study in studies.values():
        if cells := _cells(study):
            console.print()
            console.print(_cell_table(cells))
    console.print()
    console.print(Text.assemble(("written to  ", "bold"), str(out / PAGE)), soft_wrap=True)


def _cell_table(cells: dict[str, dict[str, Verdict]]) -> Table:
    title = "gain from length: slope of log N on log bound (1: as the bound; 0: none), 95% interval"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for column in next(iter(cells.values())):
        table.add_column(column, justify="right")
    for row, verdicts in cells.items():
        table.add_row(row, *(Text(v.cell.figure if v.cell else "", STYLES[v.outcome]) for v in verdicts.values()))
    return table
