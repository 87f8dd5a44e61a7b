"""Two results on the same tasks, or two modes of one: the difference task by task, with a paired bootstrap and
McNemar's exact test.
"""

from collections.abc import Iterator
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.evaluate.estimates import difference

HEADINGS = ("suite", "mode", "metric", "k", "A", "B", "B - A", "95% over tasks", "only A / only B", "p (McNemar)")
_MUST_AGREE = ("harness", "data_sha256", "prompts_sha256", "stops")
"""Of a suite."""
_SETTINGS = ("temperature", "top_p", "max_new_tokens")


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for every suite, mode, metric and k that both have.

    Raises UserError when they share nothing, or a suite that both have was not run alike.
    """
    shared = [name for name in a["suites"] if name in b["suites"]]
    if not shared:
        raise UserError(f"no suite in common: A has {', '.join(a['suites'])}, B has {', '.join(b['suites'])}")
    rows = [row for name in shared for row in _suite(name, a, b)]
    if not rows:
        raise UserError("no mode with the same number k of samples in common: compare results of equal --mode and --k")
    return rows


def _suite(name: str, a: dict[str, Any], b: dict[str, Any]) -> Iterator[dict[str, Any]]:
    one, other = a["suites"][name], b["suites"][name]
    for key in _MUST_AGREE:
        if one[key] != other[key]:
            raise UserError(f"suite {name}: A and B have another {key} ({_short(one[key])}, {_short(other[key])})")
    for mode, first in one["modes"].items():
        second = other["modes"].get(mode)
        if second is not None:
            yield from _pairs(name, mode, first, second)


def compare_modes(results: dict[str, Any], a: str, b: str) -> list[dict[str, Any]]:
    """One row for every suite, metric and k that has both modes: mode b minus mode a of the same weights.

    Raises UserError when no suite has both, or they were not run alike.
    """
    modes = {name: suite["modes"] for name, suite in results["suites"].items()}
    both = [name for name, of_suite in modes.items() if a in of_suite and b in of_suite]
    if not both:
        have = "; ".join(f"{name} has {', '.join(of_suite)}" for name, of_suite in modes.items())
        raise UserError(f"--modes={a},{b}: no suite has both modes: {have or 'there is no suite'}")
    rows = [row for name in both for row in _pairs(name, f"{a}, {b}", modes[name][a], modes[name][b])]
    if not rows:
        raise UserError(f"--modes={a},{b}: no number k of samples in common")
    return rows


def _pairs(name: str, mode: str, first: dict[str, Any], second: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of two modes of one suite, task by task."""
    for key in _SETTINGS:
        if first.get(key) != second.get(key):
            raise UserError(f"suite {name}, {mode}: A and B have another {key} ({first.get(key)}, {second.get(key)})")
    for metric, counts in first["counts"].items():
        if list(counts) != list(second["counts"][metric]):
            raise UserError(f"suite {name}, {mode}: A and B have other tasks")
        pair = [[(n, c) for n, c in facts["counts"][metric].values()] for facts in (first, second)]
        for k, value in first["estimates"][metric].items():
            if k not in second["estimates"][metric]:
                continue
            found = difference(pair[0], pair[1], int(k.removeprefix("pass@")))
            yield {
                "suite": name,
                "mode": mode,
                "metric": metric,
                "k": k,
                "tasks": len(pair[0]),
                "a": value["value"],
                "b": second["estimates"][metric][k]["value"],
                **found.row(),
            }


def table_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    """For `HEADINGS`."""
    return [
        [
            f"{row['suite']} ({row['tasks']})",
            row["mode"],
            row["metric"],
            row["k"],
            f"{100 * row['a']:.1f}%",
            f"{100 * row['b']:.1f}%",
            f"{100 * row['value']:+.1f}",
            f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}",
            "–" if row["only_a"] is None else f"{row['only_a']} / {row['only_b']}",
            "–" if row["p_value"] is None else f"{row['p_value']:.3g}",
        ]
        for row in rows
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}…"
