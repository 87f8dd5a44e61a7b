"""The arguments that several verbs have, and what is done with them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ra3_megatron.config.errors import UserError

if TYPE_CHECKING:
    from ra3_megatron.config.run import RunConfig

_OVERRIDE = re.compile(r"^\s*\w+(\.\w+)*\s*=")

Config = Annotated[str | None, typer.Argument(metavar="CONFIG", help="A YAML file.", show_default=False)]
RequiredConfig = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides such as estep.latent_price=0.03, which win over the file.",
        show_default=False,
    ),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.", show_default=False)]


def split(config: str | None, overrides: list[str] | None) -> tuple[Path | None, list[str]]:
    """CONFIG, which may be left out or stand behind overrides, and the overrides."""
    arguments = ([config] if config is not None else []) + (overrides or [])
    files = [argument for argument in arguments if not _OVERRIDE.match(argument)]
    if len(files) > 1:
        raise UserError(f"{files[1]}: one configuration file is enough; an override is written section.key=value")
    return (Path(files[0]) if files else None), [argument for argument in arguments if argument not in files]


def load(path: Path | None, overrides: list[str]) -> RunConfig:
    from ra3_megatron.config.load import load_config

    return load_config(path, overrides)


def require_folder(path: Path, what: str) -> None:
    if not path.is_dir():
        raise UserError(f"{path}: no such {what}")
