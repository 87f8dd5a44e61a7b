"""How sure a comparison of two arms is: differences paired by seed and held-out document, with 95% intervals.

Both arms are measured on the same documents, so what makes a document hard cancels in the difference. Two intervals:

- over seeds: Student's t over the differences of the seeds; needs three. It covers what another training run would
  give, on these documents.
- a two-level bootstrap, always: seeds are drawn with replacement, then documents; the same documents for all seeds, as
  the seeds share them. With one seed it says nothing about other seeds, and with a few it understates them (the spread
  of n seeds is drawn as that of a population, sqrt((n - 1) / n) too small, and without the tails of t).

A measure of a run is a ratio of sums over documents, such as nats per line: long documents count more, as in a run's
own figures.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from ra3_megatron.report.held_out import DocumentFigures
from ra3_megatron.study.measures import Better

Array = npt.NDArray[np.float64]
Runs = Mapping[int, Sequence[DocumentFigures]]
"""Held-out documents of one arm by seed."""

LEVEL = 0.95
RESAMPLES = 2000
MIN_SEEDS = 3
"""Seeds that an interval over seeds needs."""


@dataclass(frozen=True)
class DocumentMeasure:
    """A ratio of sums over documents."""

    title: str
    """For people, with the unit."""
    better: Better
    """Which way is better."""
    parts: Callable[[DocumentFigures], tuple[float, float]]
    """Numerator and denominator of one transcript."""
    form: str = "number"
    """How it is written: number or percent."""


LINE_MEASURES: dict[str, DocumentMeasure] = {
    "line_nll": DocumentMeasure(
        "code (nats/line)", "lower", lambda d: (sum(line.nll for line in d.lines), len(d.lines))
    ),
    "raw_line_nll": DocumentMeasure(
        "code without thoughts (nats/line)", "lower", lambda d: (sum(line.raw_nll for line in d.lines), len(d.lines))
    ),
    "token_nll": DocumentMeasure(
        "code (nats/token)",
        "lower",
        lambda d: (sum(line.nll for line in d.lines), sum(line.tokens for line in d.lines)),
    ),
    "raw_token_nll": DocumentMeasure(
        "code without thoughts (nats/token)",
        "lower",
        lambda d: (sum(line.raw_nll for line in d.lines), sum(line.tokens for line in d.lines)),
    ),
    "line_accuracy": DocumentMeasure(
        "lines right (greedy)", "higher", lambda d: (sum(line.greedy for line in d.lines), len(d.lines)), "percent"
    ),
    "raw_line_accuracy": DocumentMeasure(
        "lines right without thoughts",
        "higher",
        lambda d: (sum(line.raw_greedy for line in d.lines), len(d.lines)),
        "percent",
    ),
    "think_rate": DocumentMeasure(
        "thinking rate (lines)",
        "neither",
        lambda d: (sum(line.thought is not None for line in d.lines), len(d.lines)),
        "percent",
    ),
}
"""Measures that come from the lines of held-out documents; tokens are the visible ones of a line."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% intervals."""

    mean: float
    """Mean over seeds."""
    low: float
    """Lower end of the bootstrap interval."""
    high: float
    """Upper end of it."""
    n_seeds: int
    """Seeds."""
    n_documents: int
    """Documents that all seeds together have."""
    seeds_low: float | None = None
    """Lower end of the interval over seeds; None with fewer than three."""
    seeds_high: float | None = None
    """Upper end of it."""


def side_of(interval: Interval) -> Literal["higher", "lower"] | None:
    """The side of 0 on which every interval is that there is; None when one of them holds it."""
    ends = [(interval.low, interval.high)]
    if interval.seeds_low is not None and interval.seeds_high is not None:
        ends.append((interval.seeds_low, interval.seeds_high))
    if all(low > 0 for low, _ in ends):
        return "higher"
    return "lower" if all(high < 0 for _, high in ends) else None


def paired_difference(
    a: Runs, b: Runs, measure: DocumentMeasure | str, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """a minus b, paired by seed and document, with 95% intervals.

    Seeds and documents that only one of them has, or whose text differs, are left out. ValueError when none is left, or
    when a measure has nothing to be counted in (its denominator is 0) in a seed.
    """
    measure = LINE_MEASURES[measure] if isinstance(measure, str) else measure
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise ValueError(f"the two arms have no seed in common ({sorted(a)} and {sorted(b)})")
    sums = [(_sums(a[s], measure), _sums(b[s], measure)) for s in seeds]
    shared = [_same_documents(a[s], b[s]) for s in seeds]
    names = sorted({name for row in shared for name in row})
    if not all(shared):
        raise ValueError("the two arms have no held-out document in common")
    index = {name: number for number, name in enumerate(names)}
    tables = np.zeros((2, 2, len(seeds), len(names)))  # arm, numerator or denominator, seed, document
    for row, (pair, kept) in enumerate(zip(sums, shared, strict=True)):
        for arm in (0, 1):
            for name in kept:
                tables[arm, :, row, index[name]] = pair[arm][name]
    totals = tables.sum(axis=-1)
    if not np.all(totals[:, 1]):
        raise ValueError(f"{measure.title}: nothing to count in a seed")
    per_seed = totals[0, 0] / totals[0, 1] - totals[1, 0] / totals[1, 1]
    low, high = _bootstrap(tables, resamples, np.random.default_rng(seed))
    seeds_low, seeds_high = t_interval(per_seed.tolist()) or (None, None)
    return Interval(float(per_seed.mean()), low, high, len(seeds), len(names), seeds_low, seeds_high)


def _same_documents(a: Sequence[DocumentFigures], b: Sequence[DocumentFigures]) -> list[str]:
    """Names of the documents that both have with the same text."""
    one, other = ({d.document: "".join(line.text for line in d.lines) for d in reversed(runs)} for runs in (a, b))
    return sorted(name for name, text in one.items() if other.get(name) == text)


def _sums(documents: Sequence[DocumentFigures], measure: DocumentMeasure) -> dict[str, Array]:
    """Numerator and denominator of each document, summed over its transcripts."""
    found: dict[str, Array] = {}
    for document in documents:
        found[document.document] = found.get(document.document, np.zeros(2)) + np.asarray(measure.parts(document))
    return found


def _bootstrap(tables: Array, resamples: int, rng: np.random.Generator) -> tuple[float, float]:
    """Ends of the percentile interval of the mean difference over resampled seeds and documents."""
    _, _, seeds, documents = tables.shape
    seed_counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples).astype(np.float64)
    counts = rng.multinomial(documents, np.full(documents, 1 / documents), size=resamples).astype(np.float64)
    sums = np.einsum("rd,apsd->aprs", counts, tables, optimize=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = sums[0, 0] / sums[0, 1] - sums[1, 0] / sums[1, 1]
    drawn = np.where(seed_counts > 0, seed_counts * difference, 0.0).sum(axis=1) / seeds
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(np.where(np.isfinite(drawn), drawn, np.nan), [tail, 1 - tail])
    return float(low), float(high)


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95% interval of the mean of independent values by Student's t; None for fewer than three."""
    if len(values) < MIN_SEEDS:
        return None
    array = np.asarray(values, dtype=np.float64)
    quantile = float(stats.t.ppf(1 - (1 - LEVEL) / 2, len(values) - 1))
    half = quantile * float(array.std(ddof=1)) / math.sqrt(len(values))
    return float(array.mean()) - half, float(array.mean()) + half
