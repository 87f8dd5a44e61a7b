"""`results.json`: everything that a figure depends on beside the figure, and tables for a terminal and for Markdown.

{"format", "model", "suites": {"humaneval": {call, facts, "reference", "modes": {"think": {…}}}}}

Suites may come from several calls for the same model, so what belongs to a call (`created`, `versions`, `sandbox`)
stands in each suite.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ra3_megatron.config.errors import UserError
from ra3_megatron.evaluate.data import Tasks
from ra3_megatron.evaluate.estimates import mean_pass_at_k
from ra3_megatron.evaluate.samples import Sample, Score
from ra3_megatron.evaluate.suites import Suite
from ra3_megatron.report.numbers import ABSENT, duration, number
from ra3_megatron.report.run_folder import read_json

FILE, MARKDOWN = "results.json", "results.md"
FORMAT = 2
NAMED = 20
"""Tasks that are named at most."""


def suite_facts(tasks: Tasks, prompts_sha256: str | None) -> dict[str, Any]:
    """What a suite's figures depend on, whatever the model. prompts_sha256: None where no prompt was made."""
    suite = tasks.suite
    return {
        "title": suite.title,
        "harness": suite.harness,
        "metrics": list(suite.metrics),
        "tasks": len(tasks.rows),
        "of_tasks": suite.tasks,
        "left_out": tasks.left_out,
        "data": tasks.source,
        "data_sha256": tasks.sha256,
        "prompt": suite.prompt,
        "prompts_sha256": prompts_sha256,
        "stops": list(suite.stops),
        "stops_from": suite.stops_from,
        "ceiling": suite.ceiling,
        "known_faults": list(suite.faults),
    }


def reference_facts(suite: Suite, samples: Sequence[Sample], scores: Sequence[Score], seconds: float) -> dict[str, Any]:
    """How the reference solutions did on this machine: what a figure can lose to the machine."""
    if not samples:
        return {"score": None, "reason": "the data holds no reference solutions"}
    failed = {
        metric: [sample.task_id for sample, score in zip(samples, scores, strict=True) if not score.scores[metric]]
        for metric in suite.metrics
    }
    return {
        "score": {metric: [len(samples) - len(names), len(samples)] for metric, names in failed.items()},
        "failed": {metric: names[:NAMED] for metric, names in failed.items()},
        "seconds": round(seconds, 2),
    }


def mode_facts(
    tasks: Tasks,
    samples: Sequence[Sample],
    scores: Sequence[Score],
    ks: Sequence[int],
    seconds: dict[str, float],
    notes: dict[str, Any],
) -> dict[str, Any]:
    """The figures of one mode of a model on a suite. ks: each at most the number of samples a task."""
    suite = tasks.suite
    by_task: dict[str, list[int]] = {name: [] for name in tasks.ids}
    for place, sample in enumerate(samples):
        by_task[sample.task_id].append(place)
    counts = {
        metric: {
            name: [len(places), sum(int(scores[place].scores[metric]) for place in places)]
            for name, places in by_task.items()
        }
        for metric in suite.metrics
    }
    estimates = {
        metric: {f"pass@{k}": mean_pass_at_k([(n, c) for n, c in by.values()], k).row() for k in ks}
        for metric, by in counts.items()
    }
    solved = {metric: sum(c > 0 for _, c in by.values()) for metric, by in counts.items()}
    said = Counter(score.detail for score in scores if score.detail)
    return {
        "samples_per_task": len(samples) // len(by_task),
        "estimates": estimates,
        "solved_tasks": solved,
        "tokens": _tokens(samples, sum(c for _, c in counts[suite.metrics[0]].values())),
        "seconds": {key: round(value, 2) for key, value in seconds.items()},
        **notes,
        "most_said": [[text, count] for text, count in said.most_common(5)] if suite.answers_are_code else [],
        "counts": counts,
    }


def _tokens(samples: Sequence[Sample], right: int) -> dict[str, Any] | None:
    """What samples cost; None where their tokens are not known. right: samples that are right."""
    if any(sample.tokens is None for sample in samples):
        return None
    total = sum(sample.tokens or 0 for sample in samples)
    return {
        "sampled": total,
        "thought": sum(sample.thought_tokens or 0 for sample in samples),
        "per_sample": total / len(samples),
        "per_right_sample": total / right if right else None,
    }


def read_results(path: Path) -> dict[str, Any]:
    """A file of results, or the one in a folder. Raises UserError when it is none."""
    file = path / FILE if path.is_dir() else path
    found = read_json(file)
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("suites"), dict):
        raise UserError(f"{file}: not the results of ra3 eval (format {FORMAT})")
    return found


def earlier_suites(folder: Path, identity: str) -> dict[str, Any]:
    """The suites of the results in a folder; none when there are no results.

    Raises UserError when they are another model's: identity is of the one that is evaluated now.
    """
    file = folder / FILE
    if not file.exists():
        return {}
    found = read_results(file)
    model = found.get("model")
    theirs = str(model.get("identity")) if isinstance(model, dict) else "none"
    if theirs != identity:
        raise UserError(
            f"{file}: holds results of another model ({theirs[:12]}, now {identity[:12]}): choose another --out"
        )
    suites: dict[str, Any] = found["suites"]
    return suites


HEADINGS = (
    "suite",
    "mode",
    "metric",
    "k",
    "score",
    "95% over tasks",
    "references",
    "tokens/right sample",
    "thoughts",
    "time",
)


def table_rows(results: dict[str, Any]) -> list[list[str]]:
    """The table of results, a row for every suite, mode, metric and k."""
    rows = []
    for name, suite in results["suites"].items():
        tasks = f"{name} ({suite['tasks']}" + (f" of {suite['of_tasks']})" if suite["of_tasks"] else ")")
        for mode, facts in suite["modes"].items():
            for metric, by_k in facts["estimates"].items():
                for k, value in by_k.items():
                    rows.append([tasks, mode, metric, k, *_cells(suite, facts, metric, value)])
    return rows


def _cells(suite: dict[str, Any], facts: dict[str, Any], metric: str, value: dict[str, Any]) -> list[str]:
    reference, tokens = suite["reference"].get("score"), facts["tokens"]
    share = ABSENT
    if tokens and tokens["sampled"]:
        share = f"{100 * tokens['thought'] / tokens['sampled']:.1f}%"
    return [
        f"{100 * value['value']:.1f}%",
        f"{100 * value['low']:.1f} to {100 * value['high']:.1f}",
        "/".join(map(str, reference[metric])) if reference else ABSENT,
        number(tokens["per_right_sample"], 0) if tokens and tokens["per_right_sample"] else ABSENT,
        share,
        duration(sum(facts["seconds"].values())),
    ]


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], title: str, console: Console) -> None:
    """Print a table, never cut to the width of the terminal; the first four columns are names."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for place, heading in enumerate(headings):
        width = max(len(row[place]) for row in [headings, *rows])
        table.add_column(heading, justify="left" if place < 4 else "right", no_wrap=True, min_width=width)
    for row in rows:
        table.add_row(*row)
    console.print(table, crop=False, soft_wrap=True)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def markdown_page(results: dict[str, Any]) -> str:
    """The table with what has to be said beside it."""
    lines = [f"Model: `{results['model']['name']}` ({results['model']['identity'][:12]})\n\n"]
    lines.append(markdown(HEADINGS, table_rows(results)))
    for name, suite in results["suites"].items():
        lines.append(f"\n**{name}**: {suite['title']}; {suite['harness']}; data {suite['data_sha256'][:12]}.\n")
        lines.append(f"Prompt: {suite['prompt']}. Stops ({suite['stops_from']}): {suite['stops']}.\n")
        for metric, names in suite["reference"].get("failed", {}).items():
            if names:
                lines.append(f"Reference solutions that failed here ({metric}): {', '.join(names)}.\n")
        for fault in suite["known_faults"]:
            lines.append(f"Known: {fault}.\n")
        for mode, facts in suite["modes"].items():
            if "temperature" in facts:
                lines.append(f"{mode}: {_sampling(facts)}.\n")
            if facts.get("note"):
                lines.append(f"{mode}: {facts['note']}.\n")
            if facts.get("prompts_too_long"):
                lines.append(f"{mode}: {len(facts['prompts_too_long'])} prompts did not fit and count as unsolved.\n")
    return "".join(lines)


def _sampling(facts: dict[str, Any]) -> str:
    """How a mode was sampled."""
    most = f"at most {facts['max_new_tokens']} tokens"
    if facts["temperature"] == 0:
        return f"greedy, {most}"
    law = f"temperature {facts['temperature']:g}, top-p {facts['top_p']:g}"
    return f"{facts['samples_per_task']} samples a task, {law}, seed {facts['seed']}, {most}"
