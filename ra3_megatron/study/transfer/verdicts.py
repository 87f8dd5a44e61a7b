"""What mid-training by RA3 is said to do for RL, each claim with the rule of its verdict (P5 of HopProg).

Starts are known by name: ra3 against ntp and base. Figures are paired by seed; a level that was never reached counts as
all the updates that were spent, and where the two starts had not as many, the pair says nothing. The rules are older
than the runs of docs/evidence.md.
"""

from collections.abc import Mapping, Sequence

from ra3_megatron.study.predictions import Estimate, Verdict, above, below, both, decided, estimate
from ra3_megatron.study.tables import Table
from ra3_megatron.study.transfer.curves import Curve, Run, by_start

THINKS, PLAIN = "ra3", "ntp"
NO_SIGNAL, SIGNAL = 0.05, 0.10
"""Shares of the first updates' groups that have a gradient: at most, without a signal; at least, with one."""
FIRST = 5
"""Updates that say whether there was a signal: later ones have it from what RL has learnt."""
SOON = 0.5
"""pass@1 whose first crossing is compared."""

BySeed = Mapping[int, Curve]


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """Every claim; "not run" without the starts that it names."""
    starts = {name: {run.cell.seed: run.curve for run in found} for name, found in by_start(runs).items()}
    thinks = starts.get(THINKS, {})
    found = [_signal(thinks, starts.get(PLAIN, {}))]
    for name in starts:
        if name != THINKS:
            found += [_sooner(thinks, starts[name], name), _higher(thinks, starts[name], name)]
    return found


def verdicts_table(runs: Sequence[Run]) -> Table:
    """The claims as a table; no rows when the study has no start called ra3."""
    found = verdicts(runs) if any(run.cell.group == THINKS for run in runs) else []
    return Table(
        "Predictions and their verdicts",
        ["", "predicted", "verdict", "seen"],
        [[verdict.name, verdict.claim, verdict.word, verdict.seen] for verdict in found],
        "Confirmed: the whole 95% interval over seeds (Student's t, three seeds at least) is on the predicted side; "
        "refuted: on the other; undecided otherwise.",
    )


def _signal(thinks: BySeed, plain: BySeed) -> Verdict:
    claim = (
        f"in the first {FIRST} updates, groups with a gradient are at most {NO_SIGNAL:.0%} from {PLAIN}, at least "
        f"{SIGNAL:.0%} from {THINKS}"
    )
    some, high = decided(list(map(_first, thinks.values())), lambda found: above(found, SIGNAL))
    none, low = decided(list(map(_first, plain.values())), lambda found: below(found, NO_SIGNAL))
    return Verdict("P5 signal", claim, both(low, high), f"{PLAIN} {_text(none)}, {THINKS} {_text(some)}")


def _sooner(thinks: BySeed, other: BySeed, name: str) -> Verdict:
    claim = f"{SOON:.0%} after fewer updates from {THINKS} than from {name}"
    saved, word = decided(
        [_saved(thinks[seed], other[seed]) for seed in sorted(thinks.keys() & other.keys())],
        lambda found: above(found, 0.0),
    )
    return Verdict(f"P5 speed, {name}", claim, word, f"{_text(saved, '{:.1f}')} updates fewer")


def _higher(thinks: BySeed, other: BySeed, name: str) -> Verdict:
    claim = f"a higher rate in the last quarter from {THINKS} than from {name}"
    shared = sorted(thinks.keys() & other.keys())
    gain = estimate([100 * (thinks[seed].asymptote - other[seed].asymptote) for seed in shared])
    return Verdict(f"P5 end, {name}", claim, above(gain, 0.0), f"{_text(gain, '{:.1f}')} percentage points more")


def _first(curve: Curve) -> float | None:
    """Share of groups with a signal in the first updates; None of a run without updates."""
    first = curve.signal[:FIRST]
    return sum(first) / len(first) if first else None


def _saved(thinks: Curve, other: Curve) -> float | None:
    """Updates fewer to `SOON`; None where one never reached it and the two had not as many updates."""
    a, b = thinks.reached(SOON, "steps"), other.reached(SOON, "steps")
    if (a is None or b is None) and thinks.steps[-1] != other.steps[-1]:
        return None
    return float(other.steps[-1] if b is None else b) - float(thinks.steps[-1] if a is None else a)


def _text(found: Estimate | None, form: str = "{:.1%}") -> str:
    return found.text(form) if found else "-"
