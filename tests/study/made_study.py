"""Made cells: what finished runs leave in their folders, with figures that are nobody's result."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ra3_megatron.report.held_out import DocumentFigures, LineFigures, lines_file, write_held_out
from ra3_megatron.report.run_folder import write_json, write_text
from ra3_megatron.report.summary import Arm, Iteration, Monitor, Phase, Summary, write_summary
from ra3_megatron.study.plan import Cell, cells_of, resolve
from ra3_megatron.study.spec import STUDY_FILE, StudyConfig, dump_study, make_study
from ra3_megatron.study.state import prepare

SMALL = {
    "corpus": {"source": "folder", "path": "code"},
    "tokenizer": {"vocab_size": 330},
    "text": {"max_latent_tokens": 4},
    "model": {
        "num_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_query_groups": 1,
        "context_length": 64,
    },
    "em": {"iterations": 1, "control": False},
    "mstep": {"steps": 4},
}
"""Settings of runs that nobody runs."""


def study_of(folder: Path, **values: Any) -> StudyConfig:
    """A study in `folder`/out with the small configuration."""
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(SMALL))
    return make_study({"name": "made", "folder": str(folder / "out"), "config": str(file), **values}, "made.yaml")


def line(nll: float, thought: str | None = None, tokens: int = 4, greedy: bool = False) -> LineFigures:
    return LineFigures(
        text="x\n",
        thought=thought,
        offered=True,
        tokens=tokens,
        nll=nll,
        raw_nll=nll + 0.1,
        greedy=greedy,
        raw_greedy=False,
        layout_nll=0.0,
        raw_layout_nll=0.0,
    )


def documents(nll: Callable[[int, int], float], count: int = 12, lines: int = 3) -> list[DocumentFigures]:
    """Documents whose line number l of document d has `nll(d, l)`."""
    return [
        DocumentFigures(document=f"d{d}", sample=0, lines=[line(nll(d, n)) for n in range(lines)]) for d in range(count)
    ]


def finish(
    cell: Cell,
    folder: Path,
    method: str,
    gain: float,
    iterations: int = 1,
    flops: bool = True,
    rate: float = 0.2,
    monitors: int = 0,
) -> None:
    """Leave what a finished run leaves; each iteration lowers the cross-entropy by `gain`."""
    draw = random.Random(cell.seed)
    start = 2.5 + draw.gauss(0, 0.05)

    def arm(iteration: int) -> dict[str, Any]:
        ce = start - gain * iteration + draw.gauss(0, 0.005)
        figures = {"raw_code_ce": ce + 0.02, "code_accuracy": 0.9 - ce / 5, "raw_code_accuracy": 0.89 - ce / 5}
        cost = {"tokens": 1000 * iteration, "seconds": 10.0 * iteration, "total_seconds": 25.0 * iteration}
        return {"code_ce": ce, "think_rate": rate, "elbo": -4 * ce, "mean_thought_tokens": 3.25, **figures, **cost}

    names = ("ntp",) if method == "ntp" else ("estep", "infuse", "mstep")
    keys = ["warm_start", *(f"{name}-{i}" for i in range(1, iterations + 1) for name in names)]
    phases = {key: Phase(seconds=3.0, tokens=100, **({"flops": 100.0} if flops else {})) for key in keys}
    entries = [Iteration(iteration=i, arm=method, **arm(i)) for i in range(1, iterations + 1)]
    last = {method: Arm(**arm(iterations))} if entries else {}
    fired = Monitor(name="noisy latents", message="0.01 above", advice="…", phase="evaluation", iteration=1)
    summary = Summary(method=method, base=Arm(**arm(0)), iterations=entries, phases=phases, **last)
    write_summary(folder, replace(summary, monitors=[fired] * monitors))
    for iteration in range(iterations + 1):
        values = documents(lambda d, n, i=iteration: 4 + math.sin(d + n) - 4 * gain * i + draw.gauss(0, 0.05))
        write_held_out(lines_file(folder, method if iteration else "base", iteration), values)
    versions = {"python": "3.11.9", "cores": 2, "packages": {"torch": "2.13.0", "vllm": None}}
    write_json(folder / "versions.json", versions)


def make(study: StudyConfig, gains: Mapping[str, float], without: tuple[str, ...] = (), **figures: Any) -> list[Cell]:
    """Finish all cells of a study but those `without`; `gains` by group. Returns all cells."""
    cells = cells_of(study)
    configs = resolve(study, cells)
    write_text(study.path / STUDY_FILE, dump_study(study))
    for cell in cells:
        if cell.name not in without:
            folder = cell.folder(study.path)
            prepare(folder, configs[cell.name])
            config = configs[cell.name]
            finish(cell, folder, config.method, gains.get(cell.group, 0.1), config.em.iterations, **figures)
    return cells
