"""Transcripts for people: `transcripts/<name>.jsonl`, one sampled transcript a line, as text with its figures.

A file is written whole and atomically, under a name made of phase, iteration and step (`estep-1-0020`, say): a resumed
run that repeats a step replaces the file by the same one.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.problems import first_problem
from ra3_megatron.report.run_folder import RunFolder, read_json_lines, write_text

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class LineRecord:
    """One primitive action of a transcript and the latent chosen before it."""

    __pydantic_config__ = _STRICT

    text: str
    """The expert's line, its line break included."""
    thought: str | None = None
    """Text of the new thought; None: <act>."""
    offered: bool = True
    """Whether there was a choice."""
    log_prob: float = 0.0
    """log q of the decision and the thought, nats."""
    reward: float | None = None
    """log-likelihood minus price and penalties, nats."""
    log_likelihood: float | None = None
    """log pi of the line, nats (per token or summed, as `estep.likelihood` says)."""
    advantage: float | None = None
    """Truncated return minus the baseline."""


@dataclass(frozen=True, kw_only=True)
class TranscriptRecord:
    """One rollout of one document."""

    __pydantic_config__ = _STRICT

    document: str
    """Identifier of the document."""
    iteration: int
    """EM iteration."""
    step: int
    """Update within the phase."""
    rollout: int
    """Index within the group of the document."""
    weight_version: int
    """Version of the weights that sampled it."""
    lines: list[LineRecord]
    """The document, line by line."""


_ADAPTER = TypeAdapter(TranscriptRecord)


def write_transcripts(run_dir: Path | str, name: str, transcripts: Iterable[TranscriptRecord]) -> Path:
    """Write `transcripts/<name>.jsonl`, replacing one that is there; its path.

    Raises:
        ValueError: `name` is no plain file name, or a figure is NaN or infinite.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name):
        raise ValueError(f"transcripts name {name!r}: use letters, digits, '-', '_', '.', '+'")
    path = RunFolder(Path(run_dir)).transcripts / f"{name}.jsonl"
    lines = (json.dumps(asdict(item), ensure_ascii=False, allow_nan=False) + "\n" for item in transcripts)
    write_text(path, "".join(lines))
    return path


def read_transcripts(path: Path | str) -> Iterator[TranscriptRecord]:
    """The transcripts of one file, in order.

    Raises:
        UserError: the file cannot be read, or a line has another form.
    """
    for number, value in enumerate(read_json_lines(Path(path)), start=1):
        try:
            yield _ADAPTER.validate_python(value)
        except ValidationError as error:
            key, said = first_problem(error)
            raise UserError(f"{path}, line {number}: {key or 'line'}: {said}") from error


def transcript_files(run_dir: Path | str) -> list[Path]:
    """The transcript files of a run, in the order in which they were written (by name when written at once)."""
    files = RunFolder(Path(run_dir)).transcripts.glob("*.jsonl")
    return sorted(files, key=lambda path: (path.stat().st_mtime_ns, _natural(path.stem)))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which `step-2` comes before `step-10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
