"""Verbs of the nodes of a job: preflight and engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ra3_megatron.cli.arguments import Config, Overrides, load, split
from ra3_megatron.config.errors import UserError


def preflight(
    config: Config = None,
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", metavar="DIR", help="Folder of the run; otherwise run_dir.", show_default=False),
    ] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            "--gpus-per-node",
            metavar="N",
            min=0,
            help="That there must be; 0: processes on CPU. Otherwise whatever there is.",
            show_default=False,
        ),
    ] = None,
    mib: Annotated[
        float | None,
        typer.Option("--mib", metavar="M", min=0.01, help="To all-reduce (64; on CPUs 16).", show_default=False),
    ] = None,
    min_bus_gbs: Annotated[
        float | None,
        typer.Option(
            "--min-bus-gbs",
            metavar="R",
            min=0,
            help="GB/s of bus bandwidth below which something is broken (on GPUs 10 between nodes, 100 inside one; on "
            "CPUs none).",
            show_default=False,
        ),
    ] = None,
    min_free_gib: Annotated[
        float, typer.Option("--min-free-gib", metavar="G", min=0, help="Free for the run folder.")
    ] = 10.0,
    min_tmp_gib: Annotated[
        float, typer.Option("--min-tmp-gib", metavar="G", min=0, help="Free for temporary files.")
    ] = 1.0,
    max_skew: Annotated[float, typer.Option("--max-skew", metavar="S", min=0, help="Seconds between clocks.")] = 5.0,
    arithmetic: Annotated[
        float,
        typer.Option(
            "--arithmetic",
            metavar="S",
            min=0,
            help="Seconds of questions to the processors, and to each GPU, whose answers are known; 0: none.",
        ),
    ] = 1.0,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout", metavar="S", min=4, help="Seconds for all; processes meet in three quarters of them."
        ),
    ] = 60.0,
    out: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all results.", show_default=False)
    ] = None,
) -> None:
    """Check the nodes of a job before training, and name those that are not fit; exit with 3 if there are any.

    Run it with srun or torchrun in the processes that the training will have: srun ra3 preflight run.yaml
    """
    if arithmetic > timeout / 4:  # of the processors, then of the GPU, and then other checks come
        raise UserError(f"--arithmetic {arithmetic:g}: at most a quarter of --timeout {timeout:g}")
    path, settings = split(config, overrides)
    resolved = load(path, settings)  # a mistake in it is one before training, too
    folder = run_dir if run_dir is not None else Path(resolved.run_dir)
    from ra3_megatron.cluster.results import Limits
    from ra3_megatron.verbs.preflight import preflight as check_nodes

    executes = resolved.method == "rlvr" or bool(resolved.benchmarks.suites)
    sandbox = executes and resolved.sandbox == "bubblewrap"
    limits = Limits(gpus_per_node, mib, min_bus_gbs, min_free_gib, min_tmp_gib, max_skew, timeout, arithmetic, sandbox)
    raise typer.Exit(check_nodes(folder, limits, out))


def engines(
    run_dir: Annotated[
        Path, typer.Option("--run-dir", metavar="DIR", help="Folder of the run, which all nodes share.")
    ],
    engines_per_node: Annotated[
        int | None,
        typer.Option(
            "--engines-per-node",
            metavar="N",
            min=1,
            help="Engines that this node takes at most; otherwise as many as its GPUs allow, without GPUs one.",
            show_default=False,
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST",
            help="At which the trainer reaches this node; otherwise that from which this node reaches the trainer.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Host vLLM engines on this node for a run with rollout.placement=nodes, until it is finished.

    It may start before the run does, and serves one attempt of the run after another.
    """
    from ra3_megatron.verbs.engines import host_engines

    host_engines(run_dir, engines_per_node, address, typer.echo)
