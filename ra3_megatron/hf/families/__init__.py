"""The families of models that can be imported and exported: every module here but `base` is one, its `FAMILY`."""

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ModelConfig
from ra3_megatron.hf.config_json import ConfigJson
from ra3_megatron.hf.families.base import Family

FAMILIES: tuple[Family, ...] = tuple(
    import_module(f"{__name__}.{name}").FAMILY
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__))
    if name != "base"
)
"""By the name of their module, which is the order in which `family_for` looks for one."""


def family_named(name: str) -> Family:
    """The family with this name. Raises KeyError when there is none."""
    return {family.name: family for family in FAMILIES}[name]


def family_of(config: ConfigJson) -> Family:
    """The family whose architecture a `config.json` names. Raises UserError when it is none of them."""
    named = config.values.get("architectures") or []
    for family in FAMILIES:
        if named == [family.architecture] or (not named and config.values.get("model_type") == family.model_type):
            return family
    if not isinstance(named, list):
        raise UserError(f"{config.path}: architectures={named}: must be a list with one name")
    known = ", ".join(family.architecture for family in FAMILIES)
    found = ", ".join(map(str, named)) if named else f"model_type {config.values.get('model_type')}"
    raise UserError(f"{config.path}: architecture {found} is not supported: supported are {known}")


def family_for(model: ModelConfig) -> Family:
    """The first family that can hold a model of this architecture. Raises UserError when none can."""
    for family in FAMILIES:
        if family.fits(model):
            return family
    raise UserError(
        f"no Hugging Face family has model.qkv_bias={model.qkv_bias}, model.qk_norm={model.qk_norm}, "
        f"model.num_experts={model.num_experts}, "
        f"model.normalize_expert_weights={model.normalize_expert_weights} together: it cannot be exported"
    )


def read_folder(folder: Path) -> tuple[Family, dict[str, Any], int]:
    """Family of a Hugging Face folder, the `model.*` keys that its `config.json` decides, and its longest context.

    Raises UserError for what cannot be represented.
    """
    config = ConfigJson.read(folder)
    family = family_of(config)
    keys = family.model_keys(config)
    longest = config.count("max_position_embeddings")
    config.close()
    return family, keys, longest
