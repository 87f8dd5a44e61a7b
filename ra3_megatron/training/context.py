"""What every phase of a run shares: configuration, data, processes, and the run folder's writers."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from ra3_megatron.config.errors import StoppedBySignal
from ra3_megatron.config.run import RunConfig
from ra3_megatron.mcore.model import build_model
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.stopping import StopRequest
from ra3_megatron.report.metrics import MetricsWriter, read_metrics
from ra3_megatron.report.progress import Progress
from ra3_megatron.report.run_folder import RunFolder, write_json
from ra3_megatron.rollout.engine_pool import EnginePool
from ra3_megatron.rollout.sampling import LiveSampling, Sampling
from ra3_megatron.text.latents import LatentFormat
from ra3_megatron.text.tokenizer import Tokenizer
from ra3_megatron.training.alarms import Alarm


class Benchmarks(Protocol):
    """Suites of tasks that a model is evaluated on while it trains. All calls are collective."""

    def due(self, phase: str, step: int, steps: int) -> bool:
        """Whether to evaluate behind `step` of the `steps` updates of a phase."""
        ...

    def evaluate(self, sampling: Sampling, name: str, references: bool, check: Callable[[], None]) -> dict[str, float]:
        """Metrics of the weights that `sampling` has; files are called `name`. references: of right solutions, too.
        check: collective; it is called often, and what it raises ends the evaluation."""
        ...


@dataclass
class RunContext:
    """One run in one process. Only the main process holds a metrics writer."""

    config: RunConfig
    folder: RunFolder
    runtime: Runtime
    tokenizer: Tokenizer
    latents: LatentFormat
    """How thoughts are written."""
    progress: Progress
    metrics: MetricsWriter | None
    identity: dict[str, Any] = field(default_factory=dict)
    """What a checkpoint says of the model and the tokenizer."""
    base: Path | None = None
    """Checkpoint to start from; None: from initial weights."""
    engines: EnginePool | None = None
    """vLLM processes that sample; None: the model itself is sampled from."""
    benchmarks: Benchmarks | None = None
    """What evaluates the model while it trains; None: nothing."""
    stop: StopRequest = field(default_factory=StopRequest)
    """Whether a signal asks to save and stop."""

    def new_model(self, drawn: bool = True, trained: bool = True) -> torch.nn.Module:
        """A model with the run's initial weights; with `drawn=False`, one to load weights into.

        trained: whether it will be (`ModelConfig.frozen`).
        """
        return build_model(
            self.config.model if trained else self.config.model.frozen,
            self.config.parallel,
            self.runtime,
            self.tokenizer.vocab_size,
            self.latents.sets,
            self.config.seed if drawn else None,
        )

    def sampling(self, model: torch.nn.Module) -> Sampling:
        """What samples from `model`, with the weights that are published. Collective.

        Engines serve one model at a time, the one that was asked for last.
        """
        if self.engines is not None:
            return self.engines.sampling(model)
        length, keep = self.config.model.context_length, self.config.text.keep_latents
        return LiveSampling(model, self.runtime, self.latents, self.tokenizer, self.config.rollout, length, keep)

    def log(self, phase: str, iteration: int, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics."""
        if self.metrics is not None:
            self.metrics.write(phase, iteration, step, values)

    def rewind(self, phase: str, iteration: int, step: int, **same: Any) -> None:
        """Forget metrics of this phase behind `step` (of those that have the values `same`)."""

        def keep(record: dict[str, Any]) -> bool:
            here = record["phase"] == phase and record["iteration"] == iteration
            here = here and all(record.get(key) == value for key, value in same.items())
            return not (here and record["step"] > step)

        if self.metrics is not None:
            self.metrics.rewind(keep)

    def has_logged(self, phase: str, iteration: int, **same: Any) -> bool:
        """Whether this phase has left a line of metrics (with the values `same`). Collective."""
        wanted = {"phase": phase, "iteration": iteration, **same}.items()
        records = read_metrics(self.folder.path) if self.runtime.is_main else []
        return bool(self.runtime.broadcast(any(wanted <= record.items() for record in records)))

    def alarm(self, phase: str, iteration: int, step: int, alarms: Iterable[Alarm]) -> None:
        """Report signs of failure: on the display and in the metrics."""
        for alarm in alarms:
            self.progress.message(f"warning: {alarm.name}: {alarm.message}; {alarm.advice}", style="yellow")
            self.log(
                phase,
                iteration,
                step,
                {"monitor": alarm.name, "message": alarm.message, "advice": alarm.advice},
            )

    def stopped(self, signal: str, where: str) -> NoReturn:
        """Raise StoppedBySignal. Collective: the main process has said so before any process ends."""
        text = f"stopped by {signal}: {where}"
        self.progress.message(text, always=True)  # job scripts look for it
        self.runtime.barrier()
        raise StoppedBySignal(text)

    def sync(self) -> None:
        """Put metrics on disk before a checkpoint stands behind them."""
        if self.metrics is not None:
            self.metrics.sync()

    def dump(self, path: Path, content: Mapping[str, Any]) -> None:
        """Write what went wrong."""
        if self.runtime.is_main:
            write_json(path, content)
        self.runtime.barrier()
