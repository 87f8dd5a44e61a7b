"""`ra3 eval`: a model, or samples that exist, through suites; `ra3 eval compare`: two results on the same tasks.

The output folder: `results.json`, `results.md`, `samples/SUITE-MODE.jsonl` (what was written, used again by a later
call for the same model, data and settings) and `scores/SUITE-MODE.jsonl` (what the harness said of each sample).
"""

import datetime
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ra3_megatron.config.differences import flat
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.evaluate import compare as comparing
from ra3_megatron.evaluate import results as writing
from ra3_megatron.evaluate import sample_files
from ra3_megatron.evaluate.data import Tasks, load_tasks
from ra3_megatron.evaluate.harness_call import require_harness
from ra3_megatron.evaluate.samples import Sample, Score
from ra3_megatron.evaluate.scorers import default_workers, scorer_for
from ra3_megatron.evaluate.scoring import Scorer
from ra3_megatron.evaluate.suites import SUITES, Suite
from ra3_megatron.report.progress import Progress
from ra3_megatron.report.run_folder import write_json, write_text
from ra3_megatron.report.versions import collect_versions
from ra3_megatron.rlvr.sandbox import Isolation, SandboxError, require_bubblewrap
from ra3_megatron.verbs.run_dir import only_writer

if TYPE_CHECKING:
    from ra3_megatron.rollout.protocol import RolloutEngine
    from ra3_megatron.verbs.sampled_model import Weights

SAMPLES_FILE = "samples-from"
"""Name of the mode of samples that were given."""


@dataclass(frozen=True)
class Request:
    """What `ra3 eval` was asked for."""

    suites: tuple[str, ...]
    out: Path
    data: Path | None
    checkpoint: Path | None = None
    hf: Path | None = None
    samples_from: Path | None = None
    mode: str = "think"
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    ks: tuple[int, ...] = ()
    """Empty: 1, 10 and 100 as far as there are samples."""
    limit: int | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    engine: str = "megatron"
    sandbox: Isolation = Isolation.BUBBLEWRAP
    workers: int | None = None
    window: tuple[str | None, str | None] = (None, None)
    """Contest dates of LiveCodeBench, from and to, as YYYY-MM-DD."""
    overrides: tuple[str, ...] = ()


def evaluate(request: Request) -> dict[str, Any]:
    """Run it; returns what `results.json` holds: these suites, and others of the same model from earlier calls.

    Raises UserError before anything is written when it cannot be run.
    """
    _check(request)
    require_bubblewrap(request.sandbox)
    loaded = [load_tasks(SUITES[name], request.data, request.limit, request.window) for name in request.suites]
    weights = _weights(request)
    plans = [(tasks, _modes(request, tasks.suite, weights)) for tasks in loaded]
    for tasks in loaded:
        require_harness(tasks.suite.kind, tasks.suite.version)
    given = None
    if request.samples_from is not None:
        given = sample_files.read_theirs(request.samples_from, loaded[0])
        _ks(request, len(given[0]) // len(loaded[0].ids))
    call = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": collect_versions(),
        "sandbox": str(request.sandbox),
    }
    with ExitStack() as stack:
        stack.enter_context(only_writer(request.out, "--out"))
        progress = stack.enter_context(Progress(console=Console(stderr=True)))
        engine: Callable[[], RolloutEngine] = _opened_once(stack, weights, request.out)
        runs = []
        for tasks, modes in plans:
            scorer = stack.enter_context(scorer_for(tasks, request.sandbox, request.workers or default_workers()))
            runs.append(_SuiteRun(request, tasks, scorer, progress, weights, modes, given))  # refuses what does not fit
        model = _model(request, weights)
        earlier = writing.earlier_suites(request.out, model["identity"])
        results: dict[str, Any] = {"format": writing.FORMAT, "model": model, "suites": earlier}
        for run in runs:
            results["suites"][run.suite.name] = {**call, **run.all(engine)}
            write_json(request.out / writing.FILE, results)
            write_text(request.out / writing.MARKDOWN, writing.markdown_page(results))
    return results


def show(results: dict[str, Any], out: Path, console: Console | None = None) -> None:
    """Print the table, and what has to be said beside it."""
    console = console or Console()
    writing.print_table(writing.HEADINGS, writing.table_rows(results), results["model"]["name"], console)
    for name, suite in results["suites"].items():
        for metric, failed in suite["reference"].get("failed", {}).items():
            if failed:
                console.print(f"{name}: reference solutions that failed here ({metric}): {', '.join(failed)}")
    console.print(f"{out / writing.FILE}", markup=False, soft_wrap=True)


def compare(
    a: Path, b: Path | None, modes: tuple[str, ...] = (), console: Console | None = None
) -> list[dict[str, Any]]:
    """Print the comparison of two results, or of two modes of one (b: None), and return its rows.

    Raises UserError when they cannot be compared.
    """
    if modes:
        if b is not None:
            raise UserError(f"--modes={','.join(modes)}: compares two modes of one results file: leave out {b}")
        if len(set(modes)) != 2 or len(modes) != 2 or "" in modes:
            raise UserError(f"--modes={','.join(modes)}: must be two modes such as think,no-think")
        rows = comparing.compare_modes(writing.read_results(a), *modes)
        title = f"{a}   A: {modes[0]}   B: {modes[1]}"
    elif b is None:
        raise UserError("ra3 eval compare needs two results files, or one and --modes think,no-think")
    else:
        rows = comparing.compare(writing.read_results(a), writing.read_results(b))
        title = f"A: {a}   B: {b}"
    writing.print_table(comparing.HEADINGS, comparing.table_rows(rows), title, console or Console())
    return rows


class _SuiteRun:
    """One suite of one call. Making one raises UserError when samples in the output folder are of something else."""

    def __init__(
        self,
        request: Request,
        tasks: Tasks,
        scorer: Scorer,
        progress: Progress,
        weights: "Weights | None",
        modes: Sequence[str],
        given: tuple[list[Sample], bool] | None,
    ) -> None:
        self.request, self.tasks, self.scorer, self.progress, self.weights = request, tasks, scorer, progress, weights
        self.suite, self.modes, self.given = tasks.suite, modes, given
        self.prompts: list[str] = []
        self.digest: str | None = None
        self.found: dict[str, list[Sample]] = {}
        """All samples of earlier calls, by mode: those that are not wanted now stay in the file too."""
        if given is None:
            self.prompts = scorer.prompts()
            self.digest = hashlib.sha256("\0".join(self.prompts).encode()).hexdigest()
            self.found = {mode: sample_files.read_ours(self._file(mode), self._header(mode)) for mode in modes}

    def all(self, engine: "Callable[[], RolloutEngine]") -> dict[str, Any]:
        """Facts of the suite, reference solutions, modes."""
        facts = writing.suite_facts(self.tasks, self.digest)
        references = self.scorer.references()
        start = time.monotonic()
        scores = self._score("reference", references, ours=False) if references else []
        facts["reference"] = writing.reference_facts(self.suite, references, scores, time.monotonic() - start)
        facts["modes"] = {}
        for mode in self.modes:
            if self.given is not None:
                samples, ours = self.given
                seconds: dict[str, float] = {}
                notes: dict[str, Any] = {"note": f"samples of {self.request.samples_from}"}
            else:
                samples, seconds, notes = self._write(mode, engine())
                ours = True
            start = time.monotonic()
            scores = self._score(mode, samples, ours)
            seconds = {**seconds, "scoring": time.monotonic() - start}
            ks = _ks(self.request, len(samples) // len(self.tasks.ids))
            facts["modes"][mode] = writing.mode_facts(self.tasks, samples, scores, ks, seconds, notes)
        return facts

    def _file(self, mode: str) -> Path:
        return self.request.out / "samples" / f"{self.suite.name}-{mode}.jsonl"

    def _shared(self) -> dict[str, Any]:
        """Settings that stand in the header of samples and in the results."""
        assert self.weights is not None
        return {
            "temperature": self.request.temperature,
            "top_p": self.request.top_p,
            "max_new_tokens": self.request.max_new_tokens or self.suite.max_new_tokens,
            "seed": self.request.seed,
            "latent_format": self.weights.config.text.latent_format,
            "engine": self.request.engine,
        }

    def _header(self, mode: str) -> dict[str, Any]:
        """What samples are of: they are used again for the same alone."""
        from ra3_megatron.verbs.sampled_model import end_ids

        assert self.weights is not None
        return {
            "suite": self.suite.name,
            "data_sha256": self.tasks.sha256,
            "prompts_sha256": self.digest,
            "model": self.weights.identity,
            "mode": mode,
            "stops": list(self.suite.stops),
            "end_tokens": sorted(end_ids(self.weights.tokenizer, self.weights.hf)),
            **self._shared(),
            **_computing(self.weights.config),
        }

    def _wanted(self, mode: str) -> list[Sample]:
        """Samples of earlier calls that are wanted now."""
        wanted = {(name, number) for name in self.tasks.ids for number in range(self.request.samples)}
        return [sample for sample in self.found[mode] if (sample.task_id, sample.number) in wanted]

    def _write(self, mode: str, engine: "RolloutEngine") -> tuple[list[Sample], dict[str, float], dict[str, Any]]:
        """Samples of the model in one mode: those of an earlier call, and the others."""
        from ra3_megatron.evaluate.generation import Settings, Writer
        from ra3_megatron.evaluate.modes import NOTES, Mode
        from ra3_megatron.verbs.sampled_model import end_ids

        assert self.weights is not None
        weights, request, suite, file = self.weights, self.request, self.suite, self._file(mode)
        kept = self._wanted(mode)
        config = weights.config
        settings = Settings(
            samples=request.samples,
            temperature=request.temperature,
            top_p=request.top_p,
            max_new_tokens=request.max_new_tokens or suite.max_new_tokens,
            seed=request.seed,
            batch_size=config.rollout.batch_size,
            stop_ids=end_ids(weights.tokenizer, weights.hf),
            context_length=config.model.context_length,
        )
        writer = Writer(engine, weights.tokenizer, weights.latents, config.text, suite, Mode(mode), settings)
        file.parent.mkdir(parents=True, exist_ok=True)
        sample_files.begin(file, self._header(mode), self.found[mode])
        samples = list(kept)
        start = time.monotonic()
        total = len(self.tasks.ids) * request.samples
        with self.progress.task(f"{suite.name}, {mode}: writing", total=total, unit="tokens") as task:
            task.advance(len(kept))

            def on_samples(new: list[Sample]) -> None:
                sample_files.append(file, new)
                samples.extend(new)
                task.advance(len(new), units=sum(sample.tokens or 0 for sample in new))

            writer.write(self.tasks.ids, self.prompts, kept, on_samples)
        seconds = {"writing": time.monotonic() - start}
        place = {name: number for number, name in enumerate(self.tasks.ids)}
        samples.sort(key=lambda sample: (place[sample.task_id], sample.number or 0))
        notes = {
            "note": NOTES[Mode(mode)],
            "prompts_too_long": [self.tasks.ids[place] for place in writer.too_long(self.prompts)],
            "reused_samples": len(kept),
            "top_p": 1.0,
            **self._shared(),
        }
        return samples, seconds, notes

    def _score(self, what: str, samples: Sequence[Sample], ours: bool) -> list[Score]:
        name = f"{self.suite.name}, {what}: scoring"
        with self.progress.task(name, total=len(samples), unit="samples") as task:
            try:
                scores = self.scorer.score(samples, ours, lambda count: task.advance(count))
            except SandboxError as error:
                raise UserError(
                    f"--sandbox={self.request.sandbox}: {error}: nothing was scored; samples are kept, try again"
                ) from error
        file = self.request.out / "scores" / f"{self.suite.name}-{what}.jsonl"
        rows = (
            json.dumps({"task_id": sample.task_id, **score.scores, "detail": score.detail})
            for sample, score in zip(samples, scores, strict=True)
        )
        write_text(file, "".join(row + "\n" for row in rows))
        return scores


def _ks(request: Request, samples: int) -> list[int]:
    """The k of pass@k for so many samples a task."""
    if too_many := [k for k in request.ks if k > samples]:
        raise UserError(f"--k={too_many[0]}: there are {samples} samples a task")
    return list(request.ks) or [k for k in (1, 10, 100) if k <= samples]


def _check(request: Request) -> None:
    unknown = [name for name in request.suites if name not in SUITES]
    if unknown or not request.suites:
        raise UserError(f"--suite={','.join(unknown)}: must be of {', '.join(SUITES)}")
    if len(set(request.suites)) < len(request.suites):
        raise UserError(f"--suite={','.join(request.suites)}: names a suite twice")
    sources = {"--checkpoint": request.checkpoint, "--hf": request.hf, "--samples-from": request.samples_from}
    named = [name for name, value in sources.items() if value is not None]
    if len(named) != 1:
        raise UserError(f"{' and '.join(named) or 'no model'}: give one of {', '.join(sources)}")
    if request.samples_from is not None and len(request.suites) > 1:
        raise UserError("--samples-from: a file holds samples of one --suite")
    for name, number, least in (("--samples", request.samples, 1), ("--limit", request.limit, 1)):
        if number is not None and number < least:
            raise UserError(f"{name}={number}: must be at least {least}")
    if request.max_new_tokens is not None and request.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens={request.max_new_tokens}: must be at least 1")
    if request.workers is not None and request.workers < 1:
        raise UserError(f"--workers={request.workers}: must be at least 1")
    if request.seed < 0:
        raise UserError(f"--seed={request.seed}: must be at least 0")
    if not 0 <= request.temperature <= 10:
        raise UserError(f"--temperature={request.temperature}: must be from 0 (greedy) to 10")
    if not 0 < request.top_p <= 1:
        raise UserError(f"--top-p={request.top_p}: must be above 0 and at most 1 (all tokens)")
    if request.samples_from is None:
        if request.temperature == 0 and request.top_p < 1:
            raise UserError(f"--top-p={request.top_p}: has no effect on greedy samples: set --temperature")
        if request.temperature == 0 and request.samples > 1:
            raise UserError(f"--samples={request.samples}: greedy samples are all the same: set --temperature")
        if too_many := [k for k in request.ks if k > request.samples]:
            raise UserError(f"--k={too_many[0]}: needs --samples of at least {too_many[0]}")
    if wrong := [k for k in request.ks if k < 1]:
        raise UserError(f"--k={wrong[0]}: must be at least 1")
    if request.mode not in ("think", "no-think", "both"):
        raise UserError(f"--mode={request.mode}: must be think, no-think or both")
    if request.engine not in ("megatron", "vllm"):
        raise UserError(f"--engine={request.engine}: must be megatron or vllm")
    if request.out.exists() and not request.out.is_dir():
        raise UserError(f"--out={request.out}: is a file: choose another folder")
    if request.data is not None and not request.data.is_dir():
        raise UserError(f"--data={request.data}: no such folder")


def _weights(request: Request) -> "Weights | None":
    if request.samples_from is not None:
        return None
    from ra3_megatron.verbs.sampled_model import find_weights

    return find_weights(request.checkpoint, request.hf, request.engine, request.temperature, request.overrides)


def _modes(request: Request, suite: Suite, weights: "Weights | None") -> list[str]:
    if weights is None:
        return [SAMPLES_FILE]
    from ra3_megatron.evaluate.modes import modes_of

    return [str(mode) for mode in modes_of(suite, request.mode, weights.config.text.latent_format)]


def _opened_once(stack: ExitStack, weights: "Weights | None", out: Path) -> "Callable[[], RolloutEngine]":
    """The engine, opened when it is first asked for."""
    opened: list[RolloutEngine] = []

    def engine() -> "RolloutEngine":
        if not opened:
            from ra3_megatron.verbs.sampled_model import open_engine

            assert weights is not None
            out.mkdir(parents=True, exist_ok=True)
            opened.append(stack.enter_context(open_engine(weights, out)))
        return opened[0]

    return engine


def _computing(config: RunConfig) -> dict[str, Any]:
    """What of a model's configuration decides what it writes, beside its weights, by dotted key."""
    decisive = {
        "model": config.model.model_dump(mode="json", exclude={"hf"}),
        "text": config.text.model_dump(mode="json"),
        "rollout": {"vllm": {"quantization": config.rollout.vllm.quantization}},
    }
    return flat(decisive)


def _model(request: Request, weights: "Weights | None") -> dict[str, Any]:
    if weights is None:
        assert request.samples_from is not None
        digest = hashlib.sha256(request.samples_from.read_bytes()).hexdigest()
        return {"name": str(request.samples_from), "identity": digest}
    return {"name": weights.name, "identity": weights.identity}
