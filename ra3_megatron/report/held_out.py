"""Held-out figures line by line: `evaluations/<arm>-<iteration>.lines.jsonl`, one sampled transcript a line.

What studies compare: every arm is measured on the same documents, so figures of two arms pair up by document and line.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.problems import first_problem
from ra3_megatron.report.run_folder import read_json, read_json_lines, write_text

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class LineFigures:
    """What the model makes of one primitive action, its thoughts in the context and without any."""

    __pydantic_config__ = _STRICT

    text: str
    """The expert's line, its line break included."""
    thought: str | None
    """Text of the thought before it, which was sampled (or observed, `evaluation.observed_thoughts`); None: <act>."""
    offered: bool
    """Whether there was a choice."""
    tokens: int
    """Visible tokens: the scored ones."""
    nll: float
    """-log pi(a_t | s_t, z_t), nats, summed over them."""
    raw_nll: float
    """The same without any thought."""
    greedy: bool
    """Greedy decoding would write these tokens."""
    raw_greedy: bool
    """The same without thoughts."""
    layout_nll: float
    """-log pi of its indentation and line break, nats."""
    raw_layout_nll: float
    """The same without thoughts."""
    thought_nll: float = 0.0
    """-log pi of the tokens of the thought, nats; 0 without one."""


@dataclass(frozen=True, kw_only=True)
class DocumentFigures:
    """One transcript of a held-out document."""

    __pydantic_config__ = _STRICT

    document: str
    """Identifier of the document."""
    sample: int
    """Number of the transcript among those of the document."""
    lines: list[LineFigures]
    """Line by line."""


_DOCUMENT = TypeAdapter(DocumentFigures)


def figures_file(run_dir: Path, arm: str, iteration: int) -> Path:
    """Held-out figures of an arm behind an iteration; 0 is the base."""
    return run_dir / "evaluations" / f"{arm}-{iteration}.json"


def read_figures(run_dir: Path, arm: str, iteration: int) -> dict[str, Any] | None:
    """What an evaluation wrote there; None: there was none yet. Raises UserError when the file holds something else."""
    file, remedy = figures_file(run_dir, arm, iteration), "delete it, and --resume measures again"
    if not file.is_file():
        return None
    found = read_json(file, remedy)
    if not isinstance(found, dict) or not {"arm", "iteration", "code_ce", "raw_code_ce", "elbo"} <= found.keys():
        raise UserError(f"{file}: holds no figures of an evaluation: {remedy}")
    return found


def lines_file(run_dir: Path, arm: str, iteration: int) -> Path:
    """Where the figures of an arm stand."""
    return run_dir / "evaluations" / f"{arm}-{iteration}.lines.jsonl"


def write_held_out(path: Path, documents: Iterable[DocumentFigures]) -> None:
    """Write them, as a whole. ValueError when a figure is NaN or infinite."""
    rows = (json.dumps(asdict(document), ensure_ascii=False, allow_nan=False) + "\n" for document in documents)
    write_text(path, "".join(rows))


def read_held_out(path: Path) -> list[DocumentFigures]:
    """All documents of a file. UserError when it cannot be read or has a row of another form."""
    documents = []
    for number, row in enumerate(read_json_lines(path), start=1):
        try:
            documents.append(_DOCUMENT.validate_python(row))
        except ValidationError as error:
            key, said = first_problem(error)
            raise UserError(f"{path}, line {number}: {key or 'line'}: {said}") from error
    return documents
