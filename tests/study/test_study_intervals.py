"""Intervals of paired differences: exact on made data, coverage by simulation, exchange of the arms."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from made_study import documents, line
from scipy import stats

from ra3_megatron.report.held_out import DocumentFigures
from ra3_megatron.study.intervals import (
    LINE_MEASURES,
    DocumentMeasure,
    Interval,
    paired_difference,
    side_of,
    t_interval,
)


def test_interval_over_seeds_needs_three_and_is_students() -> None:
    assert t_interval([1.0, 2.0]) is None
    values = [0.3, 0.1, 0.7, 0.4]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert t_interval(values) == pytest.approx((low, high))


def test_a_constant_difference_is_found_exactly() -> None:
    a = {seed: documents(lambda d, n, s=seed: 3.0 + d + 0.1 * n + s - 0.25) for seed in (1, 2, 3)}
    b = {seed: documents(lambda d, n, s=seed: 3.0 + d + 0.1 * n + s) for seed in (1, 2, 3)}
    found = paired_difference(a, b, "line_nll")
    for value in (found.mean, found.low, found.high, found.seeds_low, found.seeds_high):
        assert value == pytest.approx(-0.25, abs=1e-9)
    assert (found.n_seeds, found.n_documents) == (3, 12)
    assert paired_difference(a, b, "token_nll").mean == pytest.approx(-0.25 / 4)


def test_measures_are_ratios_of_sums() -> None:
    thinking = DocumentFigures(document="d", sample=0, lines=[line(1.0, "# so", 2, True), line(2.0, None, 6)])
    silent = DocumentFigures(document="d", sample=1, lines=[line(3.0, None, 2, True)])
    nothing = {1: [DocumentFigures(document="d", sample=0, lines=[line(0.0, None, 1)] * 2)]}
    expected = {"line_nll": 6 / 3, "raw_line_nll": 6.3 / 3 - 0.1, "token_nll": 6 / 10, "raw_token_nll": 6.3 / 10 - 0.1}
    expected |= {"line_accuracy": 2 / 3, "raw_line_accuracy": 0.0, "think_rate": 1 / 3}
    assert expected.keys() == LINE_MEASURES.keys()
    for name, value in expected.items():
        found = paired_difference({1: [thinking, silent]}, nothing, name)
        assert (found.mean, found.low, found.high) == pytest.approx((value, value, value)), name
        assert found.seeds_low is None


def noisy(draw: random.Random, shift: float) -> dict[int, list[DocumentFigures]]:
    hard = [draw.gauss(0, 1) for _ in range(12)]
    return {
        seed: documents(lambda d, n, e=draw.gauss(0, 0.1): 5 + hard[d] + e + shift + draw.gauss(0, 0.2))
        for seed in (1, 2, 3)
    }


def test_exchange_of_the_arms_changes_the_sign_alone() -> None:
    draw = random.Random(1)
    a, b = noisy(draw, 0.0), noisy(draw, 0.3)
    one, other = paired_difference(a, b, "line_nll"), paired_difference(b, a, "line_nll")
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low))
    assert (one.seeds_low, one.seeds_high) == pytest.approx((-other.seeds_high, -other.seeds_low))


def test_the_same_runs_give_the_same_interval_and_pairing_matters() -> None:
    draw = random.Random(2)
    a = noisy(draw, 0.0)
    b = {seed: documents(lambda d, n, s=seed: a[s][d].lines[n].nll + 0.1) for seed in a}
    found = paired_difference(a, b, "line_nll")
    assert found == paired_difference(a, b, "line_nll")
    assert found.high - found.low < 1e-9  # although documents differ by nats
    mixed = {seed: documents(lambda d, n, s=seed: a[s][11 - d].lines[n].nll + 0.1) for seed in a}
    wide = paired_difference(a, mixed, "line_nll")
    assert wide.mean == pytest.approx(found.mean)
    assert wide.high - wide.low > 0.1


@pytest.mark.parametrize(("kind", "share"), [("bootstrap", 0.95), ("seeds", 0.95)])
def test_coverage_by_simulation(kind: str, share: float) -> None:
    """Documents that respond differently, the same for all seeds (bootstrap); seeds that differ (Student's t)."""
    rng, truth, hits, repeats = np.random.default_rng(3), 0.2, 0, 300
    for _ in range(repeats):
        response = truth + 0.5 * rng.standard_normal(40) if kind == "bootstrap" else np.full(40, truth)
        by_seed = np.zeros(4) if kind == "bootstrap" else 0.3 * rng.standard_normal(4)
        base = documents(lambda d, n: 3.0, 40, 1)
        gains = [(response + effect).tolist() for effect in by_seed]
        a = {s: documents(lambda d, n, g=gain: 3.0 + g[d], 40, 1) for s, gain in enumerate(gains)}
        found = paired_difference(a, dict.fromkeys(range(4), base), "line_nll", resamples=400)
        low, high = (found.low, found.high) if kind == "bootstrap" else (found.seeds_low, found.seeds_high)
        hits += low <= truth <= high
    assert abs(hits / repeats - share) < 0.04, hits / repeats


def test_only_what_both_have_counts() -> None:
    a = {1: documents(lambda d, n: 1.0, 5), 2: documents(lambda d, n: 9.0, 5)}
    b = {1: documents(lambda d, n: 2.0 if d < 3 else 99.0, 3), 3: documents(lambda d, n: 0.0, 5)}
    found = paired_difference(a, b, "line_nll")
    assert (found.mean, found.n_seeds, found.n_documents) == (pytest.approx(-1.0), 1, 3)
    changed = [replace(d, lines=[replace(item, text="y\n") for item in d.lines]) for d in b[1][:1]]
    found = paired_difference(a, {1: [*changed, *b[1][1:]]}, "line_nll")
    assert (found.mean, found.n_documents) == (pytest.approx(-1.0), 2)  # the same name, another text
    with pytest.raises(ValueError, match="no seed in common"):
        paired_difference(a, {7: a[1]}, "line_nll")
    other = [DocumentFigures(document="other", sample=0, lines=[line(1.0)])]
    with pytest.raises(ValueError, match="no held-out document in common"):
        paired_difference({1: a[1]}, {1: other}, "line_nll")
    with pytest.raises(ValueError, match="nothing to count"):
        paired_difference(a, b, DocumentMeasure("per thought", "neither", lambda d: (1.0, 0.0)))


@pytest.mark.parametrize(
    ("documents", "seeds", "side"),
    [
        ((0.1, 0.3), None, "higher"),
        ((-0.3, -0.1), None, "lower"),
        ((-0.1, 0.3), None, None),
        ((0.0, 0.3), None, None),
        ((-0.3, 0.0), None, None),
        ((0.1, 0.3), (0.05, 0.4), "higher"),
        ((0.1, 0.3), (-0.05, 0.4), None),
        ((-0.1, 0.3), (0.05, 0.4), None),
        ((-0.3, -0.1), (-0.4, -0.05), "lower"),
        ((-0.3, -0.1), (-0.4, 0.05), None),
        ((-0.3, -0.1), (0.05, 0.4), None),
    ],
)
def test_an_interval_that_holds_0_tells_no_side(
    documents: tuple[float, float], seeds: tuple[float, float] | None, side: str | None
) -> None:
    """Both have to: over documents, and over seeds where there are enough."""
    low, high = seeds or (None, None)
    assert side_of(Interval(0.0, *documents, 3, 10, low, high)) == side
