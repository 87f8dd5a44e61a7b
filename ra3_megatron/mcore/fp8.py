"""FP8 in the layers, through Transformer Engine, or not at all.

Megatron-Core trains in bf16 without a word when FP8 is asked for and Transformer Engine is missing, or not in the
layers' specification. So the layers of an FP8 model are Transformer Engine's, and a model is refused when it, the GPU
or the recipe is missing. Attention, norms, embedding and output layer stay bf16.

No GPU has run this yet: what is tested is that it is refused without one, and what Megatron is asked for.
"""

from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ModelConfig

_FORMATS = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3"}
"""Of a recipe: e4m3 forward and e5m2 backward, or e4m3 in both."""
_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0)}
"""The first compute capability that has the recipe's products."""


def fp8_settings(model: ModelConfig) -> dict[str, Any]:
    """Keys of Megatron's TransformerConfig."""
    recipe = model.fp8_recipe
    if recipe is None:
        return {}
    history = {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"} if recipe == "delayed" else {}
    return {"fp8": _FORMATS[recipe], "fp8_recipe": recipe, **history}


def require_fp8(model: ModelConfig, device: torch.device) -> None:
    """Raise UserError when the recipe cannot run on this device."""
    recipe = model.fp8_recipe
    if recipe is None:
        return
    name = f"model.precision={model.precision}"
    if device.type != "cuda":
        raise UserError(f"{name}: needs an NVIDIA GPU, and this process runs on the CPU: use model.precision=bf16")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < _CAPABILITY[recipe]:
        needed = ".".join(map(str, _CAPABILITY[recipe]))
        raise UserError(
            f"{name}: needs a GPU of compute capability {needed} (H100: 9.0), and this one has {major}.{minor}: use "
            "model.precision=bf16"
        )
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"{name}: needs Transformer Engine, which does not load ({error}): docs/clusters.md says how to install it"
        ) from error


def require_fp8_layers(model: ModelConfig, chunk: torch.nn.Module) -> None:
    """Raise RuntimeError when a layer of an FP8 model is not Transformer Engine's: it would run in bf16."""
    if model.fp8_recipe is None:
        return
    linear = [
        module
        for name, module in chunk.named_modules()
        if name.endswith(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"))
    ]
    other = [type(module).__name__ for module in linear if not type(module).__name__.startswith("TE")]
    if other or not linear:
        raise RuntimeError(f"layers of an FP8 model that are not Transformer Engine's: {other or 'all'}")


def transformer_engine_spec(model: ModelConfig) -> ModuleSpec:
    """Transformer Engine's layers for this architecture. `require_fp8` must have passed."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=model.num_experts, moe_grouped_gemm=False, qk_layernorm=model.qk_norm
    )
