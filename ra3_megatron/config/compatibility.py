"""Which precision goes with which hardware, Transformer Engine and other keys: the matrix of docs/gpu.md.

Pure functions of the configuration and of what a machine has, so that a combination is refused by name before anything
starts.
"""

import math
from collections.abc import Iterator

from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.config.precision import ATTENTION_BEFORE, RECIPES, Fp8Config, Hardware, Recipe, dotted

ATTENTION_CHANNELS = 128
"""Of a head that is trained with FP8 attention: as many on Hopper, at most on Blackwell (Transformer Engine's
`nvte_get_fused_attn_backend`)."""
ATTENTION_MULTIPLE = 16
"""Of which they are a multiple there."""


def length_multiple(model: ModelConfig, parallel: ParallelConfig) -> int:
    """What the length of a row must be a multiple of, for the layout and for FP8."""
    multiple, recipe = parallel.sequence_multiple * model.row_multiple, RECIPES.get(model.precision)
    if recipe is None or not parallel.sequence:
        return multiple
    return math.lcm(multiple, parallel.context * parallel.tensor * recipe.gather_multiple)


def key_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    """One line for each combination of keys that cannot be, whatever the hardware."""
    name = f"model.precision={model.precision}"
    asked = model.fp8
    recipe = RECIPES.get(model.precision)
    if recipe is None:
        for key, value in asked.model_dump().items():
            if value != type(asked).model_fields[key].default:
                yield f"model.fp8.{key}={_text(value)} is not read with {name}: it goes with {', '.join(RECIPES)}"
        return
    yield from _dimension_problems(model, parallel, recipe)
    if parallel.recompute == "selective" and "layernorm" in parallel.recompute_modules:
        yield (
            f"parallel.recompute_modules=[…, layernorm] does not go with {name}: Transformer Engine's norms are part "
            "of the layers behind them; leave it out"
        )
    for key in ("first_layers_bf16", "last_layers_bf16"):
        count = getattr(asked, key)
        most = model.num_layers // parallel.pipeline
        if count and not recipe.layers_in_bf16:
            yield (
                f"model.fp8.{key}={count} does not go with {name}: its scales are kept over all layers together; use "
                "fp8_tensorwise or fp8_blockwise"
            )
        elif count > most:
            yield f"model.fp8.{key}={count} is more than the {most} layers of a pipeline stage"
    if recipe.layers_in_bf16 and asked.first_layers_bf16 + asked.last_layers_bf16 >= model.num_layers:
        yield (
            f"model.fp8.first_layers_bf16={asked.first_layers_bf16} and last_layers_bf16={asked.last_layers_bf16} "
            f"leave none of model.num_layers={model.num_layers} in FP8: use model.precision=bf16"
        )
    default = Fp8Config.model_fields["amax_history"].default
    if asked.amax_history != default and model.precision != "fp8_delayed":
        yield f"model.fp8.amax_history={asked.amax_history} is not read with {name}: it goes with fp8_delayed"
    if asked.parameter_gather and not recipe.gathered:
        with_it = ", ".join(other for other, each in RECIPES.items() if each.gathered)
        yield (
            f"model.fp8.parameter_gather=true does not go with {name}: Transformer Engine cannot move such weights to "
            f"the buffers that are gathered; leave it out, or use {with_it}"
        )
    elif asked.parameter_gather and not parallel.distributed_optimizer:
        yield "model.fp8.parameter_gather=true needs parallel.distributed_optimizer=true"
    if asked.attention and recipe.attention is None:
        yield f"model.fp8.attention=true does not go with {name}: no hardware has it; {_with_attention()}"
    if asked.attention and parallel.recompute == "selective" and "core_attn" in parallel.recompute_modules:
        yield (
            "model.fp8.attention=true does not go with parallel.recompute_modules=[…, core_attn]: attention would be "
            "computed again outside of FP8, and its gradients with it; leave core_attn out (fused attention keeps no "
            "scores), or use parallel.recompute=full"
        )
    if asked.attention and parallel.context > 1:
        yield f"model.fp8.attention=true does not go with parallel.context={parallel.context}: switch one off"


def hardware_problems(model: ModelConfig, hardware: Hardware) -> Iterator[str]:
    """One line for each reason why this precision cannot run on this hardware."""
    recipe = RECIPES.get(model.precision)
    if recipe is None:
        return
    name = f"model.precision={model.precision}"
    if hardware.capability is None:
        yield f"{name}: needs an NVIDIA GPU, and this process runs on the CPU: use model.precision=bf16"
        return
    has = dotted(hardware.capability)
    if hardware.capability < recipe.capability:
        other = next((other for other, each in RECIPES.items() if each.capability <= hardware.capability), "bf16")
        yield (
            f"{name}: needs a GPU of compute capability {dotted(recipe.capability)}, and this one "
            f"({hardware.device}) has {has}: use model.precision={other}"
        )
    elif recipe.before is not None and hardware.capability >= recipe.before:
        yield (
            f"{name}: Transformer Engine does not have it for compute capability {has} ({hardware.device}): use "
            "model.precision=fp8_tensorwise"
        )
    if hardware.cuda is not None and hardware.cuda < recipe.cuda:
        yield f"{name}: needs CUDA {dotted(recipe.cuda)}, and torch is built with {dotted(hardware.cuda)}"
    if hardware.transformer_engine is None:
        yield (
            f"{name}: needs Transformer Engine, which does not load ({hardware.why_not or 'not installed'}): "
            "docs/gpu.md says how to install it"
        )
    elif hardware.transformer_engine < recipe.transformer_engine:
        yield (
            f"{name}: needs Transformer Engine {dotted(recipe.transformer_engine)}, and this is "
            f"{dotted(hardware.transformer_engine)}"
        )
    if model.fp8.attention and recipe.attention is not None and hardware.capability < recipe.attention:
        yield (
            f"model.fp8.attention=true with {name}: needs compute capability {dotted(recipe.attention)}, and this one "
            f"({hardware.device}) has {has}; {_with_attention()}"
        )
    elif model.fp8.attention and recipe.attention is not None and hardware.capability >= ATTENTION_BEFORE:
        yield (
            f"model.fp8.attention=true: Transformer Engine does not have it for compute capability {has} "
            f"({hardware.device}): leave it out"
        )
    elif model.fp8.attention and recipe.attention is not None:
        channels = model.head_dim or model.hidden_size // model.num_attention_heads
        exactly = hardware.capability < (10, 0)
        some = f"{'' if exactly else 'at most '}{ATTENTION_CHANNELS} channels"
        some += "" if exactly else f" in multiples of {ATTENTION_MULTIPLE}"
        if channels > ATTENTION_CHANNELS or channels % (ATTENTION_CHANNELS if exactly else ATTENTION_MULTIPLE):
            yield (
                f"model.fp8.attention=true: compute capability {has} ({hardware.device}) has it for heads of {some}, "
                f"and these have {channels} (model.head_dim)"
            )


def _dimension_problems(model: ModelConfig, parallel: ParallelConfig, recipe: Recipe) -> Iterator[str]:
    """Dimensions of FP8 products are multiples of 16 or 32 on each process; of what is gathered, of 128 with blocks of
    that size."""
    head = model.head_dim or model.hidden_size // model.num_attention_heads
    gathered = recipe.gather_multiple if parallel.sequence else recipe.multiple
    shares = {
        "model.hidden_size": (model.hidden_size, 1, gathered),
        "model.ffn_hidden_size": (model.ffn_hidden_size, parallel.tensor, recipe.multiple),
        "model.num_attention_heads * head_dim": (model.num_attention_heads * head, parallel.tensor, recipe.multiple),
        "the channels of queries, keys and values": (
            (model.num_attention_heads + 2 * model.num_query_groups) * head,
            parallel.tensor,
            recipe.multiple,
        ),
    }
    for name, (size, parts, multiple) in shares.items():
        if size % (multiple * parts):
            sequence = " and parallel.sequence=true" if multiple != recipe.multiple else ""
            yield (
                f"{name}={size} does not go with model.precision={model.precision} and parallel.tensor="
                f"{parallel.tensor}{sequence}: a process's share must be a multiple of {multiple} (or use "
                "model.precision=bf16)"
            )


def _with_attention() -> str:
    has = [f"{name} from {dotted(each.attention)}" for name, each in RECIPES.items() if each.attention]
    return f"FP8 attention: {', '.join(has)}"


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
