"""Tensors that lie in host memory but while they are needed: the optimizer's state, and frozen models.

A GPU holds the optimizer's fp32 weights and moments (12 bytes a parameter) and, in an E-step, the frozen scorer only in
turn with activations. What is copied is pinned host memory, so a transfer runs at the speed of the bus. Values are
never changed: a run with and one without are the same to the last bit.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.mcore.hardware import has_transformer_engine

_PARKED = "_ra3_parked"


class Parking:
    """The tensors that `tensors` yields lie in host memory, outside of `resident`.

    While parked, a tensor holds no data (its shape is [0]). Tensors may be others at every call. timed: what transfers
    happen within.
    """

    def __init__(
        self,
        tensors: Callable[[], Iterable[Tensor]],
        device: torch.device,
        timed: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._tensors, self._device, self._timed = tensors, device, timed
        self._host: dict[int, tuple[Tensor, Tensor]] = {}
        """id -> a tensor, and its memory on the host (which keeps both alive)."""
        self._depth = 0
        self._here = True

    @property
    def nbytes(self) -> int:
        """Bytes that lie in host memory."""
        return 0 if self._here else sum(host.nbytes for _, host in self._host.values())

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Within it the tensors are on the device; behind the outermost such block they are not."""
        self._depth += 1
        try:
            with self._timed():
                self._fetch()
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                with self._timed():
                    self._park()

    def _fetch(self) -> None:
        if self._here:
            return
        for tensor, host in self._host.values():
            tensor.data = host.to(self._device, non_blocking=True, copy=True)
        self._wait()
        self._here = True

    def _park(self) -> None:
        tensors = {id(tensor): tensor for tensor in self._tensors()}
        kept = {}
        for key, tensor in tensors.items():
            known = self._host.get(key)
            fits = known is not None and known[0] is tensor and known[1].shape == tensor.shape
            host = known[1] if known is not None and fits else self._memory(tensor)
            host.copy_(tensor.detach(), non_blocking=True)
            kept[key] = (tensor, host)
        self._wait()  # before the device's memory is given back
        for tensor in tensors.values():
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=self._device)
        self._host, self._here = kept, False

    def _memory(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._device.type == "cuda")

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def optimizer_tensors(optimizer: Any, model: torch.nn.Module) -> Iterator[Tensor]:
    """Moments and fp32 weights of a Megatron optimizer: all that are not memory of the model itself."""
    own = (parameter for parameter in model.parameters() if parameter.dtype == torch.float32)
    held = {parameter.untyped_storage().data_ptr() for parameter in own}  # weights in FP8 have no such storage
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if inner is None:  # a rank without parameters
            continue
        for group in inner.param_groups:
            for weight in group["params"]:
                if weight.numel() and weight.untyped_storage().data_ptr() not in held:
                    yield weight
        for state in inner.state.values():
            for value in state.values():
                if isinstance(value, Tensor) and value.dim() > 0:  # the number of steps stays
                    yield value


def park(model: torch.nn.Module, device: torch.device) -> None:
    """Put the weights of a frozen model into host memory. `on_device` brings them back."""
    parking = Parking(lambda: list(model.parameters()), device)
    setattr(model, _PARKED, parking)
    with parking.resident():
        pass


@contextmanager
def on_device(model: torch.nn.Module) -> Iterator[None]:
    """Within it the weights of a model are on the device, whether it was parked or not."""
    parking = getattr(model, _PARKED, None)
    if parking is None:
        yield
        return
    with parking.resident():
        yield


def require_offload(parallel: ParallelConfig, device: torch.device) -> None:
    """Raise UserError when what a key asks for is not there: memory of a GPU to save, layers that can."""
    engine = has_transformer_engine(device)
    for name in ("offload_optimizer", "offload_scorer", "offload_activations"):
        value = str(getattr(parallel, name)).lower()
        if value not in ("false", "0") and device.type != "cuda":
            raise UserError(f"parallel.{name}={value}: there is no GPU memory to save on a CPU: leave it out")
    if parallel.offload_activations and not engine:
        raise UserError(
            f"parallel.offload_activations={parallel.offload_activations}: needs Transformer Engine, which does not "
            "load: `ra3 doctor` says why"
        )
