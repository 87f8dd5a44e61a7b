"""`report.html` from a run folder: one file with its pictures inside, and the pictures again in `figures/`.

Only what is in the run folder is used, so the report of a run that is going on, or was killed, is built the same way;
it says which parts are missing.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.figure import Figure
from pygments import highlight  # type: ignore[import-untyped]
from pygments.formatters import HtmlFormatter  # type: ignore[import-untyped]
from pygments.lexers import PythonLexer, YamlLexer  # type: ignore[import-untyped]
from pygments.token import STANDARD_TYPES  # type: ignore[import-untyped]

from ra3_megatron.report.benchmarks import benchmark_section
from ra3_megatron.report.headline import headline
from ra3_megatron.report.metrics import read_metrics
from ra3_megatron.report.numbers import count, duration, number, percent
from ra3_megatron.report.pages import render_page, write_picture
from ra3_megatron.report.plots import draw_figures
from ra3_megatron.report.run_folder import RunFolder, read_config, read_object, require_run, write_text
from ra3_megatron.report.snippets import thought_spans
from ra3_megatron.report.summary import Monitor, Summary, read_summary
from ra3_megatron.report.terminal import arm_rows
from ra3_megatron.report.timings import time_table

CAPTIONS = {
    "cross_entropy": "Held-out cross-entropy of code tokens after each EM iteration, all arms on the same documents.",
    "code_ce": "Training cross-entropy, code and thought tokens apart. Only the code curves compare with each other.",
    "estep": "E-step: what the policy gradient does to q. Dotted lines: a new EM iteration.",
    "loss": "Training loss of each phase. Dotted lines: a new EM iteration.",
    "grad_norm": "Gradient norm before clipping.",
    "throughput": "Training throughput over all processes.",
}

_MAX_ITEMS = 40
"""Entries of one list or table of the manifest that are printed; the file has all."""


def build_report(run_dir: Path | str) -> Path:
    """Build `report.html` and `figures/*.png`; the path of the report.

    Raises:
        UserError: `run_dir` is not the folder of a run, or one of its files is damaged.
    """
    folder = require_run(run_dir)
    records = read_metrics(folder.path)
    summary = read_summary(folder.path) if folder.summary.exists() else None
    pictures = _write_pictures(folder, draw_figures(records, summary))
    write_text(folder.report, _render(folder, records, summary, pictures))
    return folder.report


def _write_pictures(folder: RunFolder, figures: dict[str, Figure]) -> list[dict[str, str]]:
    """Write each figure to `figures/`; names, captions and data URIs of them, in the order of the captions.

    Pictures of an earlier report that are not drawn any more are removed.
    """
    folder.figures.mkdir(exist_ok=True)
    for name in CAPTIONS.keys() - figures.keys():
        (folder.figures / f"{name}.png").unlink(missing_ok=True)
    pictures = []
    for name in sorted(figures, key=list(CAPTIONS).index):
        uri = write_picture(folder.figures / f"{name}.png", figures[name])
        pictures.append({"name": name, "caption": CAPTIONS[name], "uri": uri})
    return pictures


def _render(
    folder: RunFolder, records: list[dict[str, Any]], summary: Summary | None, pictures: list[dict[str, str]]
) -> str:
    manifest = read_object(folder.manifest)
    versions = read_object(folder.versions)
    config = read_config(folder)
    drawn = {picture["name"] for picture in pictures}
    return render_page(
        "report.html",
        name=folder.path.resolve().name,
        headline=headline(config, versions),
        summary=summary,
        state=_state(records, summary),
        arm_names=[] if summary is None else list(summary.arms),
        arm_rows=[] if summary is None else arm_rows(summary.arms),
        pictures=pictures,
        missing=[CAPTIONS[name] for name in CAPTIONS if name not in drawn],
        monitors=_monitors(records, summary),
        benchmarks=benchmark_section(records, folder.figures),
        times=time_table(records),
        snippets=[] if summary is None else [highlight_python(text) for text in summary.snippets],
        config=highlight_yaml(config),
        manifest=None if manifest is None else rows_of(manifest),
        versions=None if versions is None else rows_of(versions),
        precision=read_object(folder.precision),
        code_style=Markup(code_style()),
        number=number,
        count=count,
        duration=duration,
        percent=percent,
    )


def _state(records: list[dict[str, Any]], summary: Summary | None) -> str:
    """Where the run stands, in a sentence; empty when it has ended."""
    if summary is not None:
        return ""
    if not records:
        return "This run has logged nothing yet."
    last = records[-1]
    where = f"phase {last['phase']}, iteration {last['iteration']}, step {last['step']}"
    return f"This run has not ended: it was last seen in {where}. The table comes with its summary."


def _monitors(records: list[dict[str, Any]], summary: Summary | None) -> list[Monitor]:
    """Monitors of the summary; of a run that has not ended, those logged so far."""
    if summary is not None:
        return summary.monitors
    return [
        Monitor(
            name=str(record["monitor"]),
            message=str(record.get("message", "")),
            advice=str(record.get("advice", "")),
            phase=record["phase"],
            iteration=record["iteration"],
        )
        for record in records
        if "monitor" in record
    ]


def highlight_python(text: str, thoughts: bool = True) -> Markup:
    """Highlighted Python; `thoughts`: comments are thoughts, and marked."""
    text = text.strip("\n")
    borders = [border for span in thought_spans(text) for border in span] if thoughts else []
    tokens = [_Token(start, kind, value) for start, kind, value in PythonLexer().get_tokens_unprocessed(text)]
    parts: list[Markup] = []
    for index, (start, end) in enumerate(pairwise([0, *borders, len(text)])):
        if index % 2:
            parts.append(Markup("<mark>{}</mark>").format(text[start:end]))
        else:
            parts += [token.between(start, end) for token in tokens]
    return Markup("").join(parts)


class _Token(NamedTuple):
    """One token of highlighted code."""

    start: int
    kind: Any
    text: str

    def between(self, start: int, end: int) -> Markup:
        """What of the token stands between two positions of the text, in a span with the class of its kind."""
        text = self.text[max(0, start - self.start) : max(0, end - self.start)]
        name = STANDARD_TYPES.get(self.kind, "")
        return Markup('<span class="{}">{}</span>').format(name, text) if name and text else Markup.escape(text)


def highlight_yaml(text: str) -> Markup:
    return Markup(highlight(text, YamlLexer(), HtmlFormatter(nowrap=True)))  # the formatter escapes the text


def code_style() -> str:
    light = HtmlFormatter(style="friendly").get_style_defs("pre.code")
    dark = HtmlFormatter(style="github-dark").get_style_defs("pre.code")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"


def rows_of(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A JSON value as rows of a table: dotted key and text. Long ones are cut, with a note."""
    if isinstance(value, dict | list) and len(value) > _MAX_ITEMS:
        start = dict(list(value.items())[:_MAX_ITEMS]) if isinstance(value, dict) else value[:_MAX_ITEMS]
        return [*rows_of(start, prefix), (prefix, f"… and {len(value) - _MAX_ITEMS} more in the file")]
    if isinstance(value, dict) and value:
        return [row for key, item in value.items() for row in rows_of(item, f"{prefix}.{key}" if prefix else str(key))]
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return [row for index, item in enumerate(value) for row in rows_of(item, f"{prefix}[{index}]")]
    if isinstance(value, list):
        return [(prefix, ", ".join(map(_text, value)) or "none")]
    return [(prefix, _text(value))]


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
