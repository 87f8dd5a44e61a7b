"""The engine's side: the weights of one update, as they come from the trainer.

Runs in every process that holds a share of the engine's model. A connection is kept for the updates that follow,
until one fails.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from ra3_megatron.hf.weights import Shape
from ra3_megatron.rollout.refit.buckets import Bucket, BucketReader, Totals
from ra3_megatron.rollout.refit.carriers import Inlet, make_inlet
from ra3_megatron.rollout.refit.channel import (
    Accepted,
    Address,
    Complete,
    Ready,
    Setup,
    Stopped,
    Taken,
    connect,
    readable,
)
from ra3_megatron.rollout.refit.errors import RefitError
from ra3_megatron.rollout.refit.stopwatch import Stopwatch


@dataclass(frozen=True)
class StreamWeights:
    """Where an engine finds the weights of one update: a `WeightSource` of rollout.vllm.messages."""

    address: Address
    authkey: bytes = field(repr=False)
    number: int
    """Of the update, in the order of the sender."""
    shapes: dict[str, Shape]
    """Hugging Face name and shape of every tensor."""
    dtype: torch.dtype
    timeout: float
    """Seconds without a sign of the trainer after which it is given up."""

    def manifest(self) -> dict[str, Shape]:
        return self.shapes

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor once. Raises RefitError when anything is not as announced, or the trainer goes away."""
        link = _link_to(self)
        reason = "the engine stopped taking weights"
        try:
            yield from link.receive(self)
            reason = ""
        except RefitError as error:
            reason = str(error)
            raise
        finally:
            if reason:
                link.stop(reason)
            else:
                _keep(link)


class _Link:
    """The connection to one sender."""

    def __init__(self, source: StreamWeights) -> None:
        self.address = source.address
        self._inlet: Inlet | None = None
        self._connection: Connection | None = connect(source.address, source.authkey, source.timeout)

    def receive(self, source: StreamWeights) -> Iterator[tuple[str, Tensor]]:
        """Each tensor once. Its time: `wait` (for messages), `open` (the memory of a new connection's buckets, the
        handles of a GPU's), `copy` (checks and copies, until they are made), `load` (what is done with tensors)."""
        watch = Stopwatch("wait")
        self._say(Ready(source.number))
        reader: BucketReader | None = None
        while True:
            message = self._next(source.timeout)
            if isinstance(message, Setup):
                assert self._connection is not None
                watch.start("open")
                self._inlet = make_inlet(message, self._connection, source.timeout)
                watch.start("wait")
                continue
            if self._inlet is None:
                raise RefitError(f"the trainer sent {type(message).__name__} before it said how weights travel")
            if reader is None:
                reader = BucketReader(source.shapes, source.dtype, self._inlet.capacity)
            if isinstance(message, Totals):
                reader.finish(message)
                self._say(Complete(watch.stop()))
                return
            if not isinstance(message, Bucket):
                raise RefitError(f"the trainer sent {type(message).__name__} where a bucket was due")
            reader.check(message)
            if self._inlet.asks:
                self._say(Accepted(message.number, message.size))
            content = self._inlet.content(message)
            watch.start("copy")
            complete = reader.read(message, content)
            self._settle(content)
            watch.start("wait")
            self._say(Taken(message.number))
            watch.start("load")
            yield from complete
            del complete
            watch.start("wait")

    def stop(self, reason: str) -> None:
        """End the connection, and say why if that can still be heard."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.send(Stopped(reason))
            connection.close()
        if self._inlet is not None:
            self._inlet.close()
            self._inlet = None

    def _settle(self, content: Tensor) -> None:
        """The copies are made, also of parts of tensors that are not complete: their originals may be overwritten."""
        if content.is_cuda:
            torch.cuda.current_stream(content.device).synchronize()

    def _say(self, message: object) -> None:
        assert self._connection is not None
        try:
            self._connection.send(message)
        except OSError as error:
            while self._connection.poll():  # if it closed the connection, it said why before
                self._next(0.0)
            raise RefitError(f"the trainer does not take answers any more ({error})") from error

    def _next(self, timeout: float) -> object:
        assert self._connection is not None
        try:
            if not readable([self._connection.fileno()], timeout):
                raise RefitError(f"the trainer sent nothing for {timeout:g} s")
            message: object = self._connection.recv()
        except (EOFError, OSError) as error:
            raise RefitError("the trainer went away during the update") from error
        if isinstance(message, Stopped):
            raise RefitError(f"the trainer stopped the update: {message.reason}")
        return message


_kept: list[_Link] = []
"""This process's connection, between updates that went well."""


def _link_to(source: StreamWeights) -> _Link:
    link = _kept.pop() if _kept else None
    if link is not None and link.address != source.address:
        link.stop("the engine takes its weights from another sender")
        link = None
    return link or _Link(source)


def _keep(link: _Link) -> None:
    while _kept:
        _kept.pop().stop("the engine has another connection")
    _kept.append(link)
