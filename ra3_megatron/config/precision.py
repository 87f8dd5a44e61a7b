"""The precisions by name: what each FP8 recipe of Transformer Engine is, and what hardware and versions have it.

`compatibility` has the rules. Sources: Transformer Engine 2.9 to 2.11 (`quantization.py`,
`attention/dot_product_attention/utils.py`) and Megatron-Core 0.16.1 (`fp8_utils.py`, `transformer_config.py`).
"""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from ra3_megatron.config.base import Section

Precision = Literal["fp32", "bf16", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8"]
Capability = tuple[int, int]
"""Of a GPU: (9, 0) is Hopper's."""
ATTENTION_BEFORE: Capability = (12, 0)
"""The first compute capability that has no FP8 attention any more, whatever the recipe."""


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
    """Compute attention in FP8, too (training and scoring; not under `parallel.context`, nor where it is computed again
    by itself, `core_attn` of `parallel.recompute_modules`)."""

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
    gather_multiple: int
    """The same of what is gathered in FP8 under `parallel.sequence`: a process's tokens of a row, and `hidden_size`."""
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
    gathered: bool
    """Whether weights can be kept and gathered in it: in the buffers that Megatron-Core gathers, which Transformer
    Engine must be able to move them to (`replace_raw_data`)."""


RECIPES: dict[str, Recipe] = {
    "fp8_delayed": Recipe(
        "delayed", "hybrid", "a tensor, from earlier steps", 16, 16, (8, 9), None, (12, 1), (1, 0), False, (9, 0), True
    ),
    "fp8_tensorwise": Recipe(
        "tensorwise", "hybrid", "a tensor, its own", 16, 16, (8, 9), None, (12, 1), (2, 2), True, (10, 0), True
    ),
    "fp8_blockwise": Recipe(
        "blockwise", "e4m3", "1 x 128 or 128 x 128 values", 16, 128, (9, 0), None, (12, 9), (2, 3), True, None, True
    ),
    "mxfp8": Recipe(
        "mxfp8", "e4m3", "32 values, a power of two", 32, 32, (10, 0), (12, 0), (12, 8), (2, 1), True, None, False
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
            f"from {dotted(each.capability)}" + (f", below {dotted(each.before)}" if each.before else ""),
            f"from {dotted(each.cuda)}",
            f"from {dotted(each.transformer_engine)}",
            "yes" if each.layers_in_bf16 else "no",
            f"from {dotted(each.attention)}, below {dotted(ATTENTION_BEFORE)}" if each.attention else "no",
            "yes" if each.gathered else "no",
            f"multiples of {each.multiple}",
        )
        for name, each in RECIPES.items()
    ]
    return [head, *rows]


def dotted(version: tuple[int, int]) -> str:
    """As text."""
    return ".".join(map(str, version))
