"""Phases that can be killed at any moment and resumed to the same numbers.

A phase trains one model from given weights for a fixed number of steps. Its folder below `checkpoints/` holds the last
checkpoints of the way and, at the end, `final`; a phase with a `final` is done. Everything a step depends on is either
a function of (seed, phase, step) or in the checkpoint, so a resumed phase repeats nothing and skips nothing: metrics
logged behind the checkpoint are rewound before it goes on.

With `checkpoint.async_save` the checkpoints of the way are written while steps go on. One counts (and older ones are
deleted) when it is complete; a kill before that leaves the one before. `final` is always waited for.

A last checkpoint whose files are damaged is left for the one before it. A signal (`mcore/stopping.py`) saves behind the
step that it came in, or that is being evaluated, and stops the run.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.training import OptimizerConfig
from ra3_megatron.mcore import checkpoint, watchdog
from ra3_megatron.mcore.checkpoint_record import RECORD, is_partial
from ra3_megatron.mcore.stopping import StopAsked
from ra3_megatron.mcore.trainer import RefusedStep, Trainer
from ra3_megatron.rollout.sampling import Sampling
from ra3_megatron.training.alarms import Alarm
from ra3_megatron.training.context import RunContext
from ra3_megatron.training.precision import record_precision
from ra3_megatron.training.profiling import Profiler
from ra3_megatron.training.spikes import Spikes, skipped_step
from ra3_megatron.training.step_times import StepTimes

FINAL = "final"
BENCHMARKS = "benchmarks"
"""Phase of the lines of metrics about evaluations on suites of tasks."""


@dataclass(frozen=True)
class Phase:
    """A name, and where it stands in the run."""

    name: str
    """Name in the metrics: warm_start, estep, mstep, ntp."""
    iteration: int
    """EM iteration, from 1; 0 before the first."""

    @property
    def key(self) -> str:
        """Name of its folders and files."""
        return self.name if self.iteration == 0 else f"{self.name}-{self.iteration}"


class Steps(Protocol):
    """What a phase does at each step."""

    def step(self, step: int) -> dict[str, float]:
        """Take step number `step` (from 0); metrics of it, with the key `tokens`. Raises StopAsked when a signal came
        in an evaluation before it, of which nothing is kept."""

    def sampling(self, step: int) -> Sampling | None:
        """What samples in this phase, with the model's present weights, which `step` updates lead to, and idle; None:
        nothing does."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable position in the data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from that position."""

    def describe_batch(self) -> Sequence[str]:
        """Names of the documents of the last step."""


def folder_of(run: RunContext, phase: Phase) -> Path:
    """Where the checkpoints of a phase stand."""
    return run.folder.checkpoints / phase.key


def final_of(run: RunContext, phase: Phase) -> Path:
    """The checkpoint that a finished phase leaves."""
    return folder_of(run, phase) / FINAL


def is_done(run: RunContext, phase: Phase) -> bool:
    """Whether the phase has left its final checkpoint."""
    return (final_of(run, phase) / RECORD).is_file()


def finished(run: RunContext, phase: Phase) -> bool:
    """`is_done`, of a phase that this run may train. Collective: deletes what a kill right behind `final` left.

    The main process looks for all: what a file system that is shared shows to other nodes may be older.
    """
    if not run.runtime.broadcast(run.runtime.is_main and is_done(run, phase)):
        return False
    _prune(folder_of(run, phase), run, keep=0)
    return True


def train_phase(
    run: RunContext,
    phase: Phase,
    steps: int,
    optimizer: OptimizerConfig,
    model: torch.nn.Module,
    start: Path | None,
    make_steps: Callable[[Trainer], Steps],
    updates_per_step: int = 1,
    log_interval: int | None = None,
) -> Path:
    """Train `model` from the checkpoint `start` (None: as it is) and return the final checkpoint of the phase.

    updates_per_step: optimizer updates that each step takes; log_interval: instead of `logging.interval`.

    Skips what is done, resumes what was begun. Raises
    UserError when the loss is not finite (the batch is dumped) or a checkpoint cannot be written; the last good
    checkpoint is kept in both cases. Raises StoppedBySignal behind a checkpoint when a signal asked for it.
    """
    final = final_of(run, phase)
    if finished(run, phase):
        return final
    folder = folder_of(run, phase)
    latest = run.runtime.broadcast(latest_checkpoint(folder) if run.runtime.is_main else None)
    if latest is None and start is not None:
        checkpoint.load(start, model, run.runtime, verify=run.config.checkpoint.verify)
    trainer = Trainer(model, optimizer, run.config.parallel, run.runtime, steps * updates_per_step)
    spikes = Spikes(run.config.monitors)
    trainer.judge, trainer.may_skip = spikes.judge, spikes.may_skip
    work = make_steps(trainer)
    first, seconds, tokens = 0, 0.0, 0
    if latest is not None:
        record = _load_newest(run, folder, model, trainer)
        first, seconds, tokens = record["step"], record["seconds"], record["tokens"]
        work.load_state_dict(record["data"])
        if "spikes" in record:  # an older checkpoint has none
            spikes.load_state_dict(record["spikes"])
    run.rewind(phase.name, phase.iteration, first)
    benchmarks = _Benchmarks(run, phase, trainer, work, steps)
    benchmarks.rewind(first)
    task = run.progress.task(phase.key, total=steps, unit="tokens", done=first)
    clock = time.perf_counter()

    def record_at(step: int) -> dict[str, Any]:
        return {
            **run.identity,
            "phase": phase.name,
            "iteration": phase.iteration,
            "step": step,
            "weight_version": step,
            "tokens": tokens,
            "seconds": seconds + time.perf_counter() - clock,
            "data": work.state_dict(),
            "spikes": spikes.state_dict(),
        }

    saves = _Saves(run, folder, model, trainer)

    @contextmanager
    def evaluating(step: int) -> Iterator[None]:
        """A signal that ends an evaluation behind so many steps ends the run, with these saved."""
        try:
            yield
        except StopAsked as asked:
            if step > first and saves.last != step:
                saves.begin(f"step_{step:06d}", record_at(step))
            saves.wait()
            run.stopped(asked.signal, f"in the evaluation behind step {step} of {phase.key}, which begins again")

    times = StepTimes(trainer.clock, run.runtime.device)
    profiler = Profiler(run.config.profile, run.folder.profile, phase.name, phase.key, run.runtime)
    try:
        for step in range(first, steps):
            with evaluating(step):
                benchmarks.behind(step)
            try:
                with evaluating(step), profiler.step(step + 1, trainer.clock), times.step():
                    metrics = work.step(step)
            except RefusedStep as problem:
                try:
                    saves.wait()
                except UserError as failure:
                    run.progress.message(f"warning: {failure}", style="yellow")
                _stop(run, phase, step, problem, work, latest_checkpoint(folder) or start)
            if step in (first, steps - 1):
                record_precision(run, phase.key, trainer)
            tokens += int(metrics["tokens"])
            watchdog.beat(f"{phase.key} step {step + 1}")
            task.advance(1, units=int(metrics["tokens"]), loss=metrics["loss"])
            skipped = spikes.skipped()
            if skipped:
                metrics["skipped"] = len(skipped)
                run.alarm(phase.name, phase.iteration, step + 1, [_skipped(run, phase, step, skipped, work)])
            if (step + 1) % (log_interval or run.config.logging.interval) == 0 or step + 1 == steps or skipped:
                values = {**metrics, **_rates(metrics, times.seconds), **times.values()}
                run.log(phase.name, phase.iteration, step + 1, values)
            with times.saving():
                saves.poll()
            if step + 1 == steps:
                continue
            signal = run.stop.agreed(run.runtime)
            if signal is not None or (step + 1) % run.config.checkpoint.interval == 0:
                with times.saving():
                    saves.begin(f"step_{step + 1:06d}", record_at(step + 1))
            if signal is not None:
                saves.wait()
                run.stopped(signal, f"saved behind step {step + 1} of {phase.key}")
        task.close()
        with evaluating(steps):
            benchmarks.behind(steps)
        with times.saving():
            saves.wait()
            saves.finish(final, record_at(steps))
        if (line := times.line()) is not None:
            run.progress.message(f"{phase.key}: {line}")
    finally:
        saves.abandon()
        watchdog.rest()
    return final


class _Benchmarks:
    """The evaluations of one phase on suites of tasks: each is made, and logged, once. All calls are collective."""

    def __init__(self, run: RunContext, phase: Phase, trainer: Trainer, work: Steps, steps: int) -> None:
        self._run, self._phase, self._trainer, self._work, self._steps = run, phase, trainer, work, steps
        self._own: Sampling | None = None
        """Where the phase samples nothing itself."""

    def rewind(self, step: int) -> None:
        """Forget what was found behind later steps."""
        self._run.rewind(BENCHMARKS, self._phase.iteration, step, of=self._phase.name)

    def behind(self, step: int) -> None:
        """Evaluate behind so many steps, if that is due. Raises StopAsked when a signal came meanwhile."""
        run, phase = self._run, self._phase
        if run.benchmarks is None or not run.benchmarks.due(phase.name, step, self._steps):
            return
        if run.has_logged(BENCHMARKS, phase.iteration, of=phase.name, step=step):
            return
        watchdog.touch()
        begin = time.perf_counter()
        self._trainer.synchronize()  # what samples reads the weights of the last update
        sampling = self._work.sampling(step)
        if sampling is None:
            self._own = sampling = self._own or run.sampling(self._trainer.model)
            sampling.publish(step)
        name = f"{phase.key}-{step:06d}"
        found = run.benchmarks.evaluate(sampling, name, step == 0, lambda: run.stop.check(run.runtime))
        run.log(BENCHMARKS, phase.iteration, step, {"of": phase.name, **found, "seconds": time.perf_counter() - begin})


class _Saves:
    """The checkpoints of one phase: at most one is being written at a time. All but `abandon` are collective."""

    def __init__(self, run: RunContext, folder: Path, model: torch.nn.Module, trainer: Trainer) -> None:
        self._run, self._folder, self._model, self._trainer = run, folder, model, trainer
        self._pending: checkpoint.PendingSave | None = None
        self.last: int | None = None
        """Step of the checkpoint that was begun last."""

    def begin(self, name: str, record: dict[str, Any]) -> None:
        """Save a checkpoint of the way, in the background if the run says so."""
        self.wait()
        self.last = record["step"]
        self._run.sync()
        background = self._run.config.checkpoint.async_save
        with _write_errors():
            self._pending = checkpoint.begin(
                self._folder / name, self._model, self._run.runtime, record, self._trainer, background
            )
        if not background:
            self.wait()

    def poll(self) -> None:
        """Complete a checkpoint that every process has written."""
        if self._pending is not None:
            with _write_errors():
                complete = self._pending.poll()
            if complete:
                self._end()

    def wait(self) -> None:
        """Complete the checkpoint that is being written."""
        if self._pending is not None:
            with _write_errors():
                self._pending.wait()
            self._end()

    def finish(self, final: Path, record: dict[str, Any]) -> None:
        """Save the weights that the phase leaves, and delete the checkpoints of the way."""
        self._run.sync()
        self._trainer.synchronize()
        with _write_errors():
            checkpoint.save(final, self._model, self._run.runtime, record)
        _prune(self._folder, self._run, keep=0)

    def abandon(self) -> None:
        """Write no more of a checkpoint that is not complete."""
        if self._pending is not None:
            self._pending.abandon()

    def _end(self) -> None:
        self._pending = None
        _prune(self._folder, self._run)


@contextmanager
def _write_errors() -> Iterator[None]:
    """A checkpoint that cannot be written is the user's to mend. It may take as long as it takes."""
    try:
        with watchdog.paused():
            yield
    except checkpoint.CheckpointWriteError as problem:
        raise UserError(str(problem)) from problem


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint inside a phase; None when there is none."""
    return max(_complete(folder), key=_step_of, default=None)


def _load_newest(run: RunContext, folder: Path, model: torch.nn.Module, trainer: Trainer) -> dict[str, Any]:
    """Load the newest checkpoint inside a phase that is whole, of those that the main process sees; its record.
    Collective.

    One that is not is renamed, so that nothing takes it for a checkpoint any more. Raises DamagedCheckpoint when none
    is whole.
    """
    seen = sorted(_complete(folder), key=_step_of, reverse=True) if run.runtime.is_main else []
    found: list[Path] = run.runtime.broadcast(seen)
    for path, before in zip(found, [*found[1:], None], strict=True):
        try:
            return checkpoint.load(path, model, run.runtime, trainer, run.config.checkpoint.verify)
        except checkpoint.DamagedCheckpoint as problem:
            if before is None:
                raise
            run.progress.message(f"warning: {problem}; going on from {before}", style="yellow")
            if run.runtime.is_main:
                shutil.rmtree(folder / f"damaged_{path.name}", ignore_errors=True)
                path.rename(folder / f"damaged_{path.name}")
            run.runtime.barrier()
    raise ValueError(f"{folder} holds no checkpoint")


def _complete(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("step_*") if not is_partial(path))
    return [path for path in found if (path / RECORD).is_file()]


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _prune(folder: Path, run: RunContext, keep: int | None = None) -> None:
    """Delete all but the newest checkpoints inside a phase, and what a kill left half-written or half-deleted.

    Not while one is being written.
    """
    keep = run.config.checkpoint.keep if keep is None else keep
    if run.runtime.is_main:
        kept = sorted(_complete(folder), key=_step_of, reverse=True)[:keep]
        for path in folder.glob("step_*"):
            if path not in kept:
                # the record goes first: a half-deleted checkpoint is no checkpoint
                (path / RECORD).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=is_partial(path))  # its writer may not have died yet
    run.runtime.barrier()


def _rates(metrics: dict[str, float], elapsed: float) -> dict[str, float]:
    return {"seconds": elapsed, "tokens_per_second": metrics["tokens"] / elapsed}


def _skipped(run: RunContext, phase: Phase, step: int, why: Sequence[str], work: Steps) -> Alarm:
    """Dump the batch of a step that was skipped, and tell of it."""
    dump = Path("skipped") / f"{phase.key}-{step + 1:06d}.json"
    _dump_batch(run, phase, step, run.folder.path / dump, {"problem": "; ".join(why)}, work)
    return skipped_step(why, str(dump))


def _dump_batch(run: RunContext, phase: Phase, step: int, dump: Path, said: dict[str, Any], work: Steps) -> list[str]:
    """Write what a step was about; names of its documents."""
    names = list(work.describe_batch())
    where = {"phase": phase.name, "iteration": phase.iteration, "step": step + 1}
    run.dump(dump, {**where, **said, "seed": run.config.seed, "documents": names})
    return names


def _stop(run: RunContext, phase: Phase, step: int, problem: Exception, work: Steps, before: Path | None) -> NoReturn:
    """Dump what led to a step that was refused: from `before`, the steps up to this one repeat it exactly."""
    dump = run.folder.path / "failed" / f"{phase.key}-{step + 1:06d}.json"
    said = {"problem": str(problem), "checkpoint": None if before is None else str(before)}
    names = _dump_batch(run, phase, step, dump, said, work)
    raise UserError(
        f"{phase.key} step {step + 1}: {problem}; its batch ({len(names)} documents, first {names[0]}) is in {dump}; "
        f"last good checkpoint: {before or 'none'}; lower the learning rate of this phase, look at the batch, or "
        "go on with monitors.nonfinite=skip, monitors.spike=skip"
    ) from problem
