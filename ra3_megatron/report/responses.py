"""Responses for people: `responses/<name>.jsonl`, one response a line with what became of it, written atomically."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ra3_megatron.report.run_folder import read_json_lines, write_text

FOLDER = "responses"


@dataclass(frozen=True, kw_only=True)
class ResponseRecord:
    """One response to a problem."""

    problem: str
    step: int
    """Updates behind which it was sampled."""
    prompt: str
    text: str
    """What was written, thoughts included."""
    reward: float
    verdict: str
    passed: int
    """Tests that passed."""
    total: int
    """Tests."""
    detail: str
    """What went wrong."""
    code_prompt: bool = False
    """The prompt is Python that the response goes on with."""


def write_responses(run_dir: Path, name: str, records: Iterable[ResponseRecord]) -> Path:
    """Write a file of responses; its path."""
    file = run_dir / FOLDER / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records))
    return file


def read_responses(file: Path) -> Iterator[ResponseRecord]:
    """The responses of a file."""
    return (ResponseRecord(**record) for record in read_json_lines(file))
