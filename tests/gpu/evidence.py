"""What a part finds, on disk as soon as it is known: a part that is killed leaves what it had.

A row is a figure (measured, with its unit and spread), or a check (a value, the bounds that it must keep, whether it
does). What could not run is named with the reason; what failed, with its error. Nothing stands for a missing number.
"""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measure import Timing

STICKY = ("CUDA error", "cudaError", "CUBLAS_STATUS", "device-side assert")
"""In the message of an error behind which a process cannot use its GPU any more."""
NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""In the message of one that leaves the GPU as it was. torch's allocator has a class for it; CUDA (modules, graphs),
cuBLAS, Triton and Transformer Engine have none."""
DIGITS = 5
"""Significant digits of values."""
LINE = 300
"""Characters of an error that are kept."""


class Evidence:
    """The rows of one part."""

    def __init__(self, file: Path, part: str, title: str, small: bool, seconds: float = math.inf) -> None:
        """file: where the rows go; seconds: how long the part may take."""
        self.file, self._begin, self._limit = file, time.monotonic(), seconds
        self.content: dict[str, Any] = {
            "part": part,
            "title": title,
            "evidence": not small,
            "status": "running",
            "seconds": 0.0,
            "rows": [],
            "series": {},
            "missing": [],
            "errors": [],
        }
        self._write()

    @property
    def left(self) -> float:
        """Seconds until the part is ended."""
        return self._limit - (time.monotonic() - self._begin)

    def figure(
        self,
        name: str,
        value: float | str,
        unit: str = "",
        low: float | None = None,
        high: float | None = None,
        note: str = "",
    ) -> None:
        """Something measured; low, high: least and greatest of its repeats."""
        self._add({"name": name, "value": value, "unit": unit, "low": low, "high": high, "note": note})

    def rate(self, name: str, timing: Timing, work: float, unit: str, note: str = "") -> None:
        """`work` a second, of repeats."""
        seconds = timing.seconds
        self.figure(name, work / timing.median, unit, work / max(seconds), work / min(seconds), note)

    def check(
        self,
        name: str,
        value: float,
        at_most: float | None = None,
        at_least: float | None = None,
        unit: str = "",
        note: str = "",
    ) -> bool:
        """A value that must keep bounds; whether it does. One that is not finite does not."""
        holds = math.isfinite(value)
        holds = holds and (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
        row = {"name": name, "value": value, "unit": unit, "at_most": at_most, "at_least": at_least, "note": note}
        self._add({**row, "holds": holds})
        return holds

    def series(self, name: str, values: Sequence[float]) -> None:
        """A curve: one value a step."""
        self.content["series"][name] = [_short(float(value)) for value in values]
        self._write()

    def missing(self, name: str, why: str) -> None:
        """Something that did not run."""
        self.content["missing"].append({"name": name, "why": why})
        self._write()
        say(f"  not run: {name}: {why}")

    def enough(self, name: str, seconds: float) -> bool:
        """Whether so many seconds are left for what is called `name`; what there is no time for is named."""
        if self.left >= seconds:
            return True
        self.missing(name, f"{max(0.0, self.left):.0f} s were left of the part's time, {seconds:.0f} are needed")
        return False

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Within it, an error is written down, and the part goes on. One that spoils the GPU ends the part.

        What does not fit the memory has not run; that is no error.
        """
        try:
            yield
        except Exception as error:
            traceback.print_exception(error)  # in the part's log file
            if any(sign in str(error) for sign in NO_MEMORY):
                self.missing(name, "out of memory")
            else:
                self.fail(name, error)
                if any(sign in str(error) for sign in STICKY):
                    raise
        else:
            return
        _free()  # behind the error, which holds what it was raised in

    def fail(self, name: str, error: BaseException | str) -> None:
        """An error, in one line."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        line = " ".join(text.split())[:LINE]
        self.content["errors"].append({"name": name, "error": line})
        self._write()
        say(f"  FAILED {name}: {line}")

    def end(self, status: str) -> None:
        """The part has ended: `complete`, `failed`."""
        self.content["status"] = status
        self._write()

    def _add(self, row: Mapping[str, Any]) -> None:
        kept = {key: _short(value) for key, value in row.items() if value is not None and value != ""}
        self.content["rows"].append(kept)
        self._write()
        say(f"  {line_of(kept)}")

    def _write(self) -> None:
        self.content["seconds"] = round(time.monotonic() - self._begin, 1)
        write_json(self.file, self.content)


def largest(values: Iterable[float]) -> float:
    """Of at least one value; NaN where one is, which Python's `max` passes over."""
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found)


def line_of(row: Mapping[str, Any]) -> str:
    """A row as a line of the log."""
    text = f"{row['name']}: {row['value']}" + (f" {row['unit']}" if row.get("unit") else "")
    if "low" in row:
        text += f" ({row['low']} to {row['high']})"
    if "holds" in row:
        text += f" [{bounds_of(row)}: {'holds' if row['holds'] else 'DOES NOT HOLD'}]"
    return text


def bounds_of(row: Mapping[str, Any]) -> str:
    """The bounds of a check."""
    parts = [f">= {row['at_least']}"] if "at_least" in row else []
    return ", ".join(parts + ([f"<= {row['at_most']}"] if "at_most" in row else []))


def say(line: str) -> None:
    """A line of progress; those of a part begin with two spaces."""
    os.write(1, f"{line}\n".encode())


def write_json(file: Path, content: Any) -> None:
    """Replace a file: it is never half-written."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)


def _short(value: Any) -> Any:
    """Numbers with as many digits as mean something; what is not finite, for which JSON has no numbers, as text."""
    if isinstance(value, bool) or not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)


def _free() -> None:
    """Give memory back that an error left behind."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
