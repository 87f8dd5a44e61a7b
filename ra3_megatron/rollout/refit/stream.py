"""The trainer's side: buckets to the processes of the engines that one sender feeds.

A stream serves one update after another until one fails; then it is stopped for good, and whoever waits for it is told.
"""

import contextlib
import secrets
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait
from typing import TypeVar

import torch

from ra3_megatron.hf.weights import Shape
from ra3_megatron.rollout.refit.buckets import Bucket, BucketWriter, Totals
from ra3_megatron.rollout.refit.carriers import Carrier
from ra3_megatron.rollout.refit.channel import Accepted, Complete, Ready, Stopped, Taken, accept, listen, readable
from ra3_megatron.rollout.refit.errors import RefitError
from ra3_megatron.rollout.refit.receiver import StreamWeights
from ra3_megatron.rollout.refit.stopwatch import Stopwatch

Message = TypeVar("Message")


class EngineGone(RefitError):
    """An engine or its process ended the update; the engine's own answer says more."""


class Stream:
    """Buckets from this process to `receivers` others."""

    def __init__(self, carrier: Carrier, receivers: int, timeout: float, host: str | None = None) -> None:
        """timeout: seconds within which a receiver must have answered. host: listen on this interface; none: on this
        machine only."""
        self._carrier, self._receivers, self._timeout = carrier, receivers, timeout
        self._authkey = secrets.token_bytes(32)
        self._socket, self._address = listen(host, f"ra3-refit-{secrets.token_hex(8)}")
        self._connections: list[Connection] = []
        self._alarm = -1
        self._number = 0
        self._sent = self._taken = 0
        self.watch = Stopwatch("fill")
        """Of the present update: `meet` (receivers come), `fill` (weights are gathered and written), `check` (the
        device is waited for), `tell` (messages), `wait` (for receivers), `end` (until they have everything)."""
        self.received: list[Mapping[str, float]] = []
        """Seconds of each receiver, of the update that was finished last."""

    def source(self, shapes: Mapping[str, Shape], dtype: torch.dtype) -> StreamWeights:
        """Describes the next update."""
        self._number += 1
        return StreamWeights(self._address, self._authkey, self._number, dict(shapes), dtype, self._timeout)

    def open(self, dtype: torch.dtype, alarm: int) -> BucketWriter:
        """Wait until every receiver is there. alarm: file descriptor that is readable once an engine that
        was given the last `source` has failed.

        Raises RefitError; so do the writer and `finish`. Then `stop` must follow.
        """
        self._alarm = alarm
        self._sent = self._taken = 0
        self.received = []
        self.watch = Stopwatch("meet")
        ready: list[Connection] = []
        changed = False
        end = time.monotonic() + self._timeout
        while len(ready) < self._receivers:
            idle = [connection for connection in self._connections if connection not in ready]
            events = wait([self._socket, alarm, *idle], max(0.0, end - time.monotonic()))
            if not events:
                raise RefitError(
                    f"{len(ready)} of {self._receivers} engine processes asked for the weights within "
                    f"{self._timeout:g} s"
                )
            if alarm in events:
                raise EngineGone("an engine refused the update")
            for connection in events:
                if connection is self._socket:
                    new = accept(self._socket, self._authkey, self._timeout)
                    if new is not None:
                        self._connections.append(new)
                        changed = True
                elif isinstance(connection, Connection):
                    if self._is_ready(connection):
                        ready.append(connection)
                    else:  # of a process that was replaced
                        self._drop(connection)
                        changed = True
        for connection in [c for c in self._connections if c not in ready]:
            self._drop(connection)
            changed = True
        if changed:
            self._carrier.introduce(self._connections)
        self.watch.start("fill")
        return BucketWriter(dtype, self._next_buffer, self._deliver, lambda: self.watch.start("check"))

    def finish(self, totals: Totals) -> None:
        """Wait until every receiver has taken everything that the writer delivered."""
        self.watch.start("end")
        while self._taken < self._sent:
            self._wait_taken()
        self._tell(totals)
        for connection in self._connections:
            self.received.append(self._expect(connection, Complete()).seconds)

    def stop(self, reason: str) -> None:
        """End for good. Receivers that take part or would like to are turned away."""
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.send(Stopped(reason))
            self._drop(connection)
        self._socket.close()
        self._carrier.close()

    def _is_ready(self, connection: Connection) -> bool:
        try:
            return connection.recv() == Ready(self._number)
        except (EOFError, OSError):
            return False

    def _drop(self, connection: Connection) -> None:
        self._connections.remove(connection)
        connection.close()

    def _next_buffer(self) -> torch.Tensor:
        self.watch.start("wait")
        while self._sent - self._taken >= self._carrier.buffers:
            self._wait_taken()
        self.watch.start("fill")
        return self._carrier.buffer(self._sent)

    def _deliver(self, bucket: Bucket) -> None:
        self._carrier.settle()
        self.watch.start("tell")
        self._tell(bucket)
        if self._carrier.asks:
            for connection in self._connections:
                self._expect(connection, Accepted(bucket.number, bucket.size))
        self._carrier.publish(bucket)
        self._sent += 1
        self.watch.start("fill")

    def _wait_taken(self) -> None:
        for connection in self._connections:
            self._expect(connection, Taken(self._taken))
        self._taken += 1

    def _tell(self, message: object) -> None:
        for connection in self._connections:
            try:
                connection.send(message)
            except OSError as error:
                raise EngineGone(f"an engine's process went away during the update ({error})") from error

    def _expect(self, connection: Connection, expected: Message) -> Message:
        events = readable([connection.fileno(), self._alarm], self._timeout)
        if not events:
            raise RefitError(f"an engine's process did not answer for {self._timeout:g} s during the update")
        if connection.fileno() not in events:
            raise EngineGone("an engine ended the update")
        try:
            message = connection.recv()
        except (EOFError, OSError) as error:
            raise EngineGone("an engine's process went away during the update") from error
        if isinstance(message, Stopped):
            raise EngineGone(message.reason)
        if message != expected:
            raise RefitError(f"an engine's process answered {message}, not {expected}")
        answer: Message = message
        return answer
