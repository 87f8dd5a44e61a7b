"""Messages over a pair of pipes, each with its length in front of it."""

from __future__ import annotations

import os

from .codec import MAX_BYTES

TYPE_CHECKING = False  # importing typing takes longer than most tests
if TYPE_CHECKING:
    from collections.abc import Callable

LARGEST = MAX_BYTES + 2**20
"""Bytes of the largest message: the largest value and what stands around it."""


class Broken(BaseException):
    """The other side is gone, or has said what no message may say.

    No Exception: tests that catch everything should not catch this.
    """


class Channel:
    """One end of the pair. read, write: file descriptors. wait: comes back when there is something to read."""

    def __init__(self, read: int, write: int, wait: Callable[[int], None] | None = None) -> None:
        self.read = read
        self.write = write
        self.wait = wait

    def send(self, message: bytes) -> None:
        """Raises Broken when nobody reads any more."""
        data = memoryview(len(message).to_bytes(8, "little") + message)
        try:
            while data:
                data = data[os.write(self.write, data[:65536]) :]
        except OSError:
            raise Broken("the program has ended") from None

    def receive(self) -> bytes:
        """The next message. Raises Broken at the end, and for a length beyond LARGEST."""
        length = int.from_bytes(self._exactly(8), "little")
        if length > LARGEST:
            raise Broken("the program has written into the channel of its results")
        return self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            if self.wait is not None:
                self.wait(self.read)
            try:
                piece = os.read(self.read, min(count - len(data), 65536))
            except OSError:
                piece = b""
            if not piece:
                raise Broken("the program has ended")
            data += piece
        return bytes(data)
