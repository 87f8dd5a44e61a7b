"""Verbs of evaluation: run suites, compare results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ra3_megatron.config.errors import UserError

evaluation = typer.Typer(help="Score a model on code and mathematics, with the code of the harnesses that people cite.")

_File = Annotated[Path, typer.Argument(metavar="RESULTS", help="results.json, or its folder.", show_default=False)]


@evaluation.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            metavar="A,B",
            help="humaneval, humaneval+, mbpp, mbpp+, mbpp-500-3shot, gsm8k, livecodebench, codeforces.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of results.", show_default=False)
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", metavar="DIR", help="Folder of a checkpoint.", show_default=False)
    ] = None,
    hf: Annotated[
        Path | None, typer.Option("--hf", metavar="DIR", help="Hugging Face folder.", show_default=False)
    ] = None,
    samples_from: Annotated[
        Path | None,
        typer.Option(
            "--samples-from",
            metavar="FILE",
            help="Score these samples (task_id and completion or solution, one JSON a line) instead of a model's.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="Folder with the suites' data.", show_default=False),
    ] = None,
    mode: Annotated[str, typer.Option("--mode", metavar="think|no-think|both", help="May the model think?")] = "think",
    samples: Annotated[int, typer.Option("--samples", metavar="N", help="Samples a task.")] = 1,
    temperature: Annotated[float, typer.Option("--temperature", metavar="T", help="0: greedy.")] = 0.0,
    top_p: Annotated[
        float,
        typer.Option("--top-p", metavar="P", help="Sample the most probable tokens alone that have together P."),
    ] = 1.0,
    k: Annotated[
        str | None,
        typer.Option("--k", metavar="1,10", help="k of pass@k; by default 1, 10, 100 as far as there are samples."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", help="Only the first N tasks.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", metavar="N", help="Longest completion; by default the suite's.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the samples.")] = 0,
    engine: Annotated[str, typer.Option("--engine", metavar="megatron|vllm", help="What samples.")] = "megatron",
    sandbox: Annotated[
        str,
        typer.Option(
            "--sandbox",
            metavar="bubblewrap|subprocess-unsafe",
            help="Where programs run. subprocess-unsafe: with this user's rights, for samples that you trust.",
        ),
    ] = "bubblewrap",
    workers: Annotated[
        int | None,
        typer.Option("--workers", metavar="N", help="Programs at once; by default one less than the cores."),
    ] = None,
    since: Annotated[
        str | None, typer.Option("--since", metavar="YYYY-MM-DD", help="LiveCodeBench: contests from this day on.")
    ] = None,
    until: Annotated[
        str | None, typer.Option("--until", metavar="YYYY-MM-DD", help="LiveCodeBench: contests up to this day.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override of the run's configuration, such as rollout.batch_size=32."
        ),
    ] = None,
) -> None:
    """Score a checkpoint, a Hugging Face folder, or samples that exist; writes results.json and results.md.

    Samples of an interrupted call are used again. Data: --data, else what is installed, else the hub.
    """
    if context.invoked_subcommand is not None:
        return
    if suite is None or out is None:
        raise UserError("ra3 eval needs --suite and --out (ra3 eval --help)")
    from ra3_megatron.rlvr.sandbox import Isolation
    from ra3_megatron.verbs import evaluate as verb

    kinds = [str(kind) for kind in Isolation]
    if sandbox not in kinds:
        raise UserError(f"--sandbox={sandbox}: must be {' or '.join(kinds)}")
    results = verb.evaluate(
        verb.Request(
            suites=tuple(name.strip() for name in suite.split(",") if name.strip()),
            out=out,
            data=data,
            checkpoint=checkpoint,
            hf=hf,
            samples_from=samples_from,
            mode=mode,
            samples=samples,
            temperature=temperature,
            top_p=top_p,
            ks=_numbers(k),
            limit=limit,
            max_new_tokens=max_new_tokens,
            seed=seed,
            engine=engine,
            sandbox=Isolation(sandbox),
            workers=workers,
            window=(since, until),
            overrides=tuple(setting or ()),
        )
    )
    verb.show(results, out)


@evaluation.command("compare")
def compare(
    a: _File,
    b: Annotated[
        Path | None, typer.Argument(metavar="RESULTS", help="The second one; none with --modes.", show_default=False)
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            "--modes", metavar="A,B", help="Two modes of one results file, such as think,no-think.", show_default=False
        ),
    ] = None,
) -> None:
    """Compare two results on the same tasks, or two modes of one: B minus A, an interval over tasks, McNemar's test."""
    from ra3_megatron.verbs.evaluate import compare as compare_results

    compare_results(a, b, () if modes is None else tuple(name.strip() for name in modes.split(",")))


def _numbers(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text is not None else ()
    except ValueError as error:
        raise UserError(f"--k={text}: must be whole numbers such as 1,10") from error
