"""Which precision goes with which hardware, Transformer Engine and other keys: the matrix of docs/gpu.md.

Pure functions of the configuration and of what a machine has, so that a combination is refused by name before anything
starts. Sources: Transformer Engine 2.9 to 2.11 (`quantization.py`, `attention/dot_product_attention/utils.py`) and
Megatron-Core 0.16.1 (`fp8_utils.py`, `transformer_config.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ra3_megatron.config.base import Section

if TYPE_CHECKING:
    from ra3_megatron.config.model import ModelConfig, ParallelConfig

Precision = Literal["fp32", "bf16", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8"]
Capability = tuple[int, int]
"""Of a GPU: (9, 0) is Hopper's."""


class Fp8Config(Section):
    """What stays out of FP8 and what more is in it. Read with an FP8 recipe as `model.precision` alone."""

    first_layers_bf16: int = Field(default=0, ge=0)
    """So many layers at the beginning compute in bf16."""

    last_layers_bf16: int = Field(default=0, ge=0)
    """So many layers at the end compute in bf16."""

    parameter_gather: bool = False
    """Keep the weights of the layers in FP8, and gather them so under `parallel.distributed_optimizer`: half the bytes.
    The optimizer's own weights stay fp32."""

    attention: bool = False
    """Compute attention in FP8, too (training and scoring; not under `parallel.context`)."""

    amax_history: int = Field(default=1024, ge=1)
    """`fp8_delayed`: steps whose largest values the scales are taken from."""


@dataclass(frozen=True)
class Recipe:
    """One FP8 recipe of Transformer Engine."""

    megatron: str
    """Megatron's name of it."""
    formats: Literal["hybrid", "e4m3"]
    """e4m3 forward and e5m2 backward, or e4m3 in both."""
    scales: str
    """What one scale is for."""
    multiple: int
    """What the dimensions of products are multiples of."""
    capability: Capability
    """The first compute capability that has it."""
    before: Capability | None
    """The first capability that does not have it any more."""
    cuda: tuple[int, int]
    transformer_engine: tuple[int, int]
    """First versions that have it."""
    layers_in_bf16: bool
    """Whether first and last layers may be left in bf16."""
    attention: Capability | None
    """The first compute capability that has its attention; None: none has."""
    gather_overlapped: bool
    """Whether FP8 weights may be gathered while the forward pass goes on."""


RECIPES: dict[str, Recipe] = {
    "fp8_delayed": Recipe(
        "delayed", "hybrid", "a tensor, from earlier steps", 16, (8, 9), None, (12, 1), (1, 0), False, (9, 0), True
    ),
    "fp8_tensorwise": Recipe(
        "tensorwise", "hybrid", "a tensor, its own", 16, (8, 9), None, (12, 1), (2, 2), True, (10, 0), True
    ),
    "fp8_blockwise": Recipe(
        "blockwise", "e4m3", "1 x 128 or 128 x 128 values", 16, (9, 0), None, (12, 9), (2, 3), True, None, True
    ),
    "mxfp8": Recipe(
        "mxfp8", "e4m3", "32 values, a power of two", 32, (10, 0), (12, 0), (12, 8), (2, 1), True, None, False
    ),
}


@dataclass(frozen=True)
class Hardware:
    """What a process has to compute with."""

    device: str
    """Its name, for people."""
    capability: Capability | None
    """None: a CPU."""
    cuda: tuple[int, int] | None = None
    """Version of CUDA that torch is built with."""
    transformer_engine: tuple[int, int] | None = None
    """None: it does not load."""
    why_not: str = ""
    """Why Transformer Engine does not load."""


def key_problems(model: "ModelConfig", parallel: "ParallelConfig") -> Iterator[str]:
    """One line for each combination of keys that cannot be, whatever the hardware."""
    name = f"model.precision={model.precision}"
    asked = model.fp8
    recipe = RECIPES.get(model.precision)
    if recipe is None:
        for key, value in asked.model_dump().items():
            if value != type(asked).model_fields[key].default:
                yield f"model.fp8.{key}={_text(value)} is not read with {name}: it goes with {', '.join(RECIPES)}"
        return
    yield from _dimension_problems(model, parallel, recipe.multiple)
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
    if asked.parameter_gather and not parallel.distributed_optimizer:
        yield "model.fp8.parameter_gather=true needs parallel.distributed_optimizer=true"
    if asked.parameter_gather and parallel.overlap_param_gather and not recipe.gather_overlapped:
        yield (
            f"parallel.overlap_param_gather=true does not go with {name} and model.fp8.parameter_gather=true "
            "(gradient norms become NaN): switch one off"
        )
    if asked.attention and recipe.attention is None:
        yield f"model.fp8.attention=true does not go with {name}: no hardware has it; {_with_attention()}"
    if asked.attention and parallel.context > 1:
        yield f"model.fp8.attention=true does not go with parallel.context={parallel.context}: switch one off"


def hardware_problems(model: "ModelConfig", hardware: Hardware) -> Iterator[str]:
    """One line for each reason why this precision cannot run on this hardware."""
    recipe = RECIPES.get(model.precision)
    if recipe is None:
        return
    name = f"model.precision={model.precision}"
    if hardware.capability is None:
        yield f"{name}: needs an NVIDIA GPU, and this process runs on the CPU: use model.precision=bf16"
        return
    has = _dotted(hardware.capability)
    if hardware.capability < recipe.capability:
        other = next((other for other, each in RECIPES.items() if each.capability <= hardware.capability), "bf16")
        yield (
            f"{name}: needs a GPU of compute capability {_dotted(recipe.capability)}, and this one "
            f"({hardware.device}) has {has}: use model.precision={other}"
        )
    elif recipe.before is not None and hardware.capability >= recipe.before:
        yield (
            f"{name}: Transformer Engine does not have it for compute capability {has} ({hardware.device}): use "
            "model.precision=fp8_tensorwise"
        )
    if hardware.cuda is not None and hardware.cuda < recipe.cuda:
        yield f"{name}: needs CUDA {_dotted(recipe.cuda)}, and torch is built with {_dotted(hardware.cuda)}"
    if hardware.transformer_engine is None:
        yield (
            f"{name}: needs Transformer Engine, which does not load ({hardware.why_not or 'not installed'}): "
            "docs/gpu.md says how to install it"
        )
    elif hardware.transformer_engine < recipe.transformer_engine:
        yield (
            f"{name}: needs Transformer Engine {_dotted(recipe.transformer_engine)}, and this is "
            f"{_dotted(hardware.transformer_engine)}"
        )
    if model.fp8.attention and recipe.attention is not None and hardware.capability < recipe.attention:
        yield (
            f"model.fp8.attention=true with {name}: needs compute capability {_dotted(recipe.attention)}, and this one "
            f"({hardware.device}) has {has}; {_with_attention()}"
        )


def matrix() -> list[tuple[str, ...]]:
    """The recipes as a table, its head first."""
    head = (
        "`model.precision`",
        "one scale for",
        "formats",
        "compute capability",
        "CUDA",
        "Transformer Engine",
        "first, last layers in bf16",
        "FP8 attention",
        "weights gathered in FP8",
        "products' dimensions",
    )
    rows = [
        (
            f"`{name}`",
            each.scales,
            "e4m3, gradients e5m2" if each.formats == "hybrid" else "e4m3",
            f"from {_dotted(each.capability)}" + (f", below {_dotted(each.before)}" if each.before else ""),
            f"from {_dotted(each.cuda)}",
            f"from {_dotted(each.transformer_engine)}",
            "yes" if each.layers_in_bf16 else "no",
            f"from {_dotted(each.attention)}" if each.attention else "no",
            "yes" if each.gather_overlapped else "not overlapped",
            f"multiples of {each.multiple}",
        )
        for name, each in RECIPES.items()
    ]
    return [head, *rows]


def _dimension_problems(model: "ModelConfig", parallel: "ParallelConfig", multiple: int) -> Iterator[str]:
    """Dimensions of FP8 products are multiples of 16 or 32 on each process."""
    head = model.head_dim or model.hidden_size // model.num_attention_heads
    shares = {
        "model.hidden_size": (model.hidden_size, 1),
        "model.ffn_hidden_size": (model.ffn_hidden_size, parallel.tensor),
        "model.num_attention_heads * head_dim": (model.num_attention_heads * head, parallel.tensor),
        "the channels of queries, keys and values": (
            (model.num_attention_heads + 2 * model.num_query_groups) * head,
            parallel.tensor,
        ),
    }
    for name, (size, parts) in shares.items():
        if size % (multiple * parts):
            yield (
                f"{name}={size} does not go with model.precision={model.precision} and parallel.tensor="
                f"{parallel.tensor}: a process's share must be a multiple of {multiple} (or use model.precision=bf16)"
            )


def _with_attention() -> str:
    has = [f"{name} from {_dotted(each.attention)}" for name, each in RECIPES.items() if each.attention]
    return f"FP8 attention: {', '.join(has)}"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
