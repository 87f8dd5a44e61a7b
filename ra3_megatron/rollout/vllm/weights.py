"""Weights into a live vLLM model: everything is checked on the way, and a failed update leaves no half-loaded state.

`load` refuses before the model is touched when the announced names and shapes are not exactly the model's. While
tensors stream in, each must be one that was announced, come once, have its shape and be finite (on a GPU the last is
known at the end, as every verdict costs a wait for the device; it fails the update all the same). When anything fails
midway, `recover` closes the loader's bookkeeping, so that the next whole update starts clean; the weights are garbage
until then, and must not be sampled from.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

from ra3_megatron.hf.finite import FiniteStream
from ra3_megatron.rollout.vllm.messages import Manifest, WeightSource


class WeightsRefused(Exception):
    """The weights are not those of the model; the message says which tensor and why."""


def load(source: WeightSource, expected: Manifest, model_runner: Any) -> None:
    """Put the source's tensors into the model of a vLLM model runner.

    Raises WeightsRefused, or what the source raises; then `recover` must follow.
    """
    compare(source.manifest(), expected)
    _unpack_experts(model_runner.get_model())
    tensors = source.tensors()
    try:
        stream = _checked(tensors, expected)
        model_runner.reload_weights(weights_iterator=stream)
        unread = next(stream, None)  # the loader must have come to the end, where completeness is checked
        if unread is not None:
            raise WeightsRefused(f"vLLM's loader stopped before tensor {unread[0]}")
    finally:
        if isinstance(tensors, Generator):
            tensors.close()


def recover(model_runner: Any) -> None:
    """After a failed `load`: forget what it left half-done."""
    finalize_layerwise_reload(model_runner.get_model(), model_runner.model_config)


def _unpack_experts(model: nn.Module) -> None:
    """Have experts on a CPU packed again when their weights are in.

    vLLM packs them only where it builds their kernel, which it does once: after a reload they would stand unpacked
    where packed ones are expected, and give wrong numbers without a word (vLLM 0.32).
    """
    for module in model.modules():
        if isinstance(module, RoutedExperts) and module.quant_method.unquantized_backend is UnquantizedMoeBackend.CPU:
            module.quant_method.moe_kernel = None


def compare(announced: Mapping[str, tuple[int, ...]], expected: Manifest) -> None:
    """Raise WeightsRefused unless names and shapes are the same."""
    for name, shape in expected.items():
        if name not in announced:
            raise WeightsRefused(f"tensor {name} {list(shape)} is missing")
        if tuple(announced[name]) != shape:
            raise WeightsRefused(f"tensor {name} has shape {list(announced[name])}, not {list(shape)}")
    for name in announced:
        if name not in expected:
            raise WeightsRefused(f"tensor {name} {list(announced[name])} is not part of the model")


def _checked(tensors: Iterable[tuple[str, Tensor]], expected: Manifest) -> Iterator[tuple[str, Tensor]]:
    missing = dict(expected)
    finite = FiniteStream()
    for name, tensor in tensors:
        shape = missing.pop(name, None)
        if shape is None:
            raise WeightsRefused(f"tensor {name} " + ("came twice" if name in expected else "was not announced"))
        if tuple(tensor.shape) != shape:
            raise WeightsRefused(f"tensor {name} came with shape {list(tensor.shape)}, not {list(shape)}")
        _refuse(finite.add(name, tensor))
        yield name, tensor
    if missing:
        raise WeightsRefused(f"tensor {next(iter(missing))} never came ({len(missing)} tensors are missing)")
    _refuse(finite.finish())


def _refuse(not_finite: str | None) -> None:
    if not_finite is not None:
        raise WeightsRefused(f"tensor {not_finite} holds values that are not finite")
