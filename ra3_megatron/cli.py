"""The `ra3` command: each verb parses, builds, calls, closes.

Exit codes (2 is final, after 69, 70 and 75 the same command with `--resume` goes on):

    0    done
    1    a defect (with its traceback); what was asked for does not hold (inspect --verify, convert check, study run)
    2    what only the user can mend: a mistake, a full disk, a loss that diverged (one line on stderr for each problem)
    3    nodes that are not fit to train on (preflight; a line for each problem on stdout)
    69   something beside the run failed: a rollout engine died, hung or did not start
    70   hung: the watchdog wrote the stacks of every process and ended them
    75   stopped by SIGUSR1 or SIGTERM after saving
    130  interrupted

Invariant: this module imports neither torch nor a room of the package at the top, so that `--help` and `--version`
answer at once.
"""

from __future__ import annotations

import json
import os
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ra3_megatron import __version__
from ra3_megatron.config.errors import STOPPED, UNAVAILABLE, StoppedBySignal, Unavailable, UserError

if TYPE_CHECKING:
    from ra3_megatron.config.run import RunConfig

_OVERRIDE = re.compile(r"^\s*\w+(\.\w+)*\s*=")
_PACKAGES = (("torch", "torch"), ("megatron-core", "megatron-core"), ("transformer-engine", "transformer-engine"))


class _Verbs(TyperGroup):
    """Turns a user's mistake and an interruption into an exit code, for every verb at one place."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":  # one process of many says it
                for line in str(error).splitlines():
                    typer.echo(f"ra3: {line}", err=True)
            raise typer.Exit(2) from error
        except (StoppedBySignal, Unavailable) as stop:
            if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
                typer.echo(f"ra3: {stop}; the same command with --resume goes on", err=True)
            raise typer.Exit(UNAVAILABLE if isinstance(stop, Unavailable) else STOPPED) from stop
        except KeyboardInterrupt as error:
            typer.echo("ra3: interrupted", err=True)
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=_Verbs,
    name="ra3",
    help="RA3 mid-training on Megatron-Core: EM with latent thoughts between the lines of expert code.",
    epilog="A first run: ra3 train examples/quickstart.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Config = Annotated[str | None, typer.Argument(metavar="CONFIG", help="A YAML file.", show_default=False)]
_RequiredConfig = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file.", show_default=False)]
_Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides such as estep.latent_price=0.03, which win over the file.",
        show_default=False,
    ),
]
_RunFolder = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.", show_default=False)]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo("\n".join(f"{name:20}{version}" for name, version in versions().items()))
        raise typer.Exit()


def versions() -> dict[str, str]:
    """What a report of a problem should hold: the versions of ra3, Python and the packages that compute."""
    found = {"ra3": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for name, distribution in _PACKAGES:
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@app.callback()
def _ra3(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    config: _RequiredConfig,
    overrides: _Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the run folder.")] = False,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run-dir", metavar="DIR", help="Folder of the run; the same as run_dir=DIR.", show_default=False
        ),
    ] = None,
) -> None:
    """Train: warm start, EM iterations, control, evaluation and report, as the configuration says.

    On one machine it starts the processes that the layout asks for; under torchrun or srun it uses those it finds.
    """
    path, settings = _split(config, overrides)
    if path is None:
        raise UserError("train needs a configuration file before the overrides, such as examples/quickstart.yaml")
    if run_dir is not None:
        settings.append(f"run_dir={json.dumps(str(run_dir), ensure_ascii=False)}")
    resolved = _load(path, settings)
    from ra3_megatron.verbs.train import train as run_training

    raise typer.Exit(run_training(resolved, resume=resume))


@app.command()
def preflight(
    config: _Config = None,
    overrides: _Overrides = None,
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
    path, settings = _split(config, overrides)
    resolved = _load(path, settings)  # a mistake in it is one before training, too
    folder = run_dir if run_dir is not None else Path(resolved.run_dir)
    from ra3_megatron.cluster.results import Limits
    from ra3_megatron.verbs.preflight import preflight as check_nodes

    limits = Limits(gpus_per_node, mib, min_bus_gbs, min_free_gib, min_tmp_gib, max_skew, timeout)
    raise typer.Exit(check_nodes(folder, limits, out))


@app.command()
def report(run_dir: _RunFolder) -> None:
    """Rebuild the report of a run from its folder."""
    _require_folder(run_dir, "run folder")
    from ra3_megatron.report.build import build_report

    typer.echo(build_report(run_dir))


@app.command()
def infuse(
    checkpoint: Annotated[
        Path, typer.Option("--checkpoint", metavar="DIR", help="Checkpoint whose model samples the latents.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the infused corpus.")],
    config: _Config = None,
    overrides: _Overrides = None,
) -> None:
    """Sample latents for a corpus and write the infused documents.

    Without CONFIG, the corpus and all else are those of the run that the checkpoint belongs to; overrides such as
    corpus.path=… change them.
    """
    path, settings = _split(config, overrides)
    _require_folder(checkpoint, "checkpoint folder")
    resolved = _load(path, settings) if path is not None else None
    from ra3_megatron.verbs.infuse import infuse as infuse_corpus

    infuse_corpus(checkpoint, out, resolved, settings)


@app.command()
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


@app.command()
def show(
    run_dir: _RunFolder,
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
    _require_folder(run_dir, "run folder")
    from rich.console import Console

    from ra3_megatron.report.show import show as show_transcripts

    show_transcripts(run_dir, phase, count, document, Console())


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a checkpoint.", show_default=False)],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything; exit with 1 if a shard is missing or damaged.")
    ] = False,
    tensors: Annotated[bool, typer.Option("--tensors/--no-tensors", help="List every tensor.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what is in a checkpoint: model, layout it was saved at, step, tensors."""
    from ra3_megatron.verbs.inspect import inspect as inspect_checkpoint

    raise typer.Exit(inspect_checkpoint(checkpoint, verify, tensors, as_json))


@app.command()
def theory(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write.")] = Path("runs/theory"),
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of all random problems.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Small samples: seconds instead of minutes.")] = False,
) -> None:
    """Show the paper's theorems as numbers on small exact problems: regret, pruning, convergence, price."""
    from ra3_megatron.verbs.theory import theory as run_studies

    run_studies(out, seed, quick)


convert = typer.Typer(
    no_args_is_help=True, help="Convert Hugging Face folders to checkpoints and back; compare the two."
)
app.add_typer(convert, name="convert")

_HFFolder = Annotated[Path, typer.Option("--hf", metavar="DIR", help="Hugging Face folder.", show_default=False)]
_Checkpoint = Annotated[
    Path, typer.Option("--checkpoint", metavar="DIR", help="Folder of a checkpoint.", show_default=False)
]
_Out = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder to write; must not exist yet.", show_default=False)
]
_DType = Annotated[
    str | None,
    typer.Option("--dtype", metavar="fp32|bf16", help="Data type to write; that of the weights otherwise."),
]
_Workers = Annotated[int, typer.Option("--workers", metavar="N", help="Processes that convert.")]


@convert.command("hf-to-megatron")
def hf_to_megatron(hf: _HFFolder, out: _Out, dtype: _DType = None, workers: _Workers = 1) -> None:
    """Write the weights of a Hugging Face folder as a checkpoint that loads at any layout.

    A conversion that was interrupted goes on where it was when the same command is run again.
    """
    from ra3_megatron.verbs import convert as verbs

    raise typer.Exit(verbs.hf_to_megatron(hf, out, dtype, workers))


@convert.command("megatron-to-hf")
def megatron_to_hf(
    checkpoint: _Checkpoint,
    out: _Out,
    dtype: _DType = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Most that the tensors of one file take.")
    ] = "5GB",
    hf: Annotated[
        Path | None,
        typer.Option(
            "--hf",
            metavar="DIR",
            help="Hugging Face folder whose config.json, tokenizer and other small files are kept; otherwise those "
            "that the checkpoint was made from, or the tokenizer of its run.",
            show_default=False,
        ),
    ] = None,
    workers: _Workers = 1,
) -> None:
    """Write a checkpoint, saved at any layout, as a Hugging Face folder.

    A conversion that was interrupted goes on where it was when the same command is run again.
    """
    from ra3_megatron.verbs import convert as verbs

    raise typer.Exit(verbs.megatron_to_hf(checkpoint, out, dtype, max_shard_size, hf, workers))


@convert.command("check")
def check_conversion(
    hf: _HFFolder,
    checkpoint: _Checkpoint,
    tensors_only: Annotated[
        bool, typer.Option("--tensors-only", help="Compute no logits, for which each model must fit into memory.")
    ] = False,
) -> None:
    """Compare a Hugging Face folder and a checkpoint: every tensor, and logits of both; exit with 1 if they differ."""
    from ra3_megatron.verbs import convert as verbs

    raise typer.Exit(verbs.check(hf, checkpoint, tensors_only))


study = typer.Typer(no_args_is_help=True, help="Grids of runs that skip what is done, and reports that compare them.")
app.add_typer(study, name="study")

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
    overrides: _Overrides = None,
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
    config: _RequiredConfig,
    folder: _StudyFolder,
    overrides: _Overrides = None,
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

    path, settings = _split(config, overrides)
    if path is None:
        raise UserError("study price needs a configuration file, such as examples/quickstart.yaml")
    raise typer.Exit(run(price_study(path, settings, folder, seeds, prices, log_grid), jobs, dry_run=dry_run))


@study.command("em")
def study_em(
    config: _RequiredConfig,
    folder: _StudyFolder,
    overrides: _Overrides = None,
    seeds: _Seeds = 3,
    jobs: _Jobs = None,
    dry_run: _DryRun = False,
) -> None:
    """RA3 and NTP after every EM iteration, and whether each M-step lowered the cross-entropy of code."""
    from ra3_megatron.study.ready import em_study
    from ra3_megatron.verbs.study import run

    path, settings = _split(config, overrides)
    if path is None:
        raise UserError("study em needs a configuration file, such as examples/quickstart.yaml")
    raise typer.Exit(run(em_study(path, settings, folder, seeds), jobs, dry_run=dry_run))


@study.command("scaling")
def study_scaling(
    config: _RequiredConfig,
    overrides: _Overrides = None,
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

    path, settings = _split(config, overrides)
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


@app.command()
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


@app.command()
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


@app.command("config")
def config_(
    config: _Config = None,
    overrides: _Overrides = None,
    describe: Annotated[
        bool, typer.Option("--describe", help="List every key with its type, default and meaning instead.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="With --describe: as docs/configuration.md.")] = False,
) -> None:
    """Check a configuration and print it with every default filled in."""
    path, settings = _split(config, overrides)
    if markdown and not describe:
        raise UserError("--markdown goes with --describe")
    if describe and (path or settings):
        raise UserError("--describe lists all keys and takes no configuration")
    if describe:
        _describe(markdown)
        return
    resolved = _load(path, settings)
    from ra3_megatron.config.load import dump_config

    typer.echo(dump_config(resolved), nl=False)


def _describe(markdown: bool) -> None:
    from ra3_megatron.config import describe

    if markdown:
        typer.echo(describe.markdown(), nl=False)
        return
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    for row in describe.describe():
        console.print(Text.assemble((row.key, "bold cyan"), " = ", (row.default, "bold"), (f"  ({row.type})", "dim")))
        console.print(Padding(Text(row.doc), (0, 0, 0, 4)))


def _split(config: str | None, overrides: list[str] | None) -> tuple[Path | None, list[str]]:
    """CONFIG, which may be left out or stand behind overrides, and the overrides."""
    arguments = ([config] if config is not None else []) + (overrides or [])
    files = [argument for argument in arguments if not _OVERRIDE.match(argument)]
    if len(files) > 1:
        raise UserError(f"{files[1]}: one configuration file is enough; an override is written section.key=value")
    return (Path(files[0]) if files else None), [argument for argument in arguments if argument not in files]


def _load(path: Path | None, overrides: list[str]) -> RunConfig:
    from ra3_megatron.config.load import load_config

    return load_config(path, overrides)


def _require_folder(path: Path, what: str) -> None:
    if not path.is_dir():
        raise UserError(f"{path}: no such {what}")


def prepare_threads() -> None:
    """Let OpenMP threads that wait spin only briefly. Must run before torch is imported.

    Training steps of a 2M model with two threads on two cores, tokens/s alone and beside a second such process: 7,100
    and 800 to 1,000 with GCC's default, 5,500 and 4,000 without spinning, 7,700 and 3,100 like this.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def main() -> None:
    """Entry point of the console script."""
    prepare_threads()
    app(prog_name="ra3")
