"""The `ra3` command: each verb parses, builds, calls, closes.

Exit codes (2 is final, after 69, 70 and 75 the same command with `--resume` goes on):

    0    done
    1    a defect (with its traceback); what was asked for does not hold (inspect --verify, convert check, study run,
         doctor)
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

import os
import sys
from importlib import metadata
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from ra3_megatron import __version__
from ra3_megatron.cli import checkpoints, evaluation, mistakes, nodes, planning, runs, settings, studies
from ra3_megatron.config.errors import STOPPED, UNAVAILABLE, StoppedBySignal, Unavailable, UserError

_PACKAGES = (("torch", "torch"), ("megatron-core", "megatron-core"), ("transformer-engine", "transformer-engine"))


class _Verbs(TyperGroup):
    """Turns a user's mistake and an interruption into an exit code, for every verb at one place."""

    words: tuple[str, ...] = ()
    """Of the command line, without `ra3`."""

    def make_context(self, info_name: str | None, args: list[str], *others: Any, **extra: Any) -> Any:
        self.words = tuple(args)
        try:
            return super().make_context(info_name, args, *others, **extra)
        except mistakes.UsageError as error:
            self._refuse(error)

    def _refuse(self, error: Any) -> NoReturn:
        if mistakes.shows_help(error):
            raise error
        _say([mistakes.one_line(error, self.words)])
        raise typer.Exit(2) from error

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except mistakes.UsageError as error:
            self._refuse(error)
        except UserError as error:
            _say(str(error).splitlines())
            raise typer.Exit(2) from error
        except Unavailable as failure:
            _say([f"{failure}; the same command with --resume goes on"])
            raise typer.Exit(UNAVAILABLE) from failure
        except StoppedBySignal as stop:
            if _rank() == "0":  # all have stopped
                typer.echo(f"ra3: {stop}; the same command with --resume goes on", err=True)
            raise typer.Exit(STOPPED) from stop
        except (KeyboardInterrupt, Exception) as error:
            if not _interrupted(error):
                raise
            typer.echo("ra3: interrupted", err=True)
            raise typer.Exit(130) from error


def _say(lines: list[str]) -> None:
    """One process of each node says what is wrong: it may be so on one node alone, a folder that is not there, say."""
    rank = _rank()
    if rank == "0" or os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID")) == "0":
        where = "" if rank == "0" else f"rank {rank}: "
        for line in lines:
            typer.echo(f"ra3: {where}{line}", err=True)


def _rank() -> str:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))


def _interrupted(error: BaseException | None) -> bool:
    """Whether this is Ctrl-C, or what a library made of it on the way (torch.save closes its file, and fails)."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


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


app.command()(runs.train)
app.command()(runs.rlvr)
app.command()(nodes.preflight)
app.command()(runs.report)
app.command()(runs.infuse)
app.command()(nodes.engines)
app.command()(runs.show)
app.command()(checkpoints.inspect)
app.command()(runs.theory)
app.add_typer(checkpoints.convert, name="convert")
app.add_typer(evaluation.evaluation, name="eval")
app.add_typer(studies.study, name="study")
app.command()(planning.plan)
app.command()(planning.launch)
app.command("config")(settings.config)
app.command()(settings.doctor)


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
