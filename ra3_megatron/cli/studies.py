"""Verbs of studies: grids of runs, sweeps, scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ra3_megatron.cli.arguments import Overrides, RequiredConfig, split
from ra3_megatron.config.errors import UserError

study = typer.Typer(no_args_is_help=True, help="Grids of runs that skip what is done, and reports that compare them.")

_Jobs = Annotated[
    int | None,
    typer.Option("--jobs", metavar="N", min=1, help="Cells at once; as many as cores allow otherwise."),
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="List the cells and where they stand, and run nothing.")]
_StudyFolder = Annotated[Path, typer.Option("--folder", metavar="DIR", help="Folder of the study.")]
_Seeds = Annotated[int, typer.Option("--seeds", metavar="N", min=1, help="Seeds 1 to N.")]


@study.command("run")
def study_run(
    file: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="A study.", show_default=False)],
    overrides: Overrides = None,
    jobs: _Jobs = None,
    cell: Annotated[
        str | None, typer.Option("--cell", metavar="NAME|INDEX", help="Only this cell.", show_default=False)
    ] = None,
    dry_run: _DryRun = False,
    to_slurm: Annotated[
        bool, typer.Option("--slurm", help="Write job arrays for Slurm, and submit them if that is possible.")
    ] = False,
) -> None:
    """Run the cells of a study that are not done, then write its report; exit with 1 if some failed.

    Overrides change keys of the study (folder=…, seeds=[1,2]) or settings of all its cells (estep.steps=5).
    """
    from ra3_megatron.verbs.study import run_file

    raise typer.Exit(run_file(file, overrides or [], jobs, cell, dry_run, to_slurm))


@study.command("report")
def study_report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a study.", show_default=False)],
) -> None:
    """Rebuild table, figures and report of a study from the cells that are done."""
    from ra3_megatron.verbs.study import report as rebuild

    typer.echo(rebuild(folder))


@study.command("price")
def study_price(
    config: RequiredConfig,
    folder: _StudyFolder,
    overrides: Overrides = None,
    seeds: _Seeds = 3,
    prices: Annotated[str, typer.Option("--prices", metavar="LIST", help="Prices c.")] = "0,0.01,0.03,0.05,0.2,inf",
    log_grid: Annotated[
        tuple[float, float, int] | None,
        typer.Option("--log-grid", metavar="LOW HIGH N", help="N further prices in equal ratios.", show_default=False),
    ] = None,
    jobs: _Jobs = None,
    dry_run: _DryRun = False,
) -> None:
    """Sweep the price of a thought: thinking rate against held-out accuracy and cross-entropy of code."""
    from ra3_megatron.study.ready import price_study
    from ra3_megatron.verbs.study import run

    path, settings = split(config, overrides)
    if path is None:
        raise UserError("study price needs a configuration file, such as examples/quickstart.yaml")
    raise typer.Exit(run(price_study(path, settings, folder, seeds, prices, log_grid), jobs, dry_run=dry_run))


@study.command("em")
def study_em(
    config: RequiredConfig,
    folder: _StudyFolder,
    overrides: Overrides = None,
    seeds: _Seeds = 3,
    jobs: _Jobs = None,
    dry_run: _DryRun = False,
) -> None:
    """RA3 and NTP after every EM iteration, and whether each M-step lowered the cross-entropy of code."""
    from ra3_megatron.study.ready import em_study
    from ra3_megatron.verbs.study import run

    path, settings = split(config, overrides)
    if path is None:
        raise UserError("study em needs a configuration file, such as examples/quickstart.yaml")
    raise typer.Exit(run(em_study(path, settings, folder, seeds), jobs, dry_run=dry_run))


@study.command("rlvr-transfer")
def study_rlvr_transfer(
    config: RequiredConfig,
    folder: _StudyFolder,
    start: Annotated[
        list[str],
        typer.Option(
            "--start",
            metavar="NAME=CHECKPOINT",
            help="A start of RLVR; give it several times. {seed} in a path is the seed.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    seeds: _Seeds = 5,
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="NAME", help="Compared with; otherwise ntp.", show_default=False),
    ] = None,
    jobs: _Jobs = None,
    dry_run: _DryRun = False,
) -> None:
    """The same RLVR from several checkpoints: how fast it learns from each, and how far it comes."""
    from ra3_megatron.study.ready import transfer_study
    from ra3_megatron.verbs.study import run

    path, settings = split(config, overrides)
    if path is None:
        raise UserError("study rlvr-transfer needs a configuration file, such as examples/rlvr-hopprog.yaml")
    study = transfer_study(path, settings, folder, seeds, start, reference)
    raise typer.Exit(run(study, jobs, dry_run=dry_run))


@study.command("scaling")
def study_scaling(
    config: RequiredConfig,
    overrides: Overrides = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", metavar="DIR", help="Folder of the study.", show_default=False)
    ] = None,
    processes: Annotated[
        str | None, typer.Option("--processes", metavar="LIST", help="Such as 1,2,4.", show_default=False)
    ] = None,
    layouts: Annotated[
        str | None,
        typer.Option(
            "--layouts",
            metavar="LAYOUT;…",
            help="Keys of a layout and the size that grows with the processes: 'data;tensor;tensor=2,pipeline'.",
            show_default=False,
        ),
    ] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option(
            "--sizes",
            metavar="NAME=KEY:VALUE,…",
            help="A model by name, such as small=num_layers:2,hidden_size:64; may be given several times.",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[
        str | None, typer.Option("--mode", metavar="strong|weak|both", help="Both otherwise.", show_default=False)
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", metavar="B", min=1, help="Rows a step.", show_default=False)
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", min=1, help="Steps measured; 12.", show_default=False)
    ] = None,
    warmup: Annotated[
        int | None, typer.Option("--warmup", metavar="N", min=0, help="Steps before them; 3.", show_default=False)
    ] = None,
    repeats: Annotated[
        int | None, typer.Option("--repeats", metavar="N", min=1, help="Cells of a point; 3.", show_default=False)
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option("--rows", metavar="full|corpus", help="Generated rows or packed documents.", show_default=False),
    ] = None,
    estep: Annotated[
        int | None, typer.Option("--estep", metavar="N", min=0, help="E-step updates as well.", show_default=False)
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="NAME|FILE|measure",
            help="What the prediction is for; what is measured otherwise.",
            show_default=False,
        ),
    ] = None,
    processes_per_node: Annotated[
        int | None, typer.Option("--processes-per-node", metavar="N", min=1, help="Of Slurm.", show_default=False)
    ] = None,
    cell: Annotated[
        str | None, typer.Option("--cell", metavar="NAME|INDEX", help="Only this cell.", show_default=False)
    ] = None,
    to_slurm: Annotated[
        bool, typer.Option("--slurm", help="Write job arrays for Slurm, and submit them if that is possible.")
    ] = False,
    dry_run: _DryRun = False,
) -> None:
    """Measure strong and weak scaling over layouts, numbers of processes and sizes, beside the planner's prediction.

    CONFIG is a configuration of ra3 train, or the YAML file of a scaling study, whose keys are those of the options.
    """
    from ra3_megatron.study.scaling.options import scaling_study
    from ra3_megatron.verbs.scaling import scaling

    path, settings = split(config, overrides)
    if path is None:
        raise UserError("study scaling needs a configuration file, such as examples/quickstart.yaml")
    given = {
        "folder": None if folder is None else str(folder),
        "processes": processes,
        "layouts": layouts,
        "sizes": sizes,
        "mode": mode,
        "batch": batch,
        "steps": steps,
        "warmup": warmup,
        "repeats": repeats,
        "rows": rows,
        "estep": estep,
        "gpu": gpu,
        "processes_per_node": processes_per_node,
    }
    raise typer.Exit(scaling(scaling_study(path, given, settings), cell, dry_run, to_slurm))
