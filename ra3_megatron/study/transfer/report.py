"""`report.html`, `table.md`, `results.jsonl` and figures of a transfer study, of what is done."""

import json
from collections.abc import Sequence
from pathlib import Path

from pygments import highlight  # type: ignore[import-untyped]
from pygments.formatters import HtmlFormatter  # type: ignore[import-untyped]
from pygments.lexers import YamlLexer  # type: ignore[import-untyped]

from ra3_megatron.report.numbers import duration
from ra3_megatron.report.pages import render_page
from ra3_megatron.report.run_folder import write_text
from ra3_megatron.study.comparison import reference_of
from ra3_megatron.study.plan import Cell, cells_of
from ra3_megatron.study.report import PAGE, TABLES, statuses, versions_of, write_pictures
from ra3_megatron.study.results import RESULTS
from ra3_megatron.study.spec import STUDY_FILE, StudyConfig, load_study
from ra3_megatron.study.tables import Table, markdown
from ra3_megatron.study.transfer.curves import Run, finished_runs
from ra3_megatron.study.transfer.figures import draw
from ra3_megatron.study.transfer.measures import differences_table, transfer_table
from ra3_megatron.study.transfer.verdicts import verdicts_table


def tables_of(folder: Path, study: StudyConfig, cells: Sequence[Cell]) -> list[Table]:
    """The tables of what is done below `folder`, where the study stands."""
    runs = finished_runs(folder, cells)
    tables = (transfer_table(runs), differences_table(runs, reference_of(study, cells)), verdicts_table(runs))
    return [table for table in tables if table.rows]


def write_results(folder: Path, cells: Sequence[Cell]) -> Path:
    """`results.jsonl`: the curve of each run that is done; its path."""
    path = folder / RESULTS
    write_text(path, "".join(_line(run) for run in finished_runs(folder, cells)))
    return path


def build_transfer_report(folder: Path) -> Path:
    """Build everything from what is in the folder; the path of the page."""
    study = load_study(folder / STUDY_FILE)
    cells = cells_of(study)
    runs = finished_runs(folder, cells)
    write_results(folder, cells)
    tables = tables_of(folder, study, cells)
    write_text(folder / TABLES, f"## Study {study.name}\n\n" + (markdown(tables) or "No cell is done yet.\n"))
    page = render_page(
        "study.html",
        name=study.name,
        cells=len(cells),
        done=len(runs),
        missing=statuses(folder, cells),
        facts=[
            ("runs", f"{len(runs)} of {len(cells)} done"),
            ("starts", ", ".join(study.arms)),
            ("seeds", ", ".join(map(str, study.seeds))),
            ("configuration", study.config or "defaults"),
            ("seconds of training", duration(sum(run.curve.seconds[-1] for run in runs))),
        ],
        tables=tables,
        pictures=write_pictures(folder, draw(runs)),
        extra=[],
        monitors=[],
        times=[(run.cell.name, duration(run.curve.seconds[-1])) for run in runs],
        versions=versions_of([run.cell.folder(folder) for run in runs]),
        study=highlight((folder / STUDY_FILE).read_text(encoding="utf-8"), YamlLexer(), HtmlFormatter(nowrap=True)),
        code_style=HtmlFormatter(style="friendly").get_style_defs("pre.code"),
        dark_code_style=HtmlFormatter(style="github-dark").get_style_defs("pre.code"),
    )
    write_text(folder / PAGE, page)
    return folder / PAGE


def _line(run: Run) -> str:
    curve = run.curve
    values = {
        "cell": run.cell.name,
        "start": run.cell.arm,
        "seed": run.cell.seed,
        "steps": curve.steps,
        "tokens": curve.tokens,
        "seconds": curve.seconds,
        "pass_at_1": curve.rate,
        "signal": curve.signal,
        "area": curve.area,
        "asymptote": curve.asymptote,
    }
    return json.dumps(values, allow_nan=False) + "\n"
