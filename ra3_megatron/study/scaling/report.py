"""`report.html`, `table.md`, `scaling.json`, `results.jsonl` and figures of a scaling study, of what is done."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ra3_megatron.report.pages import render_page
from ra3_megatron.report.run_folder import write_json, write_text
from ra3_megatron.scaling.search import Planned
from ra3_megatron.scaling.tables import Gpu
from ra3_megatron.study.report import PAGE, TABLES, statuses, versions_of, write_pictures
from ra3_megatron.study.results import RESULTS
from ra3_megatron.study.scaling.figures import draw
from ra3_megatron.study.scaling.points import Measured, measured
from ra3_megatron.study.scaling.prediction import device_of, peak_of, planned
from ra3_megatron.study.scaling.results import CellFigures, Row, finished_cells, rows_of
from ra3_megatron.study.scaling.spec import MEASURE, SCALING_FILE, ScalingConfig, load_scaling
from ra3_megatron.study.scaling.tables import estep_table, parts_table, scaling_tables
from ra3_megatron.study.tables import Table, markdown

FIGURES_FILE = "scaling.json"
MFU = "3 * forward FLOPs (products with weights, causal attention of full rows, output layer) / (seconds * {})"
CAUTION = (
    "The planner was made for GPUs. What it does not know of CPUs: pointwise kernels are not fused (they read and "
    "write several times what it counts, and layers keep 1.9 times as many activations), processes of one machine "
    "share its memory's bandwidth (that of a process among the fewest is what it is told), messages are not hidden "
    "behind products, and those of a few kilobytes take as long as they take to start."
)


def build_scaling_report(folder: Path) -> Path:
    """Build everything from what is in the folder; the path of the page. UserError when a file there is damaged."""
    scaling = load_scaling(folder / SCALING_FILE)
    return write_report(scaling, measured(scaling))[0]


def write_report(scaling: ScalingConfig, found: Measured) -> tuple[Path, list[Table]]:
    """The path of the page, and its tables."""
    folder = scaling.path
    done = finished_cells(folder, found)
    rows = rows_of(found, done)
    gpu = device_of(scaling, done)
    predictions: dict[str, Planned] = {}
    peaks: dict[str, float | None] = {}
    problem = ""
    for cell in done if gpu is not None else []:
        assert gpu is not None
        try:
            predictions[cell.cell.arm] = planned(cell, gpu)
            peaks[cell.cell.arm] = peak_of(scaling, cell, gpu)
        except ValueError as error:
            problem = f"No prediction: {error}."
    write_text(folder / RESULTS, "".join(json.dumps(cell.json(), allow_nan=False) + "\n" for cell in done))
    tables = scaling_tables(rows, predictions, peaks)
    others = [table for table in (estep_table(rows), parts_table(rows, predictions)) if table.rows]
    missing = statuses(folder, found.cells)
    notes = _notes(scaling, [cell for cell in done if cell.cell.arm in peaks], done, gpu, problem)
    pictures = write_pictures(folder, draw(rows, predictions))
    write_json(folder / FIGURES_FILE, _json(scaling, rows, predictions, peaks, gpu, missing))
    text = markdown([*tables, *others]) or "No cell is done yet.\n"
    write_text(folder / TABLES, f"## Scaling study {scaling.name}\n\n" + "".join(f"{n}\n\n" for n in notes) + text)
    page = render_page(
        "scaling.html",
        name=scaling.name,
        cells=len(found.cells),
        done=len(done),
        missing=missing,
        notes=notes,
        facts=_facts(scaling, found, done),
        tables=[*tables, *others],
        pictures=pictures,
        device=[(key, str(value)) for key, value in gpu.model_dump().items()] if gpu is not None else [],
        versions=versions_of([cell.cell.folder(folder) for cell in done]),
        study=(folder / SCALING_FILE).read_text(encoding="utf-8"),
    )
    write_text(folder / PAGE, page)
    return folder / PAGE, tables


def _notes(
    scaling: ScalingConfig, used: Sequence[CellFigures], done: Sequence[CellFigures], gpu: Gpu | None, problem: str
) -> list[str]:
    """What must be known to read the figures. used: the cells whose MFU is known."""
    notes = [problem] if problem else []
    over = sorted({cell.processes for cell in done if cell.oversubscribed})
    if over:
        cores = max(cell.raw["cores"] for cell in done)
        notes.append(
            f"† Oversubscribed: with {', '.join(map(str, over))} processes there are more threads than the {cores} "
            "cores, so that they wait for each other; these are no figures of scaling."
        )
    if any(cell.disturbed for cell in done):
        most = max(cell.raw["busy_cores"] for cell in done)
        notes.append(
            f"‡ A busy machine: right before a cell began, others used up to {most:.1f} cores. Times are longer than "
            "on a quiet machine, and say little."
        )
    if used and gpu is not None:
        precisions = {cell.precision for cell in used}
        if scaling.gpu == MEASURE:
            what = "what all processes reached at once in the same job, in the best of several square products"
        else:
            what = f"processes * peak of {gpu.name} in {' and '.join(sorted(precisions))}"
        notes.append(f"MFU = {MFU.format(what)}.")
    if any(cell.raw["probes"][0]["device"] == "cpu" for cell in done):
        notes.append(CAUTION)
    return notes


def _facts(scaling: ScalingConfig, found: Measured, done: Sequence[CellFigures]) -> list[tuple[str, str]]:
    rows = {"full": "generated documents of a whole row each", "corpus": "packed documents of the corpus"}
    threads = sorted({str(cell.raw["threads"]) for cell in done})
    nodes = sorted({str(len(cell.raw["nodes"])) for cell in done})
    return [
        ("cells", f"{len(done)} of {len(found.cells)} done"),
        ("processes", ", ".join(map(str, sorted(scaling.processes)))),
        ("layouts", "; ".join(scaling.layouts)),
        ("sizes", ", ".join(scaling.sized)),
        ("steps", f"{scaling.steps} behind {scaling.warmup} that are not counted, {scaling.repeats} repeats"),
        ("rows", rows[scaling.rows]),
        ("threads of a process", ", ".join(threads)),
        ("nodes", ", ".join(nodes)),
        ("prediction for", scaling.gpu),
        ("configuration", scaling.config or "defaults"),
    ]


def _json(
    scaling: ScalingConfig,
    rows: Sequence[Row],
    predictions: Mapping[str, Planned],
    peaks: Mapping[str, float | None],
    gpu: Gpu | None,
    missing: Sequence[Any],
) -> dict[str, Any]:
    return {
        "study": scaling.model_dump(),
        "device": None if gpu is None else gpu.model_dump(),
        "rows": [_row(row, predictions.get(row.point.arm), peaks) for row in rows],
        "missing": [status._asdict() for status in missing],
    }


def _row(row: Row, prediction: Planned | None, peaks: Mapping[str, float | None]) -> dict[str, Any]:
    point, seconds, tokens = row.point, row.step_seconds, row.tokens_per_second
    predicted = None
    if prediction is not None:
        predicted = {
            "step_seconds": prediction.step.total,
            "ratio": prediction.step.total / seconds.median,
            "parts": dict(prediction.step),
            "memory_gib": prediction.memory.as_dict(),
        }
    return {
        "mode": point.mode,
        "size": point.size,
        "layout": point.layout,
        "processes": point.processes,
        "batch": point.batch,
        "arm": point.arm,
        "repeats": len(row.cells),
        "step_seconds": vars(seconds),
        "step_seconds_p10_p90": row.percentiles,
        "tokens_per_second": vars(tokens),
        "tokens_per_second_per_process": tokens.median / point.processes,
        "speedup": row.speedup,
        "efficiency": row.efficiency,
        "relative_to": row.relative_to,
        "mfu": row.mfu(peaks),
        "peak_gib": [cell.peak_gib for cell in row.cells],
        "oversubscribed": any(cell.oversubscribed for cell in row.cells),
        "busy_machine": any(cell.disturbed for cell in row.cells),
        "estep": [cell.estep for cell in row.cells if cell.estep],
        "predicted": predicted,
    }
