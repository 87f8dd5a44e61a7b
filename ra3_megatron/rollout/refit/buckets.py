"""Tensors in buckets of a fixed size, written on one side and read on the other.

A bucket is a flat buffer of bytes and a `Bucket`, which says what is in it: whole tensors, or parts of ones that are
larger than what is left of the buffer. The reader believes nothing: buckets must come in order, tensors one after
another, in whole, with the announced shapes and dtype, inside the bucket, each exactly once, none missing at the end.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ra3_megatron.hf.finite import first_not_finite, is_finite
from ra3_megatron.hf.weights import Shape
from ra3_megatron.rollout.refit.errors import RefitError

ALIGNMENT = 64
"""Every part begins at a multiple of this many bytes."""


@dataclass(frozen=True)
class Part:
    """A run of a tensor's elements, in row-major order."""

    name: str
    dtype: str
    shape: Shape
    """Of the tensor."""
    first: int
    count: int
    """Elements first … first + count - 1 of the flattened tensor."""
    offset: int
    """Where they begin in the bucket, in bytes."""


@dataclass(frozen=True)
class Bucket:
    """What is in a bucket."""

    number: int
    """Buckets of an update are numbered from 0."""
    size: int
    """Bytes in use."""
    parts: tuple[Part, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        """As plain tuples: there is one such message a bucket, and it is to take microseconds."""
        plain = [(p.name, p.dtype, p.shape, p.first, p.count, p.offset) for p in self.parts]
        return _bucket, (self.number, self.size, plain)


def _bucket(number: int, size: int, parts: list[tuple[Any, ...]]) -> Bucket:
    return Bucket(number, size, tuple(Part(*part) for part in parts))


@dataclass(frozen=True)
class Totals:
    """What was sent in one update."""

    buckets: int
    tensors: int
    nbytes: int
    """Of the tensors, without gaps between them."""


class BucketWriter:
    """Fills one buffer after another. On a GPU it waits for the device once a bucket, when this is full: its values
    are checked then.

    next_buffer: a flat uint8 tensor that may be overwritten, called when the first part is written; deliver: takes a
    bucket that is full, or the last one; full: is called before that one's check.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        next_buffer: Callable[[], Tensor],
        deliver: Callable[[Bucket], None],
        full: Callable[[], object] = lambda: None,
    ) -> None:
        self._dtype, self._dtype_name = dtype, str(dtype)
        self._next_buffer, self._deliver, self._full = next_buffer, deliver, full
        self._buffer: Tensor | None = None
        self._parts: list[Part] = []
        self._unchecked: list[Tensor] = []
        """On a GPU the written parts of the present bucket."""
        self._used = self._buckets = self._tensors = self._nbytes = 0

    def put(self, name: str, tensor: Tensor) -> None:
        """Append a tensor, cast to the writer's dtype. Raises RefitError when it, or on a GPU another one of a bucket
        that is full now, is not finite."""
        flat = tensor.reshape(-1)
        size, itemsize, shape = flat.numel(), self._dtype.itemsize, tuple(tensor.shape)
        first = 0
        while first < size:
            if self._buffer is None:
                buffer = self._next_buffer()
                self._buffer = buffer[: len(buffer) // itemsize * itemsize].view(self._dtype)
            offset = -(-self._used // ALIGNMENT) * ALIGNMENT
            place = offset // itemsize
            count = min(len(self._buffer) - place, size - first)
            if count <= 0:
                self._close_bucket()
                continue
            part = self._buffer.narrow(0, place, count)
            part.copy_(flat if count == size else flat.narrow(0, first, count))
            if part.is_cuda:
                self._unchecked.append(part)
            elif not is_finite(part):  # at once, while it is in the processor's cache
                raise _not_finite(name)
            self._parts.append(Part(name, self._dtype_name, shape, first, count, offset))
            first += count
            self._used = offset + count * itemsize
        self._tensors += 1
        self._nbytes += size * itemsize

    def finish(self) -> Totals:
        """Deliver what is left."""
        if self._parts:
            self._close_bucket()
        return Totals(self._buckets, self._tensors, self._nbytes)

    def _close_bucket(self) -> None:
        self._full()
        wrong = first_not_finite([part.name for part in self._parts], self._unchecked) if self._unchecked else None
        self._unchecked = []
        if wrong is not None:
            raise _not_finite(wrong)
        bucket = Bucket(self._buckets, self._used, tuple(self._parts))
        self._buffer, self._parts, self._used = None, [], 0
        self._buckets += 1
        self._deliver(bucket)


def _not_finite(name: str) -> RefitError:
    return RefitError(f"tensor {name} holds values that are not finite")


class BucketReader:
    """Puts tensors together again. Raises RefitError for everything that is not as announced."""

    def __init__(self, manifest: Mapping[str, Shape], dtype: torch.dtype, capacity: int) -> None:
        """capacity: bytes of the buffers."""
        self._missing = dict(manifest)
        self._manifest = manifest
        self._dtype, self._dtype_name = dtype, str(dtype)
        self._capacity = capacity
        self._open: tuple[str, Tensor, int] | None = None
        self._buckets = self._tensors = self._nbytes = 0

    def check(self, bucket: Bucket) -> None:
        """Before its content is read: it is the next one, and fits."""
        if bucket.number != self._buckets:
            raise RefitError(f"bucket {bucket.number} came where {self._buckets} was due")
        if not 0 < bucket.size <= self._capacity:
            raise RefitError(f"bucket {bucket.number} has {bucket.size} bytes, the buffer {self._capacity}")

    def read(self, bucket: Bucket, content: Tensor) -> list[tuple[str, Tensor]]:
        """Tensors that are complete now, as copies; on a GPU those that the device will have made by its next
        synchronisation. content: flat uint8."""
        self.check(bucket)
        if len(content) != bucket.size:
            raise RefitError(f"bucket {bucket.number} has {len(content)} bytes, {bucket.size} were announced")
        complete: list[tuple[str, Tensor]] = []
        copies: list[tuple[Tensor, int]] = []  # where to, and from which byte on
        behind, itemsize = 0, self._dtype.itemsize
        for part in bucket.parts:
            end = part.offset + part.count * itemsize
            if part.offset < behind or part.offset % ALIGNMENT or end > bucket.size:
                raise RefitError(f"bucket {bucket.number}: tensor {part.name} lies outside of its place")
            behind = end
            name, tensor, known = self._opened(part, content.device)
            if part.first != known or part.count < 1 or known + part.count > tensor.numel():
                raise RefitError(
                    f"tensor {name}: elements from {part.first} came, those from {known} of {tensor.numel()} were due"
                )
            copies.append((tensor.view(-1).narrow(0, known, part.count), part.offset))
            known += part.count
            self._open = (name, tensor, known)
            if known == tensor.numel():
                self._open = None
                self._tensors += 1
                self._nbytes += known * itemsize
                complete.append((name, tensor))
        if behind != bucket.size:
            raise RefitError(f"bucket {bucket.number}: {bucket.size - behind} bytes belong to no tensor")
        if copies:
            values = content.view(self._dtype)
            sources = [values.narrow(0, offset // itemsize, target.numel()) for target, offset in copies]
            torch._foreach_copy_([target for target, _ in copies], sources)
        self._buckets += 1
        return complete

    def finish(self, sent: Totals) -> None:
        """Check that everything came."""
        if self._open is not None:
            raise RefitError(f"tensor {self._open[0]} came in part only")
        if self._missing:
            raise RefitError(f"tensor {next(iter(self._missing))} never came ({len(self._missing)} are missing)")
        received = Totals(self._buckets, self._tensors, self._nbytes)
        if received != sent:
            raise RefitError(f"{sent} were sent, {received} came")

    def _opened(self, part: Part, device: torch.device) -> tuple[str, Tensor, int]:
        """The tensor that a part belongs to, and how many of its elements came before."""
        if part.dtype != self._dtype_name:
            raise RefitError(f"tensor {part.name} came as {part.dtype}, {self._dtype} was announced")
        if self._open is not None:
            if part.name != self._open[0]:
                raise RefitError(f"tensor {part.name} came before the rest of {self._open[0]}")
            if part.shape != tuple(self._open[1].shape):
                raise RefitError(f"tensor {part.name} came with two shapes")
            return self._open
        if part.name not in self._missing:
            why = "came twice" if part.name in self._manifest else "was not announced"
            raise RefitError(f"tensor {part.name} {why}")
        shape = self._missing.pop(part.name)
        if part.shape != tuple(shape):
            raise RefitError(f"tensor {part.name} came with shape {list(part.shape)}, not {list(shape)}")
        self._open = (part.name, torch.empty(part.shape, dtype=self._dtype, device=device), 0)
        return self._open
