"""The gate and the predictions of HopProg, written down before any run, each with the rule of its verdict.

Arms are known by name (`examples/studies/hopprog.yaml`): gate, ntp, ra3, null_ntp, null_ra3, transplant, deep_ntp,
deep_ra3, and the price sweep `price`. An arm that is missing leaves its prediction "not run".
"""

from collections.abc import Mapping, Sequence
from statistics import linear_regression

from ra3_megatron.study.hopprog.groups import (
    PRICE,
    Group,
    item_accuracy,
    price_sweep,
    recall,
    recall_by_hops,
    thoughts_right,
)
from ra3_megatron.study.predictions import Verdict, Word, above, below, both, decided, estimate
from ra3_megatron.tasks import measures
from ra3_megatron.tasks.measures import Line

GATE_SOLVED, GATE_FAILED, GATE_THOUGHTS = 0.95, 0.50, 0.95
"""The gate: accuracy without thoughts at 0 hops at least, at `HARD` hops and more at most; right thoughts at least."""
HARD = 3
"""Hops from which the base must fail without thoughts."""
SELECTIVE_F1 = 0.9
GAIN = 0.3
"""Nats a line by which RA3 is to beat NTP."""
STAIRCASE = 0.9
"""Share of clear-cut prices and hops that must come out as the price says."""
FEW_THOUGHTS = 20
"""Thoughts of a seed below which what they tell of routines is not judged. A handful of thoughts drawn at random are
all different and seem to tell nearly all: 0.9 of the entropy in one of five draws of 10, in none of 300 draws of 20.
"""
NULL_GAIN = 0.02
"""Nats a line that count as no gain where nothing can be computed."""


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
        thoughts = thoughts_right(lines) or 0.0
        solved, failed = plain.get(0, 0.0), max(hard, default=1.0)
        words.append(solved >= GATE_SOLVED and failed < GATE_FAILED and thoughts >= GATE_THOUGHTS)
        by_hops = ", ".join(f"h={hops} {value:.3f}" for hops, value in plain.items())
        seen.append(f"seed {seed}: without thoughts {by_hops}; thoughts right {thoughts:.3f}")
    return Verdict("Gate", claim, "confirmed" if all(words) else "refuted", "; ".join(seen))


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
        Verdict(
            "P5 RLVR",
            "from RA3's start, problems of 3 items give RL a signal",
            "not run",
            "make rlvr-transfer gives the verdict",
        ),
        _granularity(groups),
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
    if ra3.outside_rate is not None:  # of which the other figures say nothing
        seen += f"; before lines outside of items {ra3.outside_rate.text()}"
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
        "the price is a staircase: boundaries whose thoughts save the base, which scores them, more than 2 c nats are "
        "thought at (above 80%), those whose thoughts save it less than c / 2 are not (below 20%), in more than "
        f"{STAIRCASE:.0%} of such cases"
    )
    sweep = price_sweep(groups)
    base = groups.get("gate")
    if len(sweep) < 3 or base is None:
        return Verdict("P2 price", claim, "not run", f"a sweep of {PRICE} in an arm called price, and an arm gate")
    gains = measures.gain_by_hops([line for run in base.lines.values() for line in run])
    shared = sorted(set.intersection(*(set(group.lines) for _, group in sweep)))
    kept, word = decided(
        [_staircase(gains, [(price, group.lines[s]) for price, group in sweep]) for s in shared],
        lambda found: above(found, STAIRCASE),
    )
    saved = ", ".join(f"h={hops} {gain:.2f}" for hops, gain in gains.items())
    rates = "; ".join(f"c={price:g}: {_by_hops(group)}" for price, group in sweep)
    seen = f"as predicted in {kept.text('{:.2f}') if kept else '-'} of the cases; nats that a thought saves an item"
    return Verdict("P2 price", claim, word, f"{seen}: {saved}; boundaries with a thought: {rates}")


def _staircase(gains: Mapping[int, float], sweep: Sequence[tuple[float, list[Line]]]) -> float | None:
    """Share of the clear-cut cases (price, hops) in which boundaries are thought at, or not, as the price says; None
    where no case is clear-cut. Hops that the tasks of a price do not have are no case."""
    kept = []
    for price, lines in sweep:
        for hops, gain in gains.items():
            at = [line for line in lines if line.truth.boundary and line.truth.hops == hops]
            if not at:
                continue
            rate = recall(at)
            if gain > 2 * price:
                kept.append(rate > 0.8)
            elif gain < price / 2:
                kept.append(rate < 0.2)
    return sum(kept) / len(kept) if kept else None


def _by_hops(group: Group) -> str:
    return ", ".join(f"h={hops} {rate:.2f}" for hops, rate in recall_by_hops(group).items())


def _meaning(ra3: Group | None, transplant: Group | None) -> Verdict:
    claim = "the thought tells the routine (I >= 0.9 H), and lines follow a transplanted thought (at least 90%)"
    if ra3 is None:
        return Verdict("P3 meaning", claim, "not run", "no arm ra3")
    shares = [_information_share(lines) for lines in ra3.lines.values()]
    share, word = decided(shares, lambda found: above(found, 0.9))
    seen = f"I(thought; routine) / H(routine) {share.text()}" if share else ""
    if transplant is None:
        return Verdict("P3 meaning", claim, "not run", f"{seen}; no arm transplant")
    follows = transplant.over_seeds(item_accuracy)
    assert follows is not None
    seen += f"; items whose lines follow a thought that contradicts the tables {follows.text()}"
    return Verdict("P3 meaning", claim, both(word, above(follows, 0.9)), seen)


def _information_share(lines: list[Line]) -> float | None:
    """None where routines do not differ, or few lines have a thought."""
    if sum(line.truth.boundary and line.figures.thought is not None for line in lines) < FEW_THOUGHTS:
        return None
    information, entropy = measures.mutual_information(lines)
    return information / entropy if entropy else None


def _persistence(ra3: Group | None) -> Verdict:
    claim = "a thought stays in force for as long as its routine is (slope of duration against length above 0.8)"
    if ra3 is None:
        return Verdict("P4 persistence", claim, "not run", "no arm ra3")
    slopes = [_slope(measures.durations(lines)) for lines in ra3.lines.values()]
    slope, word = decided(slopes, lambda found: above(found, 0.8))
    pooled = measures.durations([line for lines in ra3.lines.values() for line in lines])
    seen = "; ".join(f"{length} lines: {mean:.2f}" for length, mean in pooled.items())
    return Verdict("P4 persistence", claim, word, f"slope {slope.text() if slope else '-'} ({seen})")


def _slope(points: Mapping[int, float]) -> float | None:
    """Least-squares slope of the values against the keys; None of fewer than two points."""
    if len(points) < 2:
        return None
    return linear_regression(list(points), list(points.values())).slope


def _granularity(groups: Mapping[str, Group]) -> Verdict:
    claim = f"it gains at least {GAIN} nats a line over NTP also where it may think before each statement or each token"
    ntp = groups.get("ntp")
    arms = {name: groups[name] for name in ("statement", "token") if name in groups}
    if ntp is None or len(arms) < 2:
        return Verdict("P6 granularity", claim, "not run", "arms ntp, statement and token are needed")
    words, seen = [], []
    for name, arm in arms.items():
        plain = groups.get(f"ntp_{name}", ntp)  # from the same base
        shared = sorted(plain.lines.keys() & arm.lines.keys())
        gain = estimate([measures.nats_a_line(plain.lines[s]) - measures.nats_a_line(arm.lines[s]) for s in shared])
        words.append(above(gain, GAIN))
        seen.append(f"{name} {gain.text() if gain else '-'}")
    return Verdict("P6 granularity", claim, both(*words), "gain in nats a line: " + ", ".join(seen))


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
    seen = f"gain lost {found.text()} nats a line" if found else ""
    bases = {name: groups[arm] for name, arm in (("base", "gate"), ("deeper base", "deep_gate")) if arm in groups}
    for name, base in bases.items():  # the claim's premise
        seen += f"; {name}, first line without thoughts {_without_thoughts(base)}"
    return Verdict("N2 depth", claim, above(found, 0.0), seen)


def _without_thoughts(base: Group) -> str:
    """Share of first lines that the base writes without a thought, by hops, over all seeds."""
    plain = measures.first_line_accuracy([line for run in base.lines.values() for line in run], raw=True)
    return ", ".join(f"h={hops} {value:.3f}" for hops, value in plain.items())
