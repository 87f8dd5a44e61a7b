"""What the report of a HopProg study shows beside the comparison of its arms: verdicts, ground truth, figures."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ra3_megatron.report.held_out import DocumentFigures
from ra3_megatron.report.run_folder import write_json
from ra3_megatron.study.hopprog.figures import draw_figures
from ra3_megatron.study.hopprog.groups import Group, groups_of, item_accuracy, thoughts_right
from ra3_megatron.study.hopprog.verdicts import verdicts
from ra3_megatron.study.html import table
from ra3_megatron.study.intervals import Interval, paired_difference
from ra3_megatron.study.predictions import Verdict
from ra3_megatron.study.report import ReportSection
from ra3_megatron.study.results import Finished
from ra3_megatron.tasks import measures
from ra3_megatron.tasks.measures import Line

TRUTH = "ground_truth.json"


def sections(done: Sequence[Finished], folder: Path) -> list[ReportSection]:
    """Verdicts and arms for the report of a study; written to `ground_truth.json` too."""
    groups = groups_of(done)
    found = verdicts(groups)
    rows = [_row(group, groups.get("ntp")) for group in groups.values()]
    write_json(
        folder / TRUTH,
        {
            "predictions": [verdict.__dict__ for verdict in found],
            "arms": {str(row["arm"]): row for row in rows},
        },
    )
    return [
        ReportSection("Predictions and their verdicts", table([_verdict_row(verdict) for verdict in found])),
        ReportSection("Ground truth, arm by arm", table(rows), draw_figures(groups)),
    ]


def _row(group: Group, ntp: Group | None) -> dict[str, str]:
    """What the page shows of one arm."""

    def shown(value: Callable[[list[Line]], float | None], form: str = "{:.3f}") -> str:
        found = group.over_seeds(value)
        return "-" if found is None else found.text(form)

    return {
        "arm": group.name,
        "seeds": str(len(group.lines)),
        "nats a line": shown(measures.nats_a_line),
        "less than NTP (paired)": "-" if ntp is None or ntp is group else _paired(group, ntp),
        "without thoughts": shown(lambda lines: measures.nats_a_line(lines, raw=True)),
        "items right": shown(item_accuracy, "{:.2f}"),
        "thinking rate": shown(lambda lines: measures.selectivity(lines).think_rate),
        "F1 at boundaries": shown(lambda lines: measures.selectivity(lines).f1),
        "inside items": shown(lambda lines: measures.selectivity(lines).inside_rate),
        "outside items": "-" if group.outside_rate is None else group.outside_rate.text(),
        "thoughts right": shown(thoughts_right, "{:.2f}"),
    }


def _paired(group: Group, ntp: Group) -> str:
    mine, other = group.documents, ntp.documents
    comparable = {s for s in mine.keys() & other.keys() if _code(mine[s]) == _code(other[s])}
    if not comparable:
        return "-"
    found: Interval = paired_difference({s: other[s] for s in comparable}, {s: mine[s] for s in comparable}, "line_nll")
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _code(documents: Sequence[DocumentFigures]) -> list[str]:
    return ["".join(line.text for line in document.lines) for document in documents]


def _verdict_row(verdict: Verdict) -> dict[str, str]:
    return {"": verdict.name, "predicted": verdict.claim, "verdict": verdict.word, "seen": verdict.seen}
