"""The simplest source of weights: one safetensors file. The process of an engine imports this module too."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ra3_megatron.rollout.vllm.messages import Manifest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FileWeights:
    """Weights in one safetensors file (a `WeightSource`)."""

    path: str

    def manifest(self) -> Manifest:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def tensors(self) -> "Iterator[tuple[str, Tensor]]":
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
