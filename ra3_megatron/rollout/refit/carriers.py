"""How the content of buckets travels: through memory that both sides map, or by a broadcast.

`shared`, on one machine: two buffers in turn, so that one is filled while the other is read. On a CPU an anonymous
memory file whose descriptor is passed on: it has no name, so nothing can stay behind, however either side ends. On a
GPU memory of the device, passed on by a CUDA IPC handle.

`broadcast`, between machines: a process group of its own (gloo, on GPUs NCCL) of the sender and all receivers.
"""

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from ra3_megatron.rollout.refit.buckets import ALIGNMENT, Bucket
from ra3_megatron.rollout.refit.channel import Setup
from ra3_megatron.rollout.refit.errors import RefitError
from ra3_megatron.rollout.vllm.wire import own_address

BUFFERS = 2
"""Of a shared carrier."""


class Carrier(Protocol):
    """The sender's side."""

    buffers: int
    """Buckets that may be on the way at once."""
    asks: bool
    """Receivers must have accepted a bucket before its content travels."""

    def introduce(self, receivers: Sequence[Connection]) -> None:
        """Tell these receivers, all there are from now on, how buckets travel."""
        ...

    def buffer(self, number: int) -> Tensor:
        """Where bucket `number` is written, flat uint8."""
        ...

    def settle(self) -> None:
        """Before a bucket is announced: what was written is in memory."""
        ...

    def publish(self, bucket: Bucket) -> None:
        """Send the content of a bucket that was announced."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


class Inlet(Protocol):
    """The receiver's side."""

    capacity: int
    """Bytes of a buffer."""
    asks: bool

    def content(self, bucket: Bucket) -> Tensor:
        """The content of a bucket, flat uint8, until it is said to be taken."""
        ...

    def close(self) -> None: ...


def rounded(capacity: int) -> int:
    """A buffer's size in bytes, so that the one behind it is aligned."""
    return -(-capacity // ALIGNMENT) * ALIGNMENT


def make_carrier(kind: str, capacity: int, device: torch.device, host: str | None, timeout: float) -> Carrier:
    """A carrier of buckets of at most `capacity` bytes. host: at which receivers reach this process (`broadcast`)."""
    if kind == "shared":
        return SharedCarrier(rounded(capacity), device)
    if host is None:
        raise ValueError("the broadcast carrier needs a host at which the engines reach this process")
    return BroadcastCarrier(rounded(capacity), device, host, timeout)


def make_inlet(setup: Setup, connection: Connection, timeout: float) -> Inlet:
    """What the sender's set-up describes."""
    if setup.carrier == "shared":
        return SharedInlet(setup, connection)
    return BroadcastInlet(setup, timeout, own_address(connection))


class SharedCarrier:
    """See the module's docstring."""

    buffers = BUFFERS
    asks = False

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._capacity, self._device = capacity, device
        self._file: int | None = None
        if device.type == "cuda":
            self._memory = torch.empty(BUFFERS * capacity, dtype=torch.uint8, device=device)
        else:
            self._file = os.memfd_create("ra3-refit", os.MFD_CLOEXEC)
            os.ftruncate(self._file, BUFFERS * capacity)
            self._memory = _mapped(self._file, BUFFERS * capacity)

    def introduce(self, receivers: Sequence[Connection]) -> None:
        for receiver in receivers:
            if self._file is None:
                from torch.multiprocessing.reductions import reduce_tensor

                unique = str(torch.cuda.get_device_properties(self._device).uuid)
                receiver.send(Setup("shared", self._capacity, (unique, reduce_tensor(self._memory))))
            else:
                receiver.send(Setup("shared", self._capacity, None))
                send_handle(receiver, self._file, None)

    def buffer(self, number: int) -> Tensor:
        start = number % BUFFERS * self._capacity
        return self._memory[start : start + self._capacity]

    def settle(self) -> None:
        if self._device.type == "cuda":  # not the whole device: nothing else than this stream wrote to the buffer
            torch.cuda.current_stream(self._device).synchronize()

    def publish(self, bucket: Bucket) -> None:
        """Nothing to do: it is there."""

    def close(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        if self._file is not None:
            os.close(self._file)
            self._file = None


class SharedInlet:
    """See the module's docstring."""

    asks = False

    def __init__(self, setup: Setup, connection: Connection) -> None:
        self.capacity = setup.capacity
        if setup.details is None:
            file = recv_handle(connection)
            try:
                self._memory = _mapped(file, BUFFERS * setup.capacity)
            finally:
                os.close(file)
        else:
            unique, (rebuild, arguments) = setup.details
            self._memory = rebuild(*_on_device(arguments, unique))

    def content(self, bucket: Bucket) -> Tensor:
        start = bucket.number % BUFFERS * self.capacity
        return self._memory[start : start + bucket.size]

    def close(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True)
class _Group:
    """A process group that a receiver is to join."""

    host: str
    port: int
    prefix: str
    rank: int
    size: int
    device: str


class BroadcastCarrier:
    """See the module's docstring."""

    buffers = 1
    asks = True

    def __init__(self, capacity: int, device: torch.device, host: str, timeout: float) -> None:
        self._capacity, self._device, self._timeout = capacity, device, timeout
        self._buffer = torch.empty(capacity, dtype=torch.uint8, device=device)
        self._host = host
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
        self._groups = 0
        self._group: Any = None

    def introduce(self, receivers: Sequence[Connection]) -> None:
        self._groups += 1
        prefix, size = f"group {self._groups}", len(receivers) + 1
        for number, receiver in enumerate(receivers):
            group = _Group(self._host, self._store.port, prefix, number + 1, size, self._device.type)
            receiver.send(Setup("broadcast", self._capacity, group))
        self._group = _join(self._store, prefix, 0, size, self._device.type, self._timeout, self._host)

    def buffer(self, number: int) -> Tensor:
        return self._buffer

    def settle(self) -> None:
        """Nothing to do: the broadcast is ordered behind what was written."""

    def publish(self, bucket: Bucket) -> None:
        _broadcast(self._group, self._buffer[: bucket.size], self._timeout)

    def close(self) -> None:
        if self._group is not None:
            self._group.abort()
        self._group = None
        self._buffer = torch.empty(0, dtype=torch.uint8)


class BroadcastInlet:
    """See the module's docstring."""

    asks = True

    def __init__(self, setup: Setup, timeout: float, host: str) -> None:
        """host: this machine's address, as the sender reaches it."""
        group: _Group = setup.details
        self.capacity, self._timeout = setup.capacity, timeout
        device = torch.device("cuda", torch.cuda.current_device()) if group.device == "cuda" else torch.device("cpu")
        self._buffer = torch.empty(setup.capacity, dtype=torch.uint8, device=device)
        self._store = TCPStore(group.host, group.port, is_master=False, timeout=timedelta(seconds=timeout))
        self._group = _join(self._store, group.prefix, group.rank, group.size, group.device, timeout, host)

    def content(self, bucket: Bucket) -> Tensor:
        part = self._buffer[: bucket.size]
        _broadcast(self._group, part, self._timeout)
        return part

    def close(self) -> None:
        self._group.abort()


def _mapped(file: int, size: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)


def _on_device(arguments: tuple[Any, ...], unique: str) -> tuple[Any, ...]:
    """Arguments that rebuild a tensor of another process, with this process's number of the same device."""
    numbers = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    if unique not in numbers:
        raise RefitError(f"the engine's process does not see the trainer's GPU {unique}: weights cannot be shared")
    place = 6  # storage_device of torch.multiprocessing.reductions.rebuild_cuda_tensor
    return (*arguments[:place], numbers[unique], *arguments[place + 1 :])


def _join(store: Store, prefix: str, rank: int, size: int, device: str, timeout: float, host: str) -> Any:
    """A group beside the process's own ones, which nobody else knows of.

    host: address at which gloo waits for the others, as it would otherwise take what this machine's name resolves to,
    which may be its loopback. NCCL chooses by itself (NCCL_SOCKET_IFNAME).
    """
    limit = timedelta(seconds=timeout)
    own = PrefixStore(prefix, store)
    if device == "cuda":
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = limit
        return ProcessGroupNCCL(own, rank, size, options)
    from torch.distributed import ProcessGroupGloo

    choices = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    choices._devices, choices._timeout = [ProcessGroupGloo.create_device(hostname=host)], limit
    return ProcessGroupGloo(own, rank, size, choices)


def _broadcast(group: Any, part: Tensor, timeout: float) -> None:
    """From rank 0 to all. Raises RefitError when a process of the group is gone."""
    try:
        group.broadcast(part, 0).wait(timedelta(seconds=timeout))
        if part.is_cuda:
            torch.cuda.synchronize(part.device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RefitError(f"the broadcast of weights broke off: {reason}") from error
