"""The tables of a scaling study, for the page, the terminal and `table.md` alike."""

from collections.abc import Mapping, Sequence
from statistics import median

from ra3_megatron.report.numbers import ABSENT, count, percent
from ra3_megatron.scaling.search import Planned
from ra3_megatron.study.scaling.results import CellFigures, Row, Spread
from ra3_megatron.study.tables import Table

NAMES = {"strong": "Strong scaling", "weak": "Weak scaling"}
SHORT = ("size", "layout", "processes", "rows", "tokens/s", "step s", "efficiency", "MFU", "predicted s", "ratio")
"""Columns that a terminal has room for."""


def scaling_tables(
    rows: Sequence[Row], predictions: Mapping[str, Planned], peaks: Mapping[str, float | None]
) -> list[Table]:
    """One for each mode. predictions: by arm; peaks: as of `Row.mfu`."""
    found = []
    for mode in dict.fromkeys(row.point.mode for row in rows):
        cells = [_cells(row, predictions.get(row.point.arm), peaks) for row in rows if row.point.mode == mode]
        note = (
            "Medians over repeats, in brackets the smallest and the largest; step s: p10 to p90 over the steps of all "
            "repeats. Efficiency and speed-up are relative to the smallest number of processes of the same size and "
            "layout that is done: "
            + ("T1 / (n Tn)" if mode == "strong" else "T1 / Tn, with rows in proportion to processes")
            + ". ratio: predicted / measured seconds. GiB: of the fullest process, behind the warm-up."
        )
        found.append(Table(NAMES[mode], list(cells[0]), [list(row.values()) for row in cells], note))
    return found


def estep_table(rows: Sequence[Row]) -> Table:
    """E-step updates, where there were any."""
    header = ["arm", "processes", "documents/s", "update s", "thinking rate", "refit s", "engine"]
    table: dict[str, list[str]] = {}
    for row in rows:
        cells = [cell for cell in row.cells if cell.estep]
        if not cells:
            continue
        refits = [cell.estep["refit_seconds"] for cell in cells if "refit_seconds" in cell.estep]
        table[row.point.arm] = [
            row.point.arm,
            str(row.point.processes),
            spread(Spread.of([cell.estep["estep_documents_per_second"] for cell in cells])),
            spread(Spread.of([cell.estep["estep_seconds"] for cell in cells])),
            percent(median(cell.estep["estep_think_rate"] for cell in cells)),
            spread(Spread.of(refits)) if refits else ABSENT,
            f"{cells[0].raw['estep']['engine']}, {cells[0].raw['estep']['group_size']} a document",
        ]
    note = (
        "Documents of an update over its seconds: sampling, scoring and training. An E-step's cost depends on how "
        "often the model thinks; initial weights hardly ever do. It is not compared with a prediction: the "
        "planner's E-step is one of vLLM on GPUs."
    )
    return Table("E-step", header, list(table.values()), note)


def parts_table(rows: Sequence[Row], predictions: Mapping[str, Planned]) -> Table:
    """Parts of a step: as the trainer measured them, where it did, and as they are predicted."""
    arms = {row.point.arm: row for row in rows}
    header, table = ["arm", "part", "measured s", "predicted s"], []
    for arm, row in arms.items():
        measured: dict[str, float] = {}
        for name in row.cells[0].parts:
            measured[name] = median(cell.parts.get(name, 0.0) for cell in row.cells)
        predicted = dict(predictions[arm].step) if arm in predictions else {}
        for name in dict.fromkeys([*measured, *predicted]):
            one, other = measured.get(name), predicted.get(name)
            if one or other:
                table.append([arm, name, _three(one), _three(other)])
    note = "The trainer and the planner cut a step in different ways; parts of one name are those that both have."
    return Table("Parts of a step", header, table, note, grouped=True)


def short(table: Table) -> Table:
    """The same with the columns that a terminal has room for."""
    kept = [n for n, name in enumerate(table.header) if name in SHORT]
    return Table(table.title, [table.header[n] for n in kept], [[row[n] for n in kept] for row in table.rows])


def spread(found: Spread) -> str:
    """A median with the smallest and largest value, where there are several."""
    if found.low == found.high:
        return _three(found.median)
    return f"{_three(found.median)} [{_three(found.low)}, {_three(found.high)}]"


def _cells(row: Row, planned: Planned | None, peaks: Mapping[str, float | None]) -> dict[str, str]:
    point, seconds = row.point, row.step_seconds
    low, high = row.percentiles
    each = row.tokens_per_second.median / point.processes
    peak = Spread.of([cell.peak_gib for cell in row.cells])
    return {
        "size": point.size,
        "layout": point.layout,
        "processes": f"{point.processes}{_mark(row.cells)}",
        "rows": f"{point.batch:,}",
        "tokens/s": spread(row.tokens_per_second),
        "each": count(each),
        "step s": spread(seconds),
        "p10–p90": f"{_three(low)}–{_three(high)}",
        "speed-up": f"{row.speedup:.2f}",
        "efficiency": percent(row.efficiency),
        "MFU": percent(median(used) if (used := [m for m in row.mfu(peaks) if m is not None]) else None),
        "GiB": f"{peak.median:.2f}",
        "planned GiB": ABSENT if planned is None else f"{planned.memory.total:.2f}",
        "predicted s": ABSENT if planned is None else _three(planned.step.total),
        "ratio": ABSENT if planned is None else f"{planned.step.total / seconds.median:.2f}",
        "repeats": str(len(row.cells)),
    }


def _mark(cells: Sequence[CellFigures]) -> str:
    """What a reader must not miss: more threads than cores, or a machine that others used."""
    over = "†" if any(cell.oversubscribed for cell in cells) else ""
    return over + ("‡" if any(cell.disturbed for cell in cells) else "")


def _three(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
