"""Ready-made studies on any configuration: the price of a thought, and EM iteration by iteration."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import load_config
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.yaml_io import scalar_text
from ra3_megatron.study.spec import ITERATION, StudyConfig, make_study

PRICE = "estep.latent_price"


def price_study(
    config: Path,
    overrides: Sequence[str],
    folder: Path,
    seeds: int,
    prices: str,
    log_grid: tuple[float, float, int] | None,
) -> StudyConfig:
    """RA3 at each price c; with c = inf among them, which is NTP, as the reference.

    prices: comma-separated. log_grid: lowest, highest and number of further prices in equal ratios.
    Raises UserError for a price that is none.
    """
    values = sorted({*_prices(prices), *(_log_grid(*log_grid) if log_grid is not None else ())})
    study = {
        "name": f"price of a thought ({config.stem})",
        "arms": {"ra3": {"grid": {PRICE: values}}},
        "reference": "ra3,latent_price=inf" if math.inf in values else None,
        "plots": [
            {"x": PRICE, "y": ["code_ce", "code_accuracy", "think_rate"], "optimum": True},
            {"x": "think_rate", "y": ["code_accuracy", "code_ce"], "optimum": True},
        ],
    }
    return _ready(study, config, overrides, folder, seeds)


def em_study(config: Path, overrides: Sequence[str], folder: Path, seeds: int) -> StudyConfig:
    """RA3 and NTP after every EM iteration."""
    study = {
        "name": f"EM iteration by iteration ({config.stem})",
        "arms": {"ra3": {}, "ntp": {"method": "ntp"}},
        "reference": "ntp",
        "plots": [{"x": ITERATION, "y": ["code_ce", "code_accuracy", "think_rate", "elbo"]}],
    }
    return _ready(study, config, overrides, folder, seeds)


def transfer_study(
    config: Path, overrides: Sequence[str], folder: Path, seeds: int, starts: Sequence[str], reference: str | None
) -> StudyConfig:
    """The same RLVR from each start, for each seed.

    starts: `NAME=CHECKPOINT`; `{seed}` in a checkpoint is the seed of the cell. reference: name of the start that the
    others are compared with (`ntp`, if there is one). Raises UserError for a start that is none.
    """
    named: dict[str, str] = {}
    for text in starts:
        name, equals, checkpoint = text.partition("=")
        if not equals or not name or not checkpoint:
            raise UserError(f"--start {text}: must be a name and a checkpoint, as in ra3=RUN/checkpoints/mstep-2/final")
        if name in named:
            raise UserError(f"--start {text}: {name} is named twice")
        named[name] = checkpoint
    if not named:
        raise UserError("study rlvr-transfer needs --start NAME=CHECKPOINT, once for each start")
    if reference is None:
        reference = "ntp" if "ntp" in named else next(iter(named))
    if reference not in named:
        raise UserError(f"--reference {reference}: must be one of {', '.join(named)}")
    values = {
        "name": f"RLVR from {len(named)} starts ({config.stem})",
        "verb": "rlvr",
        "folder": str(folder),
        "config": str(config),
        "seeds": list(range(1, seeds + 1)),
        "arms": {name: {"rlvr.checkpoint": checkpoint} for name, checkpoint in named.items()},
        "reference": reference,
    }
    return make_study(values, "study rlvr-transfer", overrides)


def _ready(values: dict[str, Any], config: Path, overrides: Sequence[str], folder: Path, seeds: int) -> StudyConfig:
    shared = load_config(config, overrides)  # says what is wrong before anything else does
    common = {
        "folder": str(folder),
        "config": str(config),
        "settings": {"em.control": False},
        "seeds": list(range(1, seeds + 1)),
        **({"base": {}} if _warm_starts(shared) else {}),
    }
    return make_study({**values, **common}, f"study {values['name']}", overrides)


def _warm_starts(config: RunConfig) -> bool:
    """Whether runs train a start that the cells of a seed can share."""
    return config.model.hf is None and config.warm_start.steps > 0


def _prices(text: str) -> list[float]:
    found = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not value >= 0:
            raise UserError(f"--prices {text}: {part.strip() or 'nothing'} is no price: write 0,0.05,inf, say")
        found.append(value)
    return found


def _log_grid(low: float, high: float, number: int) -> list[float]:
    if not 0 < low < high < math.inf or number < 2:
        raise UserError(
            f"--log-grid {scalar_text(low)} {scalar_text(high)} {number}: needs 0 < LOW < HIGH and at least 2 prices"
        )
    return [float(f"{low * (high / low) ** (k / (number - 1)):.3g}") for k in range(number)]
