"""The verb that shows and checks settings."""

from __future__ import annotations

from typing import Annotated

import typer

from ra3_megatron.cli.arguments import Config, Overrides, load, split
from ra3_megatron.config.errors import UserError


def config(
    config: Config = None,
    overrides: Overrides = None,
    describe: Annotated[
        bool, typer.Option("--describe", help="List every key with its type, default and meaning instead.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="With --describe: as docs/configuration.md.")] = False,
) -> None:
    """Check a configuration and print it with every default filled in."""
    path, settings = split(config, overrides)
    if markdown and not describe:
        raise UserError("--markdown goes with --describe")
    if describe and (path or settings):
        raise UserError("--describe lists all keys and takes no configuration")
    if describe:
        _describe(markdown)
        return
    resolved = load(path, settings)
    from ra3_megatron.config.load import dump_config

    typer.echo(dump_config(resolved), nl=False)


def doctor(
    config: Config = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what this machine has, what is missing, what that costs and how to get it.

    With a configuration: exit with 1 when it cannot run here, with a line for each reason.
    """
    path, settings = split(config, overrides)
    resolved = load(path, settings) if path or settings else None
    from ra3_megatron.verbs.doctor import doctor as examine

    raise typer.Exit(examine(resolved, as_json))


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
