"""Who scores a suite: a harness's own code, or our sandbox for the two suites whose harness is on no package index."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ra3_megatron.evaluate.data import Tasks
from ra3_megatron.evaluate.samples import Sample, Score
from ra3_megatron.evaluate.scoring import Done, HarnessScorer, Scorer
from ra3_megatron.rlvr.problems import codeforces, livecodebench
from ra3_megatron.rlvr.sandbox import Isolation, Limits, Program, Sandbox, Verdict
from ra3_megatron.text.fences import program_in


@dataclass(frozen=True)
class GradedScorer:
    """`Scorer` with `Sandbox.grade`: the program shares no process with its tests."""

    tasks: Tasks
    isolation: Isolation
    workers: int
    prompt: Callable[[dict[str, Any]], str]
    program: Callable[[dict[str, Any], str], Program]
    """Of a row and the code that ends the program."""
    limits: Callable[[dict[str, Any]], Limits]

    def prompts(self) -> list[str]:
        return [self.prompt(row) for row in self.tasks.rows]

    def references(self) -> list[Sample]:
        return []

    def score(self, samples: Sequence[Sample], ours: bool, on_done: Done) -> list[Score]:
        by_task: dict[str, list[int]] = {}
        for place, sample in enumerate(samples):
            by_task.setdefault(sample.task_id, []).append(place)
        scores: dict[int, Score] = {}
        rows = dict(zip(self.tasks.ids, self.tasks.rows, strict=True))
        by_limits: dict[Limits, list[str]] = {}
        for name in by_task:
            by_limits.setdefault(self.limits(rows[name]), []).append(name)
        for limits, names in by_limits.items():
            with Sandbox(self.isolation, limits, self.workers) as sandbox:
                for name in names:
                    texts = [_code(samples[place]) for place in by_task[name]]
                    empty = self.program(rows[name], "")  # its tests are read once: they may take seconds
                    outcomes = sandbox.grade([replace(empty, code=empty.code + text) for text in texts])
                    for place, outcome in zip(by_task[name], outcomes, strict=True):
                        passed = outcome.verdict is Verdict.PASSED
                        detail = f"{outcome.verdict}: {outcome.detail}".rstrip(": ")
                        scores[place] = Score({"passed": float(passed)}, detail)
                    on_done(len(texts))
        return [scores[place] for place in range(len(samples))]


def _code(sample: Sample) -> str:
    """The program of a sample: what a completion holds, as in RLVR, or a solution as it is."""
    return sample.solution or program_in(sample.completion or "")


_GRADED = {
    "livecodebench": (livecodebench.prompt, livecodebench.program, livecodebench.limits),
    "codeforces": (codeforces.prompt, codeforces.program, codeforces.limits),
}


def default_workers() -> int:
    """Samples at once: below the number of cores, so that time limits hold."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


@contextmanager
def scorer_for(tasks: Tasks, isolation: Isolation, workers: int) -> Iterator[Scorer]:
    """The scorer of a suite, and a folder for it that is gone afterwards."""
    if tasks.suite.kind in _GRADED:
        yield GradedScorer(tasks, isolation, workers, *_GRADED[tasks.suite.kind])
        return
    with tempfile.TemporaryDirectory(prefix="ra3-eval-") as folder:
        Path(folder).chmod(0o755)
        yield HarnessScorer(tasks, isolation, workers, Path(folder) / "harness")
