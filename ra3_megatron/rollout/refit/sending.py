"""One refit on a sender: the engines are told, the stream is written, and what went wrong is put in one line."""

import os
import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ra3_megatron.hf.weights import Link, Shape
from ra3_megatron.rollout.refit.buckets import BucketWriter, Totals
from ra3_megatron.rollout.refit.receiver import StreamWeights
from ra3_megatron.rollout.refit.stream import EngineGone, Stream

Update = Callable[[int, StreamWeights], None]
"""Makes an engine take the weights of a version from a source; raises when it cannot."""


class Updates:
    """The calls that make engines take an update, each in a thread, while the weights are sent."""

    def __init__(self, updates: Sequence[Update], version: int, source: StreamWeights) -> None:
        self._errors: list[Exception] = []
        self.alarm, self._write = os.pipe()
        """`alarm` is readable as soon as one has failed."""
        self._threads = [
            threading.Thread(target=self._run, args=(update, version, source), name="refit", daemon=True)
            for update in updates
        ]
        for thread in self._threads:
            thread.start()

    def join(self) -> list[Exception]:
        """Wait for all; what they raised."""
        for thread in self._threads:
            thread.join()
        os.close(self.alarm)
        os.close(self._write)
        return self._errors

    def _run(self, update: Update, version: int, source: StreamWeights) -> None:
        try:
            update(version, source)
        except Exception as error:
            self._errors.append(error)
            os.write(self._write, b"x")


class Sending:
    """`put` every link, then `finish`. Neither raises: after a failure, what comes is ignored, because the sender has
    to go on gathering until the last round.
    """

    def __init__(
        self, stream: Stream, shapes: Mapping[str, Shape], dtype: torch.dtype, updates: Sequence[Update], version: int
    ) -> None:
        self.failure: Exception | None = None
        """What ended the stream, which is stopped then."""
        self.seconds: Mapping[str, float] = {}
        self.received: Sequence[Mapping[str, float]] = ()
        """Where the time of the stream and of each receiver went, once it is finished."""
        self._stream = stream
        self._writer: BucketWriter | None = None
        self._updates = Updates(updates, version, stream.source(shapes, dtype))
        try:
            self._writer = stream.open(dtype, self._updates.alarm)
        except Exception as error:
            self.fail(error)

    def put(self, link: Link, whole: Tensor) -> None:
        """Send the tensors of a link."""
        if self._writer is None:
            return
        try:
            for name, tensor in zip(link.names, link.split(whole), strict=True):
                self._writer.put(name, tensor)
        except Exception as error:
            self.fail(error)

    def finish(self) -> tuple[Totals | None, str]:
        """Wait for the engines: what was sent; or why that failed."""
        totals = None
        if self._writer is not None:
            try:
                totals = self._writer.finish()
                self._stream.finish(totals)
                self.seconds, self.received = self._stream.watch.stop(), self._stream.received
            except Exception as error:
                self.fail(error)
        refusals = [str(error) for error in self._updates.join()]
        if refusals and isinstance(self.failure, EngineGone | None):
            return None, "; ".join(dict.fromkeys(refusals))
        return (None, _line(self.failure)) if self.failure else (totals, "")

    def fail(self, error: Exception) -> None:
        """Stop the stream."""
        if self.failure is None:
            self.failure, self._writer = error, None
            self._stream.stop(_line(error))


def _line(error: BaseException) -> str:
    text = str(error).splitlines()
    return text[0] if text else type(error).__name__
