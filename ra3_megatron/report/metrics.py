"""The metrics of a run: `metrics.jsonl`, mirrored to TensorBoard.

A line is `{"phase", "iteration", "step", "global_step", **values, "time"}`. `global_step` is the index of the line in
the file; it is the step in TensorBoard, so that the curves of one phase in successive EM iterations follow each other.
Every line is flushed when it is written. A value that is not finite is written as null, its name in the list
"nonfinite"; a value that does not exist (None) as null alone. After `rewind` a resumed run writes the same lines as the
uninterrupted one, except for `TIME_FIELDS`.

Names that the report draws (any other name is stored all the same):
    phases     warm_start, estep, infuse, mstep, ntp (the control), evaluation (with the string `arm`: base, ntp, ra3)
    training   loss, code_ce, thought_ce, grad_norm, learning_rate, tokens_per_second, seconds
    E-step     reward, think_rate, mean_thought_tokens, decision_entropy, advantage_std, log_prob_mismatch,
               largest_log_prob_difference, refit_seconds
    benchmarks evaluations on suites of tasks, made in the phase `of`: SUITE/MODE/METRIC (a share of 1),
               SUITE/MODE/tokens (a sample), SUITE/MODE/thought_share, SUITE/reference/METRIC
    monitors   a line with the strings `monitor`, `message` and `advice` says that a sign of failure was seen
Also stored of every training step: decision_ce, of the markers that hold decisions (`tokens` format); tokens; and
fill_rate, the share of the positions of its micro-batches that hold one (the only value, times aside, that depends on
the layout and on the size of micro-batches). Of E-steps:
distinct_transcripts, the share of the transcripts that differ (equal ones are scored and trained on once; tokens counts
them once).
Of every training step, as the main process saw it (docs/profiling.md):
    seconds_PART         in each part of the step (`PARTS`); they add up to `seconds`, and refit has refit_seconds in it
    seconds_checkpoint   saving checkpoints between the line before and this step; not in `seconds`
    peak_memory_gib      on a GPU: most memory that tensors held at once during the step, GiB
    peak_rss_gib         on a CPU: most memory of the process so far, since it began, GiB
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.report.run_folder import RunFolder, read_json_lines, write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PARTS = (
    "data",
    "sampling",
    "refit",
    "grading",
    "scoring",
    "forward",
    "backward",
    "pipeline",
    "grad_reduce",
    "optimizer",
    "evaluation",
    "other",
)
"""Parts of a training step, in the order of tables: `seconds_PART` of each that the step has add up to `seconds`."""

TIME_FIELDS = frozenset(
    {
        "time",
        "seconds",
        *(f"seconds_{part}" for part in PARTS),
        "seconds_checkpoint",
        "tokens_per_second",
        "documents_per_second",
        "refit_seconds",
        "refit_bytes_per_second",
        "peak_memory_gib",
        "peak_rss_gib",
    }
)
"""Fields that depend on the clock or the machine; all others are the same in a resumed and an uninterrupted run."""

RESERVED_FIELDS = frozenset({"phase", "iteration", "step", "global_step", "nonfinite", "time"})
"""Fields that `MetricsWriter.write` sets itself."""

Value = float | int | str | None


class MetricsWriter:
    """Appends to the metrics of a run. One process (global rank 0) holds one; use it as a context or `close` it."""

    def __init__(self, run_dir: Path | str, tensorboard: bool = True) -> None:
        """Open the metrics of `run_dir` for appending; a torn last line of an earlier process is removed.

        Raises:
            UserError: the existing `metrics.jsonl` is damaged before its last line.
        """
        self._folder = RunFolder(Path(run_dir))
        self._folder.path.mkdir(parents=True, exist_ok=True)
        self._use_tensorboard = tensorboard
        self._events: SummaryWriter | None = None
        records = read_metrics(self._folder.path)
        self._global_step = len(records)
        self._drop_torn_line(records)
        self._file = self._folder.metrics.open("a", encoding="utf-8")

    @property
    def global_step(self) -> int:
        """Lines in the file, which is the `global_step` of the next one."""
        return self._global_step

    def write(self, phase: str, iteration: int, step: int, values: Mapping[str, Value]) -> None:
        """Append one line, and each number as the TensorBoard scalar `phase/name` (strings as texts).

        Raises:
            ValueError: a name in `values` is one of `RESERVED_FIELDS`.
            TypeError: a value is neither a number, a string nor None.
        """
        now = time.time()
        plain = {name: _plain(name, value) for name, value in values.items()}
        nonfinite = [name for name, value in plain.items() if isinstance(value, float) and not math.isfinite(value)]
        record: dict[str, Any] = {
            "phase": phase,
            "iteration": int(iteration),
            "step": int(step),
            "global_step": self._global_step,
            **{name: None if name in nonfinite else value for name, value in plain.items()},
        }
        if nonfinite:
            record["nonfinite"] = nonfinite
        record["time"] = round(now, 3)
        self._file.write(_line(record))
        self._file.flush()
        if self._use_tensorboard:
            self._write_events(phase, plain, now)
        self._global_step += 1

    def rewind(self, keep: Callable[[dict[str, Any]], bool]) -> int:
        """Drop the first line that `keep` refuses and all lines behind it; the number of lines dropped.

        The file is replaced atomically, and TensorBoard forgets the steps dropped.
        """
        records = read_metrics(self._folder.path)
        kept = next((index for index, record in enumerate(records) if not keep(record)), len(records))
        if kept < len(records):
            self._close_events()
            self._file.close()
            write_text(self._folder.metrics, "".join(map(_line, records[:kept])))
            self._file = self._folder.metrics.open("a", encoding="utf-8")
        self._global_step = kept
        return len(records) - kept

    def sync(self) -> None:
        """Force the lines to disk. Call it before a checkpoint that stands behind them becomes valid."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the files; safe to call twice."""
        self._file.close()
        self._close_events()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _drop_torn_line(self, records: list[dict[str, Any]]) -> None:
        """Rewrite the file when it holds more than `records`, so that the next line does not join a torn one."""
        path = self._folder.metrics
        if not path.exists():
            return
        with path.open("rb") as file:
            lines = sum(1 for _ in file)
        if lines > len(records):
            write_text(path, "".join(map(_line, records)))

    def _write_events(self, phase: str, values: Mapping[str, Value], now: float) -> None:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            resumed = self._folder.tensorboard.is_dir()
            self._events = SummaryWriter(
                str(self._folder.tensorboard), purge_step=self._global_step if resumed else None
            )
        for name, value in values.items():
            if isinstance(value, str):
                self._events.add_text(f"{phase}/{name}", value, self._global_step, walltime=now)
            elif value is not None:
                self._events.add_scalar(f"{phase}/{name}", value, self._global_step, walltime=now)
        self._events.flush()

    def _close_events(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, in order, without a torn last one; empty when nothing was logged yet.

    Raises:
        UserError: a line before the last one is damaged, or a line is no record of a run.
    """
    path = RunFolder(Path(run_dir)).metrics
    records = list(read_json_lines(path)) if path.exists() else []
    for number, record in enumerate(records, start=1):
        missing = [name for name in ("phase", "iteration", "step", "global_step") if name not in record]
        if missing:
            raise UserError(f"{path}, line {number}: has no {missing[0]!r}: no line of a run's metrics")
    return records


def _plain(name: str, value: object) -> Value:
    """A value as a Python str, int, float (NumPy scalars included) or None."""
    if name in RESERVED_FIELDS:
        raise ValueError(f"metric name {name!r} is taken: it is one of {', '.join(sorted(RESERVED_FIELDS))}")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"metric {name!r} is {type(value).__name__}, not a number, a string or None")


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
