"""Tensors in buckets of a fixed size, written on one side and read on the other.

A bucket is a flat buffer of bytes and a `Bucket`, which says what is in it: whole tensors, or parts of ones that are
larger than what is left of the buffer. The reader believes nothing: buckets must come in order, tensors one after
another, in whole, with the announced shapes and dtype, inside the bucket, each exactly once, none missing at the end.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ra3_megatron.hf.finite import is_finite
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


@dataclass(frozen=True)
class Totals:
    """What was sent in one update."""

    buckets: int
    tensors: int
    nbytes: int
    """Of the tensors, without gaps between them."""


class BucketWriter:
    """Fills one buffer after another.

    next_buffer: a flat uint8 tensor that may be overwritten, called when the first part is written; deliver: takes a
    bucket that is full, or the last one.
    """

    def __init__(
        self, dtype: torch.dtype, next_buffer: Callable[[], Tensor], deliver: Callable[[Bucket], None]
    ) -> None:
        self._dtype = dtype
        self._next_buffer, self._deliver = next_buffer, deliver
        self._buffer: Tensor | None = None
        self._parts: list[Part] = []
        self._used = self._buckets = self._tensors = self._nbytes = 0

    def put(self, name: str, tensor: Tensor) -> None:
        """Append a tensor, cast to the writer's dtype. Raises RefitError when it is not finite."""
        flat = tensor.reshape(-1)
        first = 0
        while first < len(flat):
            buffer = self._buffer if self._buffer is not None else self._next_buffer()
            self._buffer = buffer
            offset = -(-self._used // ALIGNMENT) * ALIGNMENT
            count = min((len(buffer) - offset) // self._dtype.itemsize, len(flat) - first)
            if count <= 0:
                self._close_bucket()
                continue
            end = offset + count * self._dtype.itemsize
            part = buffer[offset:end].view(self._dtype)
            part.copy_(flat[first : first + count])
            if not is_finite(part):
                raise RefitError(f"tensor {name} holds values that are not finite")
            self._parts.append(Part(name, str(self._dtype), tuple(tensor.shape), first, count, offset))
            first += count
            self._used = end
        self._tensors += 1
        self._nbytes += len(flat) * self._dtype.itemsize

    def finish(self) -> Totals:
        """Deliver what is left."""
        if self._parts:
            self._close_bucket()
        return Totals(self._buckets, self._tensors, self._nbytes)

    def _close_bucket(self) -> None:
        bucket = Bucket(self._buckets, self._used, tuple(self._parts))
        self._buffer, self._parts, self._used = None, [], 0
        self._buckets += 1
        self._deliver(bucket)


class BucketReader:
    """Puts tensors together again. Raises RefitError for everything that is not as announced."""

    def __init__(self, manifest: Mapping[str, Shape], dtype: torch.dtype, capacity: int) -> None:
        """capacity: bytes of the buffers."""
        self._missing = dict(manifest)
        self._manifest = manifest
        self._dtype = dtype
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
        """Tensors that are complete now, as copies. content: flat uint8."""
        self.check(bucket)
        if len(content) != bucket.size:
            raise RefitError(f"bucket {bucket.number} has {len(content)} bytes, {bucket.size} were announced")
        complete = []
        behind = 0
        for part in bucket.parts:
            end = part.offset + part.count * self._dtype.itemsize
            if part.offset < behind or part.offset % ALIGNMENT or end > bucket.size:
                raise RefitError(f"bucket {bucket.number}: tensor {part.name} lies outside of its place")
            behind = end
            name, tensor, known = self._opened(part, content.device)
            if part.first != known or part.count < 1 or known + part.count > tensor.numel():
                raise RefitError(
                    f"tensor {name}: elements from {part.first} came, those from {known} of {tensor.numel()} were due"
                )
            tensor.view(-1)[known : known + part.count] = content[part.offset : end].view(self._dtype)
            known += part.count
            self._open = (name, tensor, known)
            if known == tensor.numel():
                self._open = None
                self._tensors += 1
                self._nbytes += known * self._dtype.itemsize
                complete.append((name, tensor))
        if behind != bucket.size:
            raise RefitError(f"bucket {bucket.number}: {bucket.size - behind} bytes belong to no tensor")
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
        if part.dtype != str(self._dtype):
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
