"""Where a model thinks in real code: thinking rate and what thoughts save, by kind of line."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ra3_megatron.report.held_out import LineFigures
from ra3_megatron.report.run_folder import write_json
from ra3_megatron.study.html import table
from ra3_megatron.study.predictions import Estimate, estimate
from ra3_megatron.study.report import ReportSection
from ra3_megatron.study.results import Finished, arms_only, by_group

KINDS_FILE = "kinds.json"
_KINDS: tuple[tuple[str, str], ...] = (
    ("definition", r"(async\s+)?(def|class)\b|@"),
    (
        "control",
        r"(async\s+)?(if|elif|else|for|while|with|try|except|finally)\b"
        r"|(match|case)\s+(?![=.,)\]:<>!]|(is|in|and|or|if|else|for|not\s+in)\b).*:\s*(#.*)?$",  # names elsewhere
    ),
    ("return or raise", r"(return|raise|yield|assert|break|continue|pass)\b"),
    ("import", r"(import|from|global|nonlocal)\b"),
    ("docstring", r"[rbuRBU]{0,2}(\"\"\"|''')"),
    ("assignment", r"[^=!<>(]*[^=!<>(+\-*/|&^%@]([+\-*/|&^%@]|//|\*\*|<<|>>)?=[^=]"),
)
OTHER = "expression"


def kind_of(text: str) -> str:
    """The kind of a line of Python, by how it starts."""
    visible = text.strip()
    return next((kind for kind, pattern in _KINDS if re.match(pattern, visible)), OTHER)


@dataclass(frozen=True)
class Kind:
    """The held-out lines of one kind, over seeds."""

    share: Estimate
    """Of all lines."""
    think_rate: Estimate
    """Share of them with a thought."""
    saved: Estimate | None
    """Nats a line that thoughts save, on the lines that have one; None where none has."""


def kinds(runs: Sequence[Sequence[LineFigures]]) -> dict[str, Kind]:
    """Figures by kind; runs: the lines of each seed."""
    split: list[dict[str, list[LineFigures]]] = []
    for lines in runs:
        groups: dict[str, list[LineFigures]] = {}
        for line in lines:
            groups.setdefault(kind_of(line.text), []).append(line)
        split.append(groups)
    found = {}
    for kind in [*(name for name, _ in _KINDS), OTHER]:
        there = [groups[kind] for groups in split if kind in groups]
        share = estimate([len(groups.get(kind, [])) / len(lines) for groups, lines in zip(split, runs, strict=True)])
        rate = estimate([_mean(group, lambda line: float(line.thought is not None)) for group in there])
        thinking = [[line for line in group if line.thought is not None] for group in there]
        saved = estimate([_mean(group, lambda line: line.raw_nll - line.nll) for group in thinking if group])
        if share is not None and rate is not None:
            found[kind] = Kind(share, rate, saved)
    return found


def _mean(lines: Sequence[LineFigures], value: Callable[[LineFigures], float]) -> float:
    return sum(value(line) for line in lines) / len(lines)


def sections(done: Sequence[Finished], folder: Path) -> list[ReportSection]:
    """One table for each arm that thinks."""
    found: dict[str, Mapping[str, Kind]] = {}
    for name, cells in by_group(arms_only(done)).items():
        documents = [cell.held_out(cell.last.iteration) or [] for cell in cells]
        runs = [[line for document in run for line in document.lines] for run in documents if run]
        if any(line.thought is not None for run in runs for line in run):
            found[name] = kinds(runs)
    values = {
        name: {kind: {"share": f.share.mean, "think_rate": f.think_rate.mean} for kind, f in by_kind.items()}
        for name, by_kind in found.items()
    }
    write_json(folder / KINDS_FILE, values)
    return [ReportSection(f"Thoughts by kind of line: {name}", table(_rows(k))) for name, k in found.items()]


def _rows(found: Mapping[str, Kind]) -> list[dict[str, str]]:
    return [
        {
            "kind of line": kind,
            "share of lines": figures.share.text("{:.1%}"),
            "thinking rate": figures.think_rate.text("{:.2%}"),
            "nats saved where it thinks": "-" if figures.saved is None else figures.saved.text("{:+.3f}"),
        }
        for kind, figures in found.items()
    ]
