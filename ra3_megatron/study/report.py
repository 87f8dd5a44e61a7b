"""`report.html`, `table.md` and `figures/` of a study, from whatever its cells have left.

Only what is in the folder of the study is read, so a study that is going on is reported in the same way; the page says
which cells are missing and why. Other code adds sections of its own: `build_study_report(folder, sections=[…])`, or by
name in the study (`sections`, see `SECTIONS`), so that `ra3 study report` builds them too.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from pygments import highlight  # type: ignore[import-untyped]
from pygments.formatters import HtmlFormatter  # type: ignore[import-untyped]
from pygments.lexers import YamlLexer  # type: ignore[import-untyped]

from ra3_megatron.config.errors import UserError
from ra3_megatron.report.numbers import duration
from ra3_megatron.report.pages import render_page, write_picture
from ra3_megatron.report.run_folder import RunFolder, read_json, write_text
from ra3_megatron.study.comparison import differences, first_reference, mstep_checks
from ra3_megatron.study.figures import Picture, draw_figures
from ra3_megatron.study.plan import CELLS, Cell, cells_of
from ra3_megatron.study.results import Finished, arms_only, finished, write_results
from ra3_megatron.study.settings import value_text
from ra3_megatron.study.spec import STUDY_FILE, StudyConfig, load_study
from ra3_megatron.study.state import LOG, failure_of, stage
from ra3_megatron.study.tables import Table, differences_table, markdown, mstep_table, results_table

PAGE, TABLES, FIGURES = "report.html", "table.md", "figures"
SECTIONS = {"hopprog": "ra3_megatron.study.hopprog.page", "code": "ra3_megatron.study.code"}
"""Modules with a function `sections(done, folder)`, by the name that a study gives."""


@dataclass(frozen=True)
class ReportSection:
    """A part of the page that other code adds."""

    title: str
    html: str
    """Its content, safe to be put into the page as it is."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """Figures by caption, shown behind it."""


class _Status(NamedTuple):
    cell: str
    status: str
    detail: str


def build_study_report(folder: Path, sections: Sequence[ReportSection] = ()) -> Path:
    """Build the page, the tables, the figures and `results.jsonl` of the study in `folder`; the path of the page.

    Raises UserError when there is no study, or a file of a cell is damaged.
    """
    if not (folder / STUDY_FILE).is_file():
        raise UserError(f"{folder}: not the folder of a study (it has no {STUDY_FILE})")
    study = load_study(folder / STUDY_FILE)
    cells = cells_of(study)
    done = finished(folder, cells)
    arms = arms_only(done)
    write_results(folder, done)
    if study.sections is not None and done:
        sections = [*importlib.import_module(SECTIONS[study.sections]).sections(done, folder), *sections]
    tables = [
        results_table(arms, start_of=first_reference(study, cells)),
        differences_table(differences(study, cells, arms)),
        mstep_table(mstep_checks(arms)),
    ]
    write_text(folder / TABLES, f"## Study {study.name}\n\n" + (markdown(tables) or "No cell is done yet.\n"))
    pictures = write_pictures(folder, draw_figures(study, arms))
    extra = [
        {"title": section.title, "html": section.html, "pictures": _extra_pictures(folder, number, section)}
        for number, section in enumerate(sections, start=1)
    ]
    write_text(folder / PAGE, _render(folder, study, cells, done, tables, pictures, extra))
    return folder / PAGE


def statuses(folder: Path, cells: Sequence[Cell]) -> list[_Status]:
    """Cells that are not done, with the reason as far as it is known."""
    found = []
    for cell in cells:
        place = cell.folder(folder)
        if stage(place) == "done":
            continue
        failure = failure_of(place)
        waits = [name for name in cell.after if stage(folder / CELLS / name) != "done"]
        if failure is not None:
            found.append(_Status(cell.name, "failed", f"{failure} ({place / LOG})"))
        elif waits:
            found.append(_Status(cell.name, "not run", f"{waits[0]} is not done"))
        elif stage(place) == "begun" or (place / LOG).is_file():
            found.append(_Status(cell.name, "not finished", "goes on where it was with `ra3 study run`"))
        else:
            found.append(_Status(cell.name, "not run", ""))
    return found


def write_pictures(folder: Path, pictures: Sequence[Picture]) -> list[dict[str, str]]:
    """Write the figures; those of an earlier report are removed."""
    target = folder / FIGURES
    target.mkdir(exist_ok=True)
    for old in target.glob("*.png"):
        old.unlink(missing_ok=True)  # another report may be written at the same time
    return [
        {"caption": picture.caption, "uri": write_picture(target / f"{picture.name}.png", picture.figure)}
        for picture in pictures
    ]


def _extra_pictures(folder: Path, number: int, section: ReportSection) -> list[dict[str, str]]:
    return [
        {"caption": caption, "uri": write_picture(folder / FIGURES / f"section-{number}-{index}.png", figure)}
        for index, (caption, figure) in enumerate(section.figures.items(), start=1)
    ]


def _render(
    folder: Path,
    study: StudyConfig,
    cells: Sequence[Cell],
    done: Sequence[Finished],
    tables: Sequence[Table],
    pictures: Sequence[Mapping[str, str]],
    extra: Sequence[Mapping[str, Any]],
) -> str:
    missing = statuses(folder, cells)
    text = (folder / STUDY_FILE).read_text(encoding="utf-8")
    return render_page(
        "study.html",
        name=study.name,
        cells=len(cells),
        done=len(done),
        missing=missing,
        facts=_facts(study, cells, done),
        tables=[table for table in tables if table.rows],
        pictures=pictures,
        extra=extra,
        monitors=[(cell.cell.name, monitor) for cell in done for monitor in cell.summary.monitors],
        times=[(cell.cell.name, duration(_seconds(cell))) for cell in done],
        versions=versions_of([cell.folder for cell in done]),
        study=highlight(text, YamlLexer(), HtmlFormatter(nowrap=True)),
        code_style=HtmlFormatter(style="friendly").get_style_defs("pre.code"),
        dark_code_style=HtmlFormatter(style="github-dark").get_style_defs("pre.code"),
    )


def _seconds(cell: Finished) -> float:
    """Time of all phases of a cell."""
    return sum(phase.seconds for phase in cell.summary.phases.values())


def _facts(study: StudyConfig, cells: Sequence[Cell], done: Sequence[Finished]) -> list[tuple[str, str]]:
    grid = {key: values for arm in study.arms for key, values in study.grid_of(arm).items()}
    return [
        ("cells", f"{len(done)} of {len(cells)} done"),
        ("arms", ", ".join(study.arms)),
        *((key, ", ".join(map(value_text, values))) for key, values in grid.items()),
        ("seeds", ", ".join(map(str, study.seeds))),
        ("base run", "none" if study.base is None else "one for all seeds" if study.shared_base else "one a seed"),
        ("configuration", study.config or "defaults"),
        ("time of all phases", duration(sum(map(_seconds, done)))),
    ]


def versions_of(folders: Sequence[Path]) -> list[tuple[str, str]]:
    """Software and machines of the cells: what they all share once, else every value."""
    values: dict[str, dict[str, None]] = {}
    for folder in folders:
        file = RunFolder(folder).versions
        for key, value in _leaves(read_json(file) if file.is_file() else {}):
            values.setdefault(key, {})[value] = None
    return [(key, "; ".join(found)) for key, found in values.items() if list(found) != ["None"]]


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _leaves(item, f"{prefix} {key}".strip())]
    return [(prefix, ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value))]
