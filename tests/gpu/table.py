"""The results as a markdown table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.gpu.evidence import bounds_of


def table(results: dict[str, Any]) -> str:
    """The machine, then every row of every part, what did not run, and what failed."""
    return "\n".join([*_head(results), *(line for part in results["parts"].values() for line in _part(part))]) + "\n"


def _head(results: dict[str, Any]) -> Iterator[str]:
    machine = results["machine"]
    yield f"# GPU suite, {machine['date']}"
    yield ""
    if not results["evidence"]:
        yield "**Small form: tiny shapes that exercise the code. No figure here is evidence.**"
        yield ""
    yield "| | |"
    yield "|---|---|"
    gpu = machine["gpu"]
    if gpu:
        yield f"| GPU | {gpu}, {machine['memory_gib']} GiB, compute capability {machine['capability']} |"
        yield f"| driver, largest SM clock, power limit | {machine['driver'] or 'unknown'} |"
        yield f"| CUDA, cuDNN of torch | {machine['cuda']}, {machine['cudnn']} |"
    else:
        yield "| GPU | none |"
    yield f"| processor | {machine['processor']}, {machine['cores']} cores |"
    named = ("torch", "transformer-engine", "megatron-core", "transformers", "triton")
    found = machine["packages"]
    versions = ", ".join(f"{name} {found[name] or 'none'}" for name in named)
    yield f"| packages | Python {machine['python']}, {versions} |"
    changed = " with changes" if machine["modified"] else ""
    yield f"| C compiler, for torch.compile and Triton | {machine['compiler'] or 'none'} |"
    yield f"| commit | {machine['commit'] or 'unknown'}{changed} |"


def _part(part: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield f"## {part['part']}: {part['title']}"
    yield ""
    yield f"{part['status']}, {part['seconds']:.0f} s" + ("" if part["evidence"] else " (small form: no evidence)")
    if part["rows"]:
        yield ""
        yield "| | value | least to greatest | must be | holds | note |"
        yield "|---|---|---|---|---|---|"
    for row in part["rows"]:
        spread = f"{row['low']:,} to {row['high']:,}" if "low" in row else ""
        holds = {None: "", True: "yes", False: "**NO**"}[row.get("holds")]
        cells = (row["name"], _value(row), spread, bounds_of(row), holds, row.get("note", ""))
        yield "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"
    for series, values in part["series"].items():
        yield ""
        yield f"Curve `{series}`: {len(values)} values, first {values[0]}, last {values[-1]} (in the json)."
    for heading, key, text in (("Not run", "missing", "why"), ("Errors", "errors", "error")):
        if part[key]:
            yield ""
            yield f"{heading}:"
            yield ""
            yield from (f"- {entry['name']}: {entry[text]}" for entry in part[key])


def _value(row: dict[str, Any]) -> str:
    value = row["value"]
    number = f"{value:,}" if isinstance(value, int | float) else str(value)
    return f"{number} {row['unit']}" if row.get("unit") else number
