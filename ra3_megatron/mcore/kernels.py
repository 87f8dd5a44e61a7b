"""Whose kernels a model and its optimizer are made of: read from the objects, not from what was asked for."""

from collections.abc import Iterable

import torch
from megatron.core.optimizer import clip_grads

from ra3_megatron.mcore.fp8 import LINEAR
from ra3_megatron.mcore.trainer import Trainer


def kernels_of(trainer: Trainer) -> dict[str, str]:
    """Whose implementation each part of the train step is: `Transformer Engine`, `apex`, `Megatron-Core` or `torch`."""
    modules = dict(trainer.model.named_modules())
    linear = [module for name, module in modules.items() if name.endswith(LINEAR)]
    norms = [
        module
        for name, module in modules.items()
        if name.endswith("norm") and isinstance(getattr(module, "weight", None), torch.Tensor)
    ]
    fused = [module for module in linear if getattr(module, "fuse_wgrad_accumulation", False)]
    return {
        "linear layers": _owners(linear),
        "norms": _owners(norms) or "in the linear layers",
        "attention": _owners(module for name, module in modules.items() if name.endswith("core_attention")),
        "optimizer": _owners(_optimizers(trainer)),
        "gradient norm and clipping": owner(clip_grads.l2_norm_impl),
        "weight gradients": "added in the products" if fused and len(fused) == len(linear) else "added behind them",
    }


def _optimizers(trainer: Trainer) -> list[torch.optim.Optimizer]:
    parts = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    return [part.optimizer for part in parts if getattr(part, "optimizer", None) is not None]


def _owners(things: Iterable[object]) -> str:
    return ", ".join(sorted({owner(type(thing)) for thing in things}))


def owner(thing: object) -> str:
    """Whose a class or a function is."""
    modules = [each.__module__ for each in getattr(thing, "__mro__", ())] or [getattr(thing, "__module__", "") or ""]
    for start, name in (
        ("transformer_engine", "Transformer Engine"),
        ("amp_C", "apex"),
        ("apex", "apex"),
        ("ra3_megatron", "ra3_megatron"),
        ("megatron", "Megatron-Core"),
    ):
        if any(module.startswith(start) for module in modules):
            return name
    return "torch"
