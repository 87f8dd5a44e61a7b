"""The tables of a study as text, for the page, the terminal and `table.md` alike."""

from collections.abc import Sequence
from dataclasses import dataclass

from ra3_megatron.report.numbers import ABSENT, count, duration, number, percent
from ra3_megatron.study.comparison import Difference, MStepCheck, mean_of
from ra3_megatron.study.intervals import LINE_MEASURES, Interval, side_of
from ra3_megatron.study.measures import MEASURES
from ra3_megatron.study.results import Finished, Row, by_group, seeds_of_means, with_shared_seeds

COLUMNS = {
    "code_ce": "code CE",
    "raw_code_ce": "no thoughts",
    "code_accuracy": "accuracy",
    "think_rate": "thinks",
    "mean_thought_tokens": "length",
    "elbo": "ELBO",
    "tokens": "tokens",
    "total_seconds": "time",
    "flops": "FLOPs",
}
"""Measures of the table of results, and their short titles."""
SHORT = ("code_ce", "code_accuracy", "think_rate", "tokens", "total_seconds")
"""Those that a terminal has room for."""
_FORMS = {"percent": percent, "count": count, "seconds": duration, "tenths": lambda value: number(value, 1)}


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names the row, the others are figures."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    """What one must know to read it."""
    grouped: bool = False
    """The first column is a heading of the rows that share it."""


def figure(value: float | None, form: str) -> str:
    """A measure as it is written in tables."""
    if value is None:
        return ABSENT
    return _FORMS[form](value) if form in _FORMS else number(value, 4)


def results_table(
    done: Sequence[Finished], columns: Sequence[str] = tuple(COLUMNS), start_of: str | None = None
) -> Table:
    """Figures of each arm and grid point after its last EM iteration: means over seeds.

    start_of: group whose model before the first iteration heads the table.
    """
    rows = []

    def add(name: str, found: Sequence[Row]) -> None:
        values = [mean_of([row.figures[column] for row in found]) for column in columns]
        cells = [figure(value, MEASURES[column].form) for column, value in zip(columns, values, strict=True)]
        rows.append([name, str(len(found)), *cells])

    groups = by_group(with_shared_seeds(done))
    if start_of in groups:
        add(f"start of {start_of}", [member.rows[0] for member in groups[start_of]])
    for group, members in groups.items():
        add(group, [member.last for member in members])
    header = ["arm", "seeds", *(COLUMNS[name] for name in columns)]
    kept = [n for n, _ in enumerate(header) if n < 2 or any(row[n] != ABSENT for row in rows)]
    return Table(
        "Held-out figures",
        [header[n] for n in kept],
        [[row[n] for n in kept] for row in rows],
        f"{seeds_of_means(done)}, after the last EM iteration (start: before the first). "
        "Cross-entropies (CE) in nats per code token, given the thoughts in the context, and without any; accuracy: "
        "code tokens that greedy decoding would write; ELBO in nats per line; length in tokens; time with E-steps "
        "and infusion, of cells that may have shared the machine. Tokens, time and FLOPs are those "
        "behind the base or warm start.",
    )


def differences_table(found: Sequence[Difference]) -> Table:
    """Each group minus its reference, with both intervals."""
    rows = []
    for item in found:
        for name, interval in item.intervals.items():
            measure = LINE_MEASURES[name]
            rows.append(
                [
                    f"{item.group} − {item.reference}",
                    measure.title,
                    signed(interval.mean, measure.form),
                    bounds(interval.low, interval.high, measure.form),
                    bounds(interval.seeds_low, interval.seeds_high, measure.form),
                    _reading(interval, measure.better),
                    f"{interval.n_seeds} × {interval.n_documents}",
                ]
            )
    header = ["arm − reference", "measure", "difference", "bootstrap", "over seeds", "reading", "seeds × documents"]
    return Table(
        "Differences",
        header,
        rows,
        "Paired by seed and held-out document; 95% intervals by a bootstrap of seeds and documents and, with three "
        "seeds or more, by Student's t over seeds. A reading is given where every interval leaves out 0; with fewer "
        "than three seeds it is about these seeds and no others. With few seeds the bootstrap is too narrow.",
        grouped=True,
    )


def mstep_table(checks: Sequence[MStepCheck]) -> Table:
    """Whether each M-step lowered the cross-entropy of code."""
    rows = []
    for check in checks:
        interval = check.interval
        lines = (
            [signed(interval.mean, "number"), bounds(interval.low, interval.high, "number")]
            if interval
            else [ABSENT] * 2
        )
        before, after = number(check.before, 4), number(check.after, 4)
        rows.append([check.group, str(check.iteration), before, after, check.verdict, *lines])
    header = ["arm", "iteration", "code CE before", "after", "verdict", "visible tokens", "bootstrap"]
    return Table(
        "M-steps",
        header,
        rows,
        "Held-out code cross-entropy (nats per token, means over seeds) before and after each M-step. Last columns: "
        "the change in nats per visible token, without indentation and line breaks, paired by document. A verdict is "
        "given where every interval of that change (the bootstrap's and, with three seeds or more, Student's t over "
        "seeds) leaves out 0 on the side of the means; with fewer than three seeds it is about these seeds alone.",
    )


def signed(value: float, form: str) -> str:
    """A difference with its sign; of shares in percentage points."""
    return f"{100 * value:+.2f} pp" if form == "percent" else f"{value:+.4f}"


def bounds(low: float | None, high: float | None, form: str) -> str:
    """An interval; a dash when there is none."""
    if low is None or high is None:
        return ABSENT
    return f"[{100 * low:+.2f}, {100 * high:+.2f}]" if form == "percent" else f"[{low:+.4f}, {high:+.4f}]"


def _reading(interval: Interval, better: str) -> str:
    side = side_of(interval)
    if side is None:
        return "not told apart"
    word = side if better == "neither" else "better" if side == better else "worse"
    return word if interval.seeds_low is not None else f"{word} (these seeds)"


def markdown(tables: Sequence[Table]) -> str:
    """Tables as Markdown, each under a heading."""
    parts = []
    for table in (table for table in tables if table.rows):
        lines = [f"### {table.title}", "", _row(table.header)]
        lines.append("|" + "|".join("---" if n == 0 else "---:" for n in range(len(table.header))) + "|")
        lines += [_row(row) for row in table.rows]
        parts.append("\n".join([*lines, "", table.note, ""]) if table.note else "\n".join([*lines, ""]))
    return "\n".join(parts)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
