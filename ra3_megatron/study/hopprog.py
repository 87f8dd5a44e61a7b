"""What ground truth says of a HopProg study: the gate, a table of arms, and the verdicts of the predictions.

Arms are known by name (`examples/studies/hopprog.yaml`): gate, ntp, ra3, always, oracle, shuffled, filler, moved,
rejection, null_ntp, null_ra3, transplant, and the price sweep `price`. An arm that is missing leaves its prediction
"not run".
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ra3_megatron.config.load import load_config
from ra3_megatron.corpus.generated import Tasks
from ra3_megatron.report.held_out import DocumentFigures
from ra3_megatron.report.run_folder import write_json
from ra3_megatron.study.html import table
from ra3_megatron.study.intervals import Interval, paired_difference
from ra3_megatron.study.predictions import Estimate, Verdict, Word, above, below, both, estimate
from ra3_megatron.study.report import ReportSection
from ra3_megatron.study.results import Finished, arms_only, by_group
from ra3_megatron.study.spec import BASE
from ra3_megatron.tasks import measures
from ra3_megatron.tasks.measures import Line

TRUTH, PRICE = "ground_truth.json", "estep.latent_price"
GATE_SOLVED, GATE_FAILED, GATE_THOUGHTS = 0.95, 0.50, 0.95
"""The gate: accuracy without thoughts at 0 hops at least, at `HARD` hops and more at most; right thoughts at least."""
HARD = 3
"""Hops from which the base must fail without thoughts."""
SELECTIVE_F1 = 0.9
GAIN = 0.3
"""Nats a line by which RA3 is to beat NTP."""
STAIRCASE = 0.9
"""Share of clear-cut prices and hops that must come out as the price says."""
NULL_GAIN = 0.02
"""Nats a line that count as no gain where nothing can be computed."""


@dataclass(frozen=True)
class Group:
    """One arm and grid point: its held-out documents, and their lines with the truth, by seed."""

    name: str
    point: Mapping[str, Any]
    documents: Mapping[int, list[DocumentFigures]]
    lines: Mapping[int, list[Line]]

    def over_seeds(self, value: Callable[[list[Line]], float]) -> Estimate | None:
        """A figure of the lines, over seeds."""
        return estimate([value(lines) for lines in self.lines.values()])


def groups_of(done: Sequence[Finished]) -> dict[str, Group]:
    """Groups whose corpora are tasks, by name; `base` is the model that the arms start from, on the arms' tasks."""
    groups = by_group(arms_only(done))
    found = {name: _group(name, cells) for name, cells in groups.items()}
    if "ntp" in groups:
        found[BASE] = _group(BASE, groups["ntp"], iteration=0)
    return {name: group for name, group in found.items() if group.lines}


def _group(name: str, cells: Sequence[Finished], iteration: int | None = None) -> Group:
    """The figures after an EM iteration; None: the last one."""
    documents, lines = {}, {}
    for cell in cells:
        corpus = load_config(cell.folder / "config.yaml", resolved=True).corpus
        held_out = cell.held_out(cell.last.iteration if iteration is None else iteration)
        if held_out and corpus.source == "tasks":
            documents[cell.cell.seed] = held_out
            lines[cell.cell.seed] = measures.lines_of(held_out, Tasks(corpus).task_named)
    return Group(name, cells[0].cell.point, documents, lines)


# -- the gate ---------------------------------------------------------------------------------------------------------


def gate(base: Group | None) -> Verdict:
    """Whether the base is one on which a comparison means something. base: on tasks of 0 hops and more."""
    claim = (
        f"the base writes the first line at h = 0 (at least {GATE_SOLVED:.0%}), not at h >= {HARD} (below "
        f"{GATE_FAILED:.0%}), both without thoughts, and its thoughts are right (at least {GATE_THOUGHTS:.0%})"
    )
    if base is None:
        return Verdict("Gate", claim, "not run", "no arm gate")
    words, seen = [], []
    for seed, lines in base.lines.items():
        plain = measures.first_line_accuracy(lines, raw=True)
        hard = [value for hops, value in plain.items() if hops >= HARD]
        right = [line.right_thought for line in lines if line.truth.boundary and line.right_thought is not None]
        thoughts = sum(right) / len(right) if right else 0.0
        solved, failed = plain.get(0, 0.0), max(hard, default=1.0)
        words.append(solved >= GATE_SOLVED and failed < GATE_FAILED and thoughts >= GATE_THOUGHTS)
        by_hops = ", ".join(f"h={hops} {value:.2f}" for hops, value in plain.items())
        seen.append(f"seed {seed}: without thoughts {by_hops}; thoughts right {thoughts:.2f}")
    return Verdict("Gate", claim, "confirmed" if all(words) else "refuted", "; ".join(seen))


# -- the predictions --------------------------------------------------------------------------------------------------


def verdicts(groups: Mapping[str, Group]) -> list[Verdict]:
    """The gate and every prediction."""
    ra3 = groups.get("ra3")
    return [
        gate(groups.get("gate")),
        _selectivity(ra3),
        _gain(groups),
        _prices(groups),
        _meaning(ra3, groups.get("transplant")),
        _persistence(ra3),
        Verdict("P5 RLVR", "from RA3's start, problems of 3 items give RL a signal", "not run", "there is no RLVR yet"),
        Verdict("P6 granularity", "decisions per token, line, statement, routine", "not run", "no such arms"),
        _null(groups),
        _depth(groups),
    ]


def _selectivity(ra3: Group | None) -> Verdict:
    claim = f"thoughts stand at true boundaries: F1 > {SELECTIVE_F1}, and none inside items (below 5%)"
    if ra3 is None:
        return Verdict("P1 selectivity", claim, "not run", "no arm ra3")
    f1 = ra3.over_seeds(lambda lines: measures.selectivity(lines).f1)
    inside = ra3.over_seeds(lambda lines: measures.selectivity(lines).inside_rate)
    rate = ra3.over_seeds(lambda lines: measures.selectivity(lines).think_rate)
    ideal = ra3.over_seeds(lambda lines: measures.selectivity(lines).boundary_rate)
    assert f1 and inside and rate and ideal
    seen = f"F1 {f1.text()}, inside {inside.text()}, thinking rate {rate.text()} (ideal {ideal.mean:.3f})"
    return Verdict("P1 selectivity", claim, both(above(f1, SELECTIVE_F1), below(inside, 0.05)), seen)


def _gain(groups: Mapping[str, Group]) -> Verdict:
    claim = f"RA3's held-out code costs at least {GAIN} nats a line less than NTP's, with disjoint intervals"
    ntp, ra3 = groups.get("ntp"), groups.get("ra3")
    if ntp is None or ra3 is None:
        return Verdict("Gain", claim, "not run", "arms ntp and ra3 are needed")
    shared = ntp.lines.keys() & ra3.lines.keys()
    gain = estimate([measures.nats_a_line(ntp.lines[s]) - measures.nats_a_line(ra3.lines[s]) for s in sorted(shared)])
    plain, thinking = ntp.over_seeds(measures.nats_a_line), ra3.over_seeds(measures.nats_a_line)
    if gain is None or plain is None or thinking is None:
        return Verdict("Gain", claim, "not run", "no seed has both")
    seen = f"NTP {plain.text()}, RA3 {thinking.text()}, difference {gain.text()} nats a line"
    disjoint: Word = "undecided"
    if thinking.high is not None and plain.low is not None:
        disjoint = "confirmed" if thinking.high < plain.low else "refuted"
    return Verdict("Gain", claim, both(above(gain, GAIN), disjoint), seen)


def _prices(groups: Mapping[str, Group]) -> Verdict:
    claim = (
        "the price is a staircase: boundaries whose thoughts save more than 2 c nats are thought at (above 80%), those "
        f"whose thoughts save less than c / 2 are not (below 20%), in more than {STAIRCASE:.0%} of such cases"
    )
    sweep = sorted(
        (
            (float(group.point[PRICE]), group)
            for name, group in groups.items()
            if name.startswith("price,") and PRICE in group.point
        ),
        key=lambda pair: pair[0],
    )
    if len(sweep) < 3:
        return Verdict("P2 price", claim, "not run", f"no sweep of {PRICE} in an arm called price")
    cheapest = sweep[0][1].lines
    shared = sorted(set.intersection(*(set(group.lines) for _, group in sweep)))
    gains = {seed: measures.gain_by_hops(cheapest[seed]) for seed in shared}
    kept = estimate([_staircase(gains[s], [(price, group.lines[s]) for price, group in sweep]) for s in shared])
    all_gains = measures.gain_by_hops([line for seed in shared for line in cheapest[seed]])
    saved = ", ".join(f"h={hops} {gain:.2f}" for hops, gain in all_gains.items())
    rates = "; ".join(f"c={price:g}: {_by_hops(group)}" for price, group in sweep)
    seen = f"as predicted in {kept.text('{:.2f}') if kept else '-'} of the cases; nats that a thought saves an item"
    return Verdict("P2 price", claim, above(kept, STAIRCASE), f"{seen}: {saved}; boundaries with a thought: {rates}")


def _staircase(gains: Mapping[int, float], sweep: Sequence[tuple[float, list[Line]]]) -> float:
    """Share of the clear-cut cases (price, hops) in which boundaries are thought at, or not, as the price says."""
    kept = []
    for price, lines in sweep:
        for hops, gain in gains.items():
            recall = _recall([line for line in lines if line.truth.hops == hops])
            if gain > 2 * price:
                kept.append(recall > 0.8)
            elif gain < price / 2:
                kept.append(recall < 0.2)
    return sum(kept) / len(kept) if kept else 0.0


def _recall(lines: list[Line]) -> float:
    return measures.selectivity(lines).recall


def _by_hops(group: Group) -> str:
    """Share of the boundaries with a thought, by hops, over all seeds."""
    lines = [line for run in group.lines.values() for line in run]
    hops = sorted({line.truth.hops for line in lines})
    return ", ".join(f"h={h} {_recall([line for line in lines if line.truth.hops == h]):.2f}" for h in hops)


def _meaning(ra3: Group | None, transplant: Group | None) -> Verdict:
    claim = "the thought tells the routine (I >= 0.9 H), and lines follow a transplanted thought (at least 90%)"
    if ra3 is None:
        return Verdict("P3 meaning", claim, "not run", "no arm ra3")
    share = ra3.over_seeds(_information_share)
    seen = f"I(thought; routine) / H(routine) {share.text()}" if share else ""
    if transplant is None:
        return Verdict("P3 meaning", claim, "not run", f"{seen}; no arm transplant")
    follows = transplant.over_seeds(_item_accuracy)
    assert follows is not None
    seen += f"; items whose lines follow a thought that contradicts the tables {follows.text()}"
    return Verdict("P3 meaning", claim, both(above(share, 0.9), above(follows, 0.9)), seen)


def _information_share(lines: list[Line]) -> float:
    information, entropy = measures.mutual_information(lines)
    return information / entropy if entropy else 0.0


def _item_accuracy(lines: list[Line]) -> float:
    by_hops = measures.item_accuracy(lines, raw=False)
    counts = {hops: sum(line.truth.boundary and line.truth.hops == hops for line in lines) for hops in by_hops}
    return sum(by_hops[hops] * counts[hops] for hops in by_hops) / max(1, sum(counts.values()))


def _persistence(ra3: Group | None) -> Verdict:
    claim = "a thought stays in force for as long as its routine is (slope of duration against length above 0.8)"
    if ra3 is None:
        return Verdict("P4 persistence", claim, "not run", "no arm ra3")
    slope = ra3.over_seeds(lambda lines: _slope(measures.durations(lines)))
    pooled = measures.durations([line for lines in ra3.lines.values() for line in lines])
    seen = "; ".join(f"{length} lines: {mean:.2f}" for length, mean in pooled.items())
    return Verdict("P4 persistence", claim, above(slope, 0.8), f"slope {slope.text() if slope else '-'} ({seen})")


def _slope(points: Mapping[int, float]) -> float:
    if len(points) < 2:
        return 0.0
    x, y = list(points), list(points.values())
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def _null(groups: Mapping[str, Group]) -> Verdict:
    claim = f"where routines are drawn at random, RA3 gains nothing over NTP (below {NULL_GAIN} nats a line)"
    ntp, ra3 = groups.get("null_ntp"), groups.get("null_ra3")
    if ntp is None or ra3 is None:
        return Verdict("N1 null", claim, "not run", "arms null_ntp and null_ra3 are needed")
    shared = sorted(ntp.lines.keys() & ra3.lines.keys())
    gain = estimate([measures.nats_a_line(ntp.lines[s]) - measures.nats_a_line(ra3.lines[s]) for s in shared])
    rate = ra3.over_seeds(lambda lines: measures.selectivity(lines).think_rate)
    return Verdict(
        "N1 null",
        claim,
        below(gain, NULL_GAIN),
        f"difference {gain.text() if gain else '-'} nats a line, thinking rate {rate.text() if rate else '-'}",
    )


def _depth(groups: Mapping[str, Group]) -> Verdict:
    claim = "a deeper model, which solves more hops in one pass, gains less from thoughts"
    arms = [groups.get(name) for name in ("ntp", "ra3", "deep_ntp", "deep_ra3")]
    if any(arm is None for arm in arms):
        return Verdict("N2 depth", claim, "not run", "arms deep_ntp and deep_ra3 are needed")
    ntp, ra3, deep_ntp, deep_ra3 = (arm.lines for arm in arms if arm is not None)
    shared = sorted(ntp.keys() & ra3.keys() & deep_ntp.keys() & deep_ra3.keys())
    nats = measures.nats_a_line
    lost = [(nats(ntp[s]) - nats(ra3[s])) - (nats(deep_ntp[s]) - nats(deep_ra3[s])) for s in shared]
    found = estimate(lost)
    return Verdict("N2 depth", claim, above(found, 0.0), f"gain lost {found.text()} nats a line" if found else "")


# -- the page ---------------------------------------------------------------------------------------------------------


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
        ReportSection("Ground truth, arm by arm", table(rows)),
    ]


def _row(group: Group, ntp: Group | None) -> dict[str, str]:
    """What the page shows of one arm."""

    def shown(value: Callable[[list[Line]], float], form: str = "{:.3f}") -> str:
        found = group.over_seeds(value)
        return "-" if found is None else found.text(form)

    return {
        "arm": group.name,
        "seeds": str(len(group.lines)),
        "nats a line": shown(measures.nats_a_line),
        "less than NTP (paired)": "-" if ntp is None or ntp is group else _paired(group, ntp),
        "without thoughts": shown(lambda lines: measures.nats_a_line(lines, raw=True)),
        "items right": shown(_item_accuracy, "{:.2f}"),
        "thinking rate": shown(lambda lines: measures.selectivity(lines).think_rate),
        "F1 at boundaries": shown(lambda lines: measures.selectivity(lines).f1),
        "inside items": shown(lambda lines: measures.selectivity(lines).inside_rate),
        "thoughts right": shown(_thoughts_right, "{:.2f}"),
    }


def _thoughts_right(lines: list[Line]) -> float:
    said = [line.right_thought for line in lines if line.truth.boundary and line.right_thought is not None]
    return sum(said) / len(said) if said else 0.0


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
