"""`ra3 inspect`: what is in a checkpoint, and whether it is whole."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ra3_megatron.config.errors import UserError
from ra3_megatron.mcore.checkpoint_contents import (
    INDEX,
    Contents,
    Problem,
    TensorFacts,
    find_problems,
    problems_at_sight,
    read_contents,
)
from ra3_megatron.report.numbers import count, duration

WIDTH = 200
"""Columns without a terminal."""
_TENSORS_NAMED = 4
"""Tensors of a damaged file that are named."""
_LABELS = {
    "phase": "phase",
    "iteration": "EM iteration",
    "step": "step",
    "weight_version": "weight version",
    "tokens": "tokens",
    "seconds": "training time",
    "version": "written by ra3",
    "tokenizer": "tokenizer",
    "data": "data position",
}
_ELSEWHERE = ("architecture", "layout", "precision", "optimizer", "files")


def inspect(folder: Path, verify: bool = False, tensors: bool = True, as_json: bool = False) -> int:
    """Print what the checkpoint in `folder` holds, on stdout.

    verify: read everything and report what is damaged; without it, sizes of files alone. tensors: list each tensor.
    as_json: for machines. Returns 1 when there is a problem, else 0. Raises UserError when there is no complete
    checkpoint in `folder`.
    """
    contents = read_contents(folder)
    if contents.index is None and not verify:
        raise UserError(f"{folder / INDEX}: is missing or damaged: see what else is with --verify")
    problems = find_problems(contents) if verify else problems_at_sight(contents) or None
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    if as_json:
        console.file.write(json.dumps(_json(contents, problems, tensors), indent=1) + "\n")
    else:
        _print(contents, problems, tensors, console)
    return 1 if problems else 0


def _json(contents: Contents, problems: list[Problem] | None, tensors: bool) -> dict[str, Any]:
    return {
        "folder": str(contents.folder),
        **contents.record,
        "parameters": contents.parameters,
        "bytes": contents.bytes,
        "tensors": [asdict(tensor) for tensor in contents.tensors] if tensors else None,
        "problems": None if problems is None else [asdict(problem) for problem in problems],
    }


def _print(contents: Contents, problems: list[Problem] | None, tensors: bool, console: Console) -> None:
    record = contents.record
    console.print(Text.assemble(("checkpoint  ", "bold"), str(contents.folder)), soft_wrap=True)
    model = [(key.removeprefix("model."), _value(value)) for key, value in record["architecture"].items()]
    total = f"{count(contents.parameters)} ({contents.parameters:,})"
    _table(console, "model", [*model, ("parameters", total), ("precision", record["precision"])])
    layout = [(key, _value(value)) for key, value in record["layout"].items()]
    _table(console, "saved at", [*layout, ("optimizer state", _value(record["optimizer"]))])
    state = [(_LABELS.get(key, key), key, value) for key, value in record.items() if key not in _ELSEWHERE]
    _table(console, "state", [(label, duration(v) if key == "seconds" else _value(v)) for label, key, v in state])
    if tensors and contents.tensors:
        _tensor_table(console, contents.tensors)
    _table(
        console,
        "size",
        [*_totals(contents.tensors), ("files, as saved", f"{len(record['files'])}, {_mb(contents.bytes)}")],
    )
    if problems is None:
        return
    console.print()
    for problem in problems:
        where = contents.folder / problem.name if problem.name in record["files"] else problem.name
        console.print(Text.assemble(("! ", "bold red"), f"{where}: {problem.problem}{_named(problem)}"), soft_wrap=True)
    if not problems:
        console.print(Text("whole: every file has its checksum, every number is finite", style="green"))


def _table(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)


def _tensor_table(console: Console, tensors: list[TensorFacts]) -> None:
    table = Table(title="tensors", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("type", no_wrap=True)
    table.add_column("shards", justify="right", no_wrap=True)
    table.add_column("MB", justify="right", no_wrap=True)
    for tensor in tensors:
        shape = " x ".join(map(str, tensor.shape))
        table.add_row(tensor.name, shape, tensor.dtype, str(tensor.shards), f"{tensor.bytes / 1e6:.3f}")
    console.print()
    console.print(table)


def _totals(tensors: list[TensorFacts]) -> list[tuple[str, str]]:
    parts = (("weights", [t for t in tensors if t.is_weight]), ("optimizer", [t for t in tensors if not t.is_weight]))
    return [(name, f"{len(part)} tensors, {_mb(sum(t.bytes for t in part))}") for name, part in parts if part]


def _named(problem: Problem) -> str:
    if not problem.tensors:
        return ""
    more = len(problem.tensors) - _TENSORS_NAMED
    names = ", ".join(problem.tensors[:_TENSORS_NAMED])
    return f" (it holds shards of {names}{f' and {more} more' if more > 0 else ''})"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.3f} MB"


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
