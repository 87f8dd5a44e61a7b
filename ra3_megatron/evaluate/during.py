"""Suites while a model trains: the same prompts, stops, modes and scoring as `ra3 eval`, with the weights as they are.

Every process of the layout samples its share; the main process scores, in the sandbox. Samples are greedy, or drawn
with random numbers of their own (seed, suite, task, number), the same each time: differences are the weights'.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ra3_megatron.config.errors import Unavailable, UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.evaluate.data import Tasks, load_tasks
from ra3_megatron.evaluate.generation import Settings, Writer
from ra3_megatron.evaluate.harness_call import require_harness
from ra3_megatron.evaluate.modes import Mode, modes_of
from ra3_megatron.evaluate.samples import Sample, Score
from ra3_megatron.evaluate.scorers import default_workers, scorer_for
from ra3_megatron.evaluate.scoring import Scorer
from ra3_megatron.evaluate.suites import SUITES, Suite
from ra3_megatron.mcore import watchdog
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.report.progress import Progress
from ra3_megatron.report.run_folder import write_text
from ra3_megatron.rlvr.sandbox import Isolation, SandboxError, require_bubblewrap
from ra3_megatron.rollout.protocol import Completion, GenerateRequest
from ra3_megatron.rollout.sampling import Sampling
from ra3_megatron.text.latents import LatentFormat
from ra3_megatron.text.tokenizer import Tokenizer

FOLDER = "benchmarks"
"""In the run folder: what was written for each task, and its scores."""
_BESIDE = ("/tokens", "/thought_share")
"""Ends of the names of metrics that are no scores."""


def load_suites(config: RunConfig, runtime: Runtime) -> list[Tasks]:
    """The tasks of `benchmarks.suites`, on the main process; on the others there are none. Collective.

    Raises UserError when data, a harness or the sandbox is missing, before anything is written.
    """
    settings = config.benchmarks
    held: list[Tasks] = []

    def load() -> None:
        for name in settings.suites:
            suite = SUITES[name]
            require_bubblewrap(Isolation(config.sandbox))
            require_harness(suite.kind, suite.version)
            modes_of(suite, settings.mode, config.text.latent_format, "benchmarks.mode")
            folder = None if settings.data is None else Path(settings.data)
            if folder is not None and not folder.is_dir():
                raise UserError(f"benchmarks.data={folder}: no such folder")
            held.append(load_tasks(suite, folder, settings.limit, option="benchmarks.data"))

    runtime.on_main(load)
    return held


@dataclass(frozen=True)
class _Open:
    """One suite, ready to be sampled."""

    suite: Suite
    ids: list[str]
    prompts: list[str]
    scorer: Scorer | None
    """On the main process alone."""


class TrainingSuites:
    """Evaluates on the suites of a run (`training.context.Benchmarks`). All calls are collective."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        tokenizer: Tokenizer,
        latents: LatentFormat,
        ends: frozenset[int],
        progress: Progress,
        suites: Sequence[_Open],
    ) -> None:
        """ends: tokens that end a completion."""
        self.config, self.runtime, self.tokenizer, self.latents = config, runtime, tokenizer, latents
        self.ends, self.progress, self.suites = ends, progress, suites

    def due(self, phase: str, step: int, steps: int) -> bool:
        settings = self.config.benchmarks
        return phase in settings.phases and (step % settings.interval == 0 or step == steps)

    def evaluate(self, sampling: Sampling, name: str, references: bool, check: Callable[[], None]) -> dict[str, float]:
        found: dict[str, float] = {}
        spread = _Spread(sampling, check)
        for each in self.suites:
            if references:
                check()
                found |= self._references(each)
            for mode in modes_of(each.suite, self.config.benchmarks.mode, self.latents.name):
                found |= self._mode(each, mode, spread, name)
        shown = (f"{key} {value:.1%}" for key, value in found.items() if not key.endswith(_BESIDE))
        self.progress.message(f"benchmarks, {name}: {', '.join(shown)}")
        return found

    def _mode(self, each: _Open, mode: Mode, spread: "_Spread", name: str) -> dict[str, float]:
        title = f"{each.suite.name}, {mode}"
        samples: list[Sample] = []
        settings = self._settings(each.suite)
        writer = Writer(spread, self.tokenizer, self.latents, self.config.text, each.suite, mode, settings)
        total = len(each.ids) * self.config.benchmarks.samples
        with self.progress.task(f"{title}: writing", total=total, unit="tokens") as task:

            def on_samples(new: list[Sample]) -> None:
                watchdog.touch()
                samples.extend(new)
                task.advance(len(new), units=sum(sample.tokens or 0 for sample in new))

            writer.write(each.ids, each.prompts, [], on_samples)
        place = {task_id: number for number, task_id in enumerate(each.ids)}
        samples.sort(key=lambda sample: (place[sample.task_id], sample.number or 0))
        spread.check()
        scores = self._score(each, samples, ours=True, title=title)
        if self.runtime.is_main:
            file = Path(self.config.run_dir) / FOLDER / f"{name}-{each.suite.name}-{mode}.jsonl"
            rows = [{**asdict(sample), **asdict(score)} for sample, score in zip(samples, scores, strict=True)]
            write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        tokens = sum(sample.tokens or 0 for sample in samples)
        thoughts = sum(sample.thought_tokens or 0 for sample in samples)
        key = f"{each.suite.name}/{mode}"
        return {
            **{f"{key}/{metric}": _mean(scores, metric) for metric in each.suite.metrics},
            f"{key}/tokens": tokens / len(samples),
            f"{key}/thought_share": thoughts / tokens if tokens else 0.0,
        }

    def _references(self, each: _Open) -> dict[str, float]:
        """What right solutions score here: a busy machine fails some of them."""
        references = self.runtime.on_main(lambda: each.scorer.references() if each.scorer is not None else [])
        if not references:
            return {}
        scores = self._score(each, references, ours=False, title=f"{each.suite.name}, reference")
        return {f"{each.suite.name}/reference/{metric}": _mean(scores, metric) for metric in each.suite.metrics}

    def _score(self, each: _Open, samples: Sequence[Sample], ours: bool, title: str) -> list[Score]:
        """On the main process; the same on every process."""

        def score() -> list[Score]:
            assert each.scorer is not None
            with self.progress.task(f"{title}: scoring", total=len(samples), unit="samples") as task:
                try:
                    return each.scorer.score(samples, ours, lambda count: task.advance(count))
                except SandboxError as error:
                    raise Unavailable(f"sandbox={self.config.sandbox}: {error}") from error

        with watchdog.paused():
            return self.runtime.on_main(score)

    def _settings(self, suite: Suite) -> Settings:
        settings, rollout = self.config.benchmarks, self.config.rollout
        return Settings(
            samples=settings.samples,
            temperature=0.0 if settings.samples == 1 else rollout.temperature,
            top_p=1.0,
            max_new_tokens=settings.max_new_tokens or suite.max_new_tokens,
            seed=self.config.seed,
            batch_size=rollout.batch_size * self.runtime.replica_size,
            stop_ids=self.ends,
            context_length=self.config.model.context_length,
        )


@contextmanager
def training_suites(
    config: RunConfig,
    loaded: Sequence[Tasks],
    runtime: Runtime,
    tokenizer: Tokenizer,
    latents: LatentFormat,
    ends: frozenset[int],
    progress: Progress,
) -> Iterator[TrainingSuites | None]:
    """What evaluates a run's model, from what `load_suites` gave; None when the run asks for no suite. Collective."""
    if not config.benchmarks.suites:
        yield None
        return
    workers = config.benchmarks.workers or default_workers()
    with ExitStack() as stack:
        scorers = [stack.enter_context(scorer_for(tasks, Isolation(config.sandbox), workers)) for tasks in loaded]
        asked = runtime.on_main(
            lambda: [(tasks.ids, scorer.prompts()) for tasks, scorer in zip(loaded, scorers, strict=True)]
        )
        suites = []
        for number, (name, (ids, prompts)) in enumerate(zip(config.benchmarks.suites, asked, strict=True)):
            suites.append(_Open(SUITES[name], ids, prompts, scorers[number] if scorers else None))
        yield TrainingSuites(config, runtime, tokenizer, latents, ends, progress, suites)


class _Spread:
    """Requests over all processes that sample."""

    piece = 64  # the next one of a sample may be another process's

    def __init__(self, sampling: Sampling, check: Callable[[], None]) -> None:
        self._sampling, self.check = sampling, check

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self.check()
        mine = {place: [requests[place]] for place in self._sampling.mine(len(requests))}
        found = self._sampling.generate(mine)()
        return [found[place][0] for place in range(len(requests))]


def _mean(scores: Sequence[Score], metric: str) -> float:
    return sum(score.scores[metric] for score in scores) / len(scores)
