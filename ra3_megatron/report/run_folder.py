"""The run folder: the names of its files, and reading and writing them so that a kill leaves whole files behind.

The run folder is the whole truth of a run. Text files are replaced atomically; `*.jsonl` files may end in a torn line
(a kill in the middle of a write), which readers drop.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.yaml_io import parse


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder. Nothing is created by making one."""

    path: Path

    @property
    def config(self) -> Path:
        """Resolved configuration; a folder without it is no run."""
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        """What the data was: documents, hashes, versions."""
        return self.path / "manifest.json"

    @property
    def problems(self) -> Path:
        """What the problems of an RLVR run were; a run with it is one."""
        return self.path / "problems.json"

    @property
    def versions(self) -> Path:
        """Software and machine."""
        return self.path / "versions.json"

    @property
    def precision(self) -> Path:
        """In which precision the layers computed, and with whose kernels."""
        return self.path / "precision.json"

    @property
    def metrics(self) -> Path:
        """One JSON line a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Distributed checkpoints."""
        return self.path / "checkpoints"

    @property
    def transcripts(self) -> Path:
        """Sampled transcripts, one JSON line each."""
        return self.path / "transcripts"

    @property
    def summary(self) -> Path:
        """Headline figures, written at the end of a run."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """The report for people."""
        return self.path / "report.html"

    @property
    def figures(self) -> Path:
        """Pictures of the report, one PNG each."""
        return self.path / "figures"

    @property
    def profile(self) -> Path:
        """Traces of single steps."""
        return self.path / "profile"


def require_run(run_dir: Path | str) -> RunFolder:
    """The run folder at `run_dir`.

    Raises:
        UserError: there is no such folder, or it holds no `config.yaml`.
    """
    folder = RunFolder(Path(run_dir))
    if not folder.path.is_dir():
        raise UserError(f"{folder.path}: no such folder; name the folder of a run (its run_dir)")
    if not folder.config.is_file():
        raise UserError(f"{folder.path}: not the folder of a run (it has no {folder.config.name})")
    return folder


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` atomically and durably; after a kill either the old or the new text is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically.

    Raises:
        ValueError: it holds NaN or an infinity, which JSON cannot express.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str = "") -> Any:
    """The value in a JSON file. remedy: what to do when it holds none, if anything helps.

    Raises:
        UserError: the file is missing, unreadable or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}){remedy and f': {remedy}'}") from error


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file of a run; None: there is no such file. UserError when it holds something else."""
    if not path.exists():
        return None
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object")
    return value


def read_config(folder: RunFolder) -> str:
    """The text of a run's `config.yaml`. Raises UserError when it cannot be read, or is no YAML with keys."""
    try:
        text = folder.config.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder.config}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{folder.config}: is not UTF-8 text") from error
    if not isinstance(parse(text, str(folder.config)) or {}, dict):
        raise UserError(f"{folder.config}:1: must be a mapping of keys")
    return text


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a `*.jsonl` file, in order, without a torn last line.

    Raises:
        UserError: the file cannot be read, or a line before the last one is not a JSON object.
    """
    try:
        with path.open("rb") as file:
            yield from _parse_lines(path, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _parse_lines(path: Path, lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    broken: int | None = None
    for number, line in enumerate(lines, start=1):
        if broken is not None:
            raise UserError(f"{path}, line {broken}: not a JSON object; only the last line may be incomplete")
        value = _parse_object(line)
        if value is None:
            broken = number
        else:
            yield value


def _parse_object(line: bytes) -> dict[str, Any] | None:
    """The object on a line; None when the line is torn (no line break) or holds something else."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
