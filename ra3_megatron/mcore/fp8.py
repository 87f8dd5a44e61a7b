"""FP8 in the layers, through Transformer Engine, or not at all.

Megatron-Core trains in bf16 without a word when FP8 is asked for and Transformer Engine is missing, or not in the
layers' specification. So a model is refused when the recipe, the GPU or Transformer Engine is missing
(`config.compatibility` has the rules), when a layer is not Transformer Engine's, and when a layer turns out to have
computed in another precision than it was asked for (`require_computed`). Norms, embedding and output layer stay bf16,
and so does attention unless `model.fp8.attention` asks for it.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ra3_megatron.config.compatibility import hardware_problems
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ModelConfig
from ra3_megatron.config.precision import RECIPES
from ra3_megatron.mcore.hardware import hardware_of

LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""How the modules are called whose products are in FP8."""
ATTENTION = "core_attention.kernel"
"""The module of `Fp8Attention` whose products are."""
_RECIPE_CLASSES = {
    "DelayedScaling": "fp8_delayed",
    "Float8CurrentScaling": "fp8_tensorwise",
    "Float8BlockScaling": "fp8_blockwise",
    "MXFP8BlockScaling": "mxfp8",
}
"""Transformer Engine's classes of recipes (Megatron-Core derives one of its own)."""
_EXACT = "_high_precision_init_val"
"""Where Transformer Engine keeps the value that an FP8 weight was made of, for the optimizer's fp32 weights."""


def fp8_settings(model: ModelConfig) -> dict[str, Any]:
    """Keys of Megatron's TransformerConfig."""
    recipe, asked = RECIPES.get(model.precision), model.fp8
    if recipe is None:
        return {}
    settings: dict[str, Any] = {
        "fp8": recipe.formats,
        "fp8_recipe": recipe.megatron,
        "fp8_param": asked.parameter_gather,
        "fp8_dot_product_attention": asked.attention,
    }
    if recipe.megatron == "delayed":
        settings |= {"fp8_amax_history_len": asked.amax_history, "fp8_amax_compute_algo": "max"}
    if asked.first_layers_bf16 or asked.last_layers_bf16:
        settings |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": asked.first_layers_bf16,
            "num_layers_at_end_in_bf16": asked.last_layers_bf16,
        }
    return settings


def require_fp8(model: ModelConfig, device: torch.device) -> None:
    """Raise UserError, a line a reason, when the precision cannot run on this device."""
    if model.fp8_recipe is None:
        return
    problems = list(hardware_problems(model, hardware_of(device)))
    if problems:
        raise UserError("\n".join(problems))


def require_fp8_layers(model: ModelConfig, chunk: torch.nn.Module) -> None:
    """Raise RuntimeError when a layer of an FP8 model is not Transformer Engine's (it would run in bf16), or does not
    say in what it computes."""
    if model.fp8_recipe is None:
        return
    linear = [module for name, module in chunk.named_modules() if name.endswith(LINEAR)]
    other = [type(module).__name__ for module in linear if not _tells(module)]
    if other or not linear:
        raise RuntimeError(f"layers of an FP8 model that are not Transformer Engine's: {other or 'all'}")


def expected(model: ModelConfig, layer: int) -> str:
    """The precision of a layer's products. layer: from 0, of the whole model."""
    asked = model.fp8
    within = asked.first_layers_bf16 <= layer < model.num_layers - asked.last_layers_bf16
    return model.precision if model.fp8_recipe is None or within else "bf16"


def computed(chunks: Iterable[torch.nn.Module]) -> dict[str, str]:
    """In which precision each product of the layers was computed the last time: `3.linear_qkv` -> `fp8_tensorwise`;
    `3.attention` where attention was asked to be in FP8.

    What Transformer Engine's modules say of their last forward pass; one that never ran, or is not Transformer
    Engine's, is not listed. Layers are numbered from 0 over the whole model.
    """
    return {f"{number}.{kind}": _precision(kind, module) for number, kind, module in _products(chunks)}


def require_computed(model: ModelConfig, found: dict[str, str]) -> None:
    """Raise RuntimeError unless the products of an FP8 model were computed as asked, of those that `computed` lists,
    and the attention of their layers, too, where it was to be in FP8."""
    if model.fp8_recipe is None:
        return
    if model.fp8.attention:  # a kernel that never ran is not in the list: others ran instead
        found = {f"{name.split('.')[0]}.attention": "no FP8 kernel" for name in found} | found
    wrong = [
        f"layer {name} in {precision}"
        for name, precision in found.items()
        if precision != expected(model, int(name.split(".")[0]))
    ]
    if wrong:
        said = ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise RuntimeError(f"model.precision={model.precision}: computed {said}")


def keep_exact(parameter: Tensor, value: Tensor) -> None:
    """Say what an FP8 weight was made of: the optimizer's fp32 weights begin there, not at the rounded weight.

    Transformer Engine keeps the value that the module was initialised with, and Megatron-Core's optimizer takes it;
    weights that are loaded or drawn afterwards would be lost there. Other weights are left alone.
    """
    if hasattr(parameter, _EXACT):
        setattr(parameter, _EXACT, value.detach().to("cpu", copy=True))


class DelayedScales:
    """The scales of `fp8_delayed` as they are now, with the largest values of earlier passes that they are made of.

    A pass over values out of all proportion would leave scales under which, for `model.fp8.amax_history` steps, usual
    values round to 0.
    """

    def __init__(self, chunks: Iterable[torch.nn.Module]) -> None:
        every: Iterator[Any] = (module for chunk in chunks for module in chunk.modules())
        self._kept = [(m, m.get_fp8_meta_tensors()) for m in every if hasattr(m, "get_fp8_meta_tensors")]

    def restore(self) -> None:
        """Put them back as they were; a module that had none then gets those that it begins with."""
        for module, kept in self._kept:
            module.reset_fp8_meta_tensors(kept)


def _products(chunks: Iterable[torch.nn.Module]) -> Iterator[tuple[int, str, Any]]:
    for chunk in chunks:
        for name, layer in chunk.named_modules():
            if not re.search(r"(^|\.)layers\.\d+$", name):
                continue
            for inner, module in layer.named_modules():
                kind = inner.rsplit(".", 1)[-1]
                if inner.endswith(ATTENTION):
                    kind = "attention"
                if kind in (*LINEAR, "attention") and _tells(module) and module.activation_dtype is not None:
                    yield int(layer.layer_number) - 1, kind, module


def _tells(module: Any) -> bool:
    """Whether a module is Transformer Engine's and has the attributes that say in what it computed."""
    return all(hasattr(module, name) for name in ("fp8", "fp8_meta", "activation_dtype"))


def _precision(kind: str, module: Any) -> str:
    recipe = module.fp8_meta["recipe"] if module.fp8 else None
    if recipe is None or (kind == "attention" and not recipe.fp8_dpa):
        return "bf16"
    names = [each.__name__ for each in type(recipe).__mro__]
    return next((_RECIPE_CLASSES[name] for name in names if name in _RECIPE_CLASSES), names[0])
