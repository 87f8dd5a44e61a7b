"""Verbs of a run: train, report, show, infuse, theory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ra3_megatron.cli.arguments import Config, Overrides, RequiredConfig, RunFolder, load, require_folder, split
from ra3_megatron.config.errors import UserError

_RunDir = Annotated[
    Path | None,
    typer.Option("--run-dir", metavar="DIR", help="Folder of the run; the same as run_dir=DIR.", show_default=False),
]


def train(
    config: RequiredConfig,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the run folder.")] = False,
    run_dir: _RunDir = None,
) -> None:
    """Train: warm start, EM iterations, control, evaluation and report, as the configuration says.

    On one machine it starts the processes that the layout asks for; under torchrun or srun it uses those it finds.
    """
    path, settings = split(config, overrides)
    if path is None:
        raise UserError("train needs a configuration file before the overrides, such as examples/quickstart.yaml")
    if run_dir is not None:
        settings.append(f"run_dir={json.dumps(str(run_dir), ensure_ascii=False)}")
    resolved = load(path, settings)
    from ra3_megatron.verbs.train import train as run_training

    raise typer.Exit(run_training(resolved, resume=resume))


def rlvr(
    config: Config = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the run folder.")] = False,
    run_dir: _RunDir = None,
) -> None:
    """Reinforcement learning with verifiable rewards: GRPO on programs that are executed in a sandbox.

    The policy starts from rlvr.checkpoint, whose run also says the model, the text format and the tokenizer.
    """
    path, settings = split(config, overrides)
    if run_dir is not None:
        settings.append(f"run_dir={json.dumps(str(run_dir), ensure_ascii=False)}")
    resolved = load(path, [*settings, "method=rlvr"])
    from ra3_megatron.verbs.rlvr import rlvr as run_rlvr

    raise typer.Exit(run_rlvr(resolved, resume=resume))


def report(run_dir: RunFolder) -> None:
    """Rebuild the report of a run from its folder."""
    require_folder(run_dir, "run folder")
    from ra3_megatron.report.run_folder import RunFolder

    if RunFolder(run_dir).problems.is_file():
        from ra3_megatron.report.rlvr import build_rlvr_report

        typer.echo(build_rlvr_report(run_dir))
        return
    from ra3_megatron.report.build import build_report

    typer.echo(build_report(run_dir))


def infuse(
    checkpoint: Annotated[
        Path, typer.Option("--checkpoint", metavar="DIR", help="Checkpoint whose model samples the latents.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the infused corpus.")],
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Sample latents for a corpus and write the infused documents.

    Without CONFIG, the corpus and all else are those of the run that the checkpoint belongs to; overrides such as
    corpus.path=… change them.
    """
    path, settings = split(config, overrides)
    require_folder(checkpoint, "checkpoint folder")
    resolved = load(path, settings) if path is not None else None
    from ra3_megatron.verbs.infuse import infuse as infuse_corpus

    infuse_corpus(checkpoint, out, resolved, settings)


def show(
    run_dir: RunFolder,
    phase: Annotated[
        str | None,
        typer.Option("--phase", metavar="NAME", help="Phase to read; the last one otherwise.", show_default=False),
    ] = None,
    count: Annotated[int, typer.Option("--count", metavar="N", min=1, help="Transcripts to print.")] = 3,
    document: Annotated[
        str | None,
        typer.Option("--document", metavar="NAME", help="Only transcripts of this document.", show_default=False),
    ] = None,
) -> None:
    """Print transcripts line by line: decision, thought, reward and advantage."""
    require_folder(run_dir, "run folder")
    from rich.console import Console

    from ra3_megatron.report.show import show as show_transcripts

    show_transcripts(run_dir, phase, count, document, Console())


def theory(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write.")] = Path("runs/theory"),
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of all random problems.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Small samples: seconds instead of minutes.")] = False,
) -> None:
    """Show the paper's theorems as numbers on small exact problems: regret, pruning, convergence, price."""
    from ra3_megatron.verbs.theory import theory as run_studies

    run_studies(out, seed, quick)
