"""Verbs that come before a job: plan and launch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from ra3_megatron.config.errors import UserError


def plan(
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME|HF_DIR", help="Such as llama3.1-8b, or a folder.", show_default=False),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", metavar="N", min=1, help="GPUs of the trainer.", show_default=False)
    ] = None,
    gpu: Annotated[
        str, typer.Option("--gpu", metavar="NAME|FILE", help="h100, h200, b200, a100, or a YAML file.")
    ] = "h100",
    precision: Annotated[
        str, typer.Option("--precision", metavar="bf16|fp8", help="Of products with weights.")
    ] = "bf16",
    sequence: Annotated[int, typer.Option("--sequence", metavar="S", min=16, help="Tokens of a row.")] = 8192,
    global_batch: Annotated[int, typer.Option("--global-batch", metavar="B", min=1, help="Rows a step.")] = 128,
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout", metavar="KEY=N,…", help="Only this one: tensor=8,pipeline=8,micro_batch=1.", show_default=False
        ),
    ] = None,
    gradients: Annotated[
        str, typer.Option("--gradients", metavar="fp32|bf16", help="In which they are kept and reduced.")
    ] = "fp32",
    rollouts_gib: Annotated[
        float, typer.Option("--rollouts-gib", metavar="G", min=0, help="Held by a rollout engine on the same GPU.")
    ] = 0.0,
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="Layouts to show.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the best layout as YAML for ra3 train.", show_default=False),
    ] = None,
    curves: Annotated[
        Path | None,
        typer.Option("--curves", metavar="DIR", help="Write throughput against GPUs to 8,192.", show_default=False),
    ] = None,
    think_rate: Annotated[
        float | None,
        typer.Option(
            "--think-rate",
            metavar="P",
            min=0,
            max=1,
            help="Plan E-steps too: share of lines with a thought.",
            show_default=False,
        ),
    ] = None,
    thought_length: Annotated[float, typer.Option("--thought-length", metavar="L", min=1, help="Tokens.")] = 6,
    lines: Annotated[float, typer.Option("--lines", metavar="T", min=1, help="Lines of a document.")] = 26,
    line_tokens: Annotated[float, typer.Option("--line-tokens", metavar="N", min=1, help="Tokens of a line.")] = 11,
    documents: Annotated[int, typer.Option("--documents", metavar="D", min=1, help="Of an E-step update.")] = 128,
    group: Annotated[int, typer.Option("--group", metavar="G", min=2, help="Transcripts of a document.")] = 8,
    tokens: Annotated[float, typer.Option("--tokens", metavar="N", min=1, help="Of code in a whole run.")] = 1e9,
    iterations: Annotated[int, typer.Option("--iterations", metavar="N", min=1, help="EM iterations of a run.")] = 2,
    updates: Annotated[int, typer.Option("--updates", metavar="N", min=0, help="E-step updates an iteration.")] = 100,
    calibration: Annotated[
        bool, typer.Option("--calibration", help="Compare with published measurements instead.")
    ] = False,
) -> None:
    """Predict memory and step time of every layout that could train a model, and name the best."""
    for option, value, allowed in (("precision", precision, "bf16 fp8"), ("gradients", gradients, "fp32 bf16")):
        if value not in allowed.split():
            raise UserError(f"--{option} {value}: must be {allowed.replace(' ', ' or ')}")
    amounts = {"thought-length": thought_length, "lines": lines, "line-tokens": line_tokens, "tokens": tokens}
    for option, amount in (amounts | {"rollouts-gib": rollouts_gib}).items():
        if not math.isfinite(amount):
            raise UserError(f"--{option} {amount}: must be a finite number")
    from ra3_megatron.verbs import plan as verb

    if calibration:
        verb.calibration()
        return
    if model is None or gpus is None:
        raise UserError("plan needs --model and --gpus, such as --model llama3.1-8b --gpus 16")
    thinking = None
    if think_rate is not None:
        from ra3_megatron.scaling.em import Thinking

        thinking = Thinking(think_rate, thought_length, lines, line_tokens, group, documents)
    verb.plan(
        verb.Asked(
            model,
            gpus,
            gpu,
            precision,
            sequence,
            global_batch,
            layout,
            gradients,
            rollouts_gib,
            top,
            as_json,
            out,
            curves,
            thinking,
            tokens,
            iterations,
            updates,
        )
    )


def launch(
    script: Annotated[
        str, typer.Argument(metavar="SCRIPT", help="slurm/ra3_8b.sh, or its name: 8b.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides for the run.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show script, layout, memory and step time, and submit nothing.")
    ] = False,
    nodes: Annotated[
        int | None, typer.Option("--nodes", metavar="N", min=1, help="Instead of the script's.", show_default=False)
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option("--sbatch", metavar="OPTION", help="For sbatch: --sbatch partition=batch.", show_default=False),
    ] = None,
    gpu: Annotated[str, typer.Option("--gpu", metavar="NAME|FILE", help="What to plan for, as in ra3 plan.")] = "h100",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the rendered script.", show_default=False)
    ] = None,
) -> None:
    """Check, plan and submit a job script: layout, memory a GPU and step time before a node is asked for."""
    options = {}
    for option in sbatch or []:
        key, _, value = option.removeprefix("--").partition("=")
        options[key] = value
    if nodes is not None:
        options["nodes"] = str(nodes)
    from ra3_megatron.verbs.launch import launch as verb

    verb(script, overrides or [], options, gpu, dry_run, out)
