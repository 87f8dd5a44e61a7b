"""The report of an RLVR run: `report.html`, its pictures, and the few lines on the terminal.

Only what is in the run folder is used, so the report of a run that goes on, or was killed, is built the same way.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ra3_megatron.report.benchmarks import benchmark_section
from ra3_megatron.report.build import code_style, highlight_python, highlight_yaml, rows_of
from ra3_megatron.report.headline import headline
from ra3_megatron.report.metrics import read_metrics
from ra3_megatron.report.numbers import number, percent
from ra3_megatron.report.pages import render_page, write_picture
from ra3_megatron.report.plots import one_panel_each, series
from ra3_megatron.report.responses import FOLDER, ResponseRecord, read_responses
from ra3_megatron.report.run_folder import RunFolder, read_config, read_json, read_object, require_run, write_text
from ra3_megatron.report.timings import time_table

FIGURES: dict[str, tuple[str, dict[tuple[str, str], str]]] = {
    "held_out": (
        "Held-out problems: the share of responses that pass all tests, and what they look like.",
        {
            ("held_out", "pass_at_1"): "held out: pass@1",
            ("held_out", "solved_problems"): "held out: problems with a right response",
            ("held_out", "response_tokens"): "held out: tokens of a response",
            ("held_out", "thoughts_per_response"): "held out: thoughts of a response",
        },
    ),
    "rewards": (
        "Training problems: rewards of all responses sampled. Only groups whose rewards differ have a gradient.",
        {
            ("rlvr", "reward"): "mean reward",
            ("rlvr", "solved_problems"): "problems with a right response",
            ("rlvr", "all_right"): "groups all right",
            ("rlvr", "all_wrong"): "groups all wrong",
        },
    ),
    "policy": (
        "The policy: how it changes, and whether what samples agrees with what trains.",
        {
            ("rlvr", "entropy"): "entropy (nats/token)",
            ("rlvr", "kl"): "KL to the start (nats/token)",
            ("rlvr", "grad_norm"): "gradient norm",
            ("rlvr", "clip_fraction"): "clipped tokens (share)",
            ("rlvr", "log_prob_mismatch"): "engine against trainer (mean |ratio - 1|)",
            ("rlvr", "staleness"): "age of the weights that sampled (updates)",
        },
    ),
    "responses": (
        "The responses of training.",
        {
            ("rlvr", "response_tokens"): "tokens of a response",
            ("rlvr", "cut_responses"): "cut at the greatest length (share)",
            ("rlvr", "thoughts_per_response"): "thoughts of a response",
            ("rlvr", "verdict_timeout"): "programs that ran out of time (share)",
        },
    ),
}
"""Name of a picture -> its caption, and its panels: (phase, metric) -> title."""

SHOWN = 6
"""Responses of the first and of the last evaluation on the page."""


def build_rlvr_report(run_dir: Path | str) -> Path:
    """Build `report.html` and `figures/*.png`; the path of the report. Raises UserError when it is no run folder."""
    folder = require_run(run_dir)
    records = read_metrics(folder.path)
    folder.figures.mkdir(exist_ok=True)
    pictures = []
    for name, (caption, panels) in FIGURES.items():
        curves = [(phase, metric, title) for (phase, metric), title in panels.items()]
        figure = one_panel_each(records, [c for c in curves if series(records, c[0], c[1]).steps], None)
        if figure is None:
            (folder.figures / f"{name}.png").unlink(missing_ok=True)
            continue
        uri = write_picture(folder.figures / f"{name}.png", figure)
        pictures.append({"name": name, "caption": caption, "uri": uri})
    versions = read_object(folder.versions)
    config = read_config(folder)
    page = render_page(
        "rlvr.html",
        name=folder.path.resolve().name,
        headline=headline(config, versions),
        evaluations=evaluation_table(records),
        monitors=[record for record in records if "monitor" in record],
        pictures=pictures,
        benchmarks=benchmark_section(records, folder.figures),
        times=time_table(records),
        samples=_samples(folder),
        problems=rows_of(read_json(folder.problems)),
        config=highlight_yaml(config),
        versions=None if versions is None else rows_of(versions),
        precision=read_object(folder.precision),
        code_style=Markup(code_style()),
    )
    write_text(folder.report, page)
    return folder.report


def evaluation_table(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Header and rows: one evaluation on the held-out problems a row."""
    table = [["updates", "pass@1", "problems solved", "tokens", "thoughts", "cut", "timeouts"]]
    for record in records:
        if record["phase"] == "held_out":
            table.append(
                [
                    str(record["step"]),
                    percent(record["pass_at_1"]),
                    percent(record["solved_problems"]),
                    number(record["response_tokens"], 1),
                    number(record["thoughts_per_response"], 2),
                    percent(record["cut_responses"]),
                    percent(record["verdict_timeout"]),
                ]
            )
    return table


def rlvr_summary(run_dir: Path) -> dict[str, Any]:
    """The headline figures of a finished run, for `summary.json`."""
    records = read_metrics(run_dir)
    held = [record for record in records if record["phase"] == "held_out"]
    steps = [record for record in records if record["phase"] == "rlvr" and "sampled_tokens" in record]
    return {
        "kind": "rlvr",
        "updates": steps[-1]["step"] if steps else 0,
        "sampled_tokens": sum(record["sampled_tokens"] for record in steps),
        "seconds": sum(record["seconds"] for record in steps),
        "pass_at_1_first": held[0]["pass_at_1"] if held else None,
        "pass_at_1_last": held[-1]["pass_at_1"] if held else None,
        "pass_at_1_best": max((record["pass_at_1"] for record in held), default=None),
        "monitors": [record["monitor"] for record in records if "monitor" in record],
    }


def print_rlvr_summary(run_dir: Path, console: Console) -> None:
    """The first evaluations and the last ones."""
    header, *rows = evaluation_table(read_metrics(run_dir))
    if len(rows) > 8:
        rows = [*rows[:2], ["…"] * len(header), *rows[-5:]]
    table = Table(title="held-out problems", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in header:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)
    console.print()
    console.print(Text.assemble(("run folder  ", "bold"), str(run_dir)), soft_wrap=True)


def _samples(folder: RunFolder) -> list[dict[str, Any]]:
    """Responses of the first and the last evaluation, the same problems, highlighted."""
    files = sorted((folder.path / FOLDER).glob("held-out-*.jsonl"))
    shown = []
    for file in dict.fromkeys([*files[:1], *files[-1:]]):
        responses: list[ResponseRecord] = list(read_responses(file))[:SHOWN]
        shown.append(
            {
                "step": responses[0].step if responses else 0,
                "responses": [
                    {"record": one, "prompt": _prompt(one), "text": highlight_python(one.text)} for one in responses
                ],
            }
        )
    return shown


def _prompt(record: ResponseRecord) -> Markup:
    """Comments of a prompt are no thoughts, and a question is no Python."""
    if record.code_prompt:
        return highlight_python(record.prompt, thoughts=False)
    return Markup.escape(record.prompt.strip("\n"))
