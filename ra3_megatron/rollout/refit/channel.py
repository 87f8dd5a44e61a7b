"""The connection between a sender and the process of an engine: its messages, and how it is opened.

    receiver                         sender
    Ready(number)            ─►                      the update that it was asked to take
                             ◄─      Setup           how buckets travel; whenever that changed
                             ◄─      Bucket          … and its content, as the carrier has it
    Accepted(bucket)         ─►                      if the carrier asks for it, before the content travels
    Taken(bucket)            ─►                      the buffer may be used again
                             ◄─      Totals
    Complete                 ─►                      all tensors came

Either side may say Stopped instead of anything else, or close the connection. Both prove that they know the key before
anything is unpickled. A socket operation that takes longer than the time limit fails.
"""

import os
import select
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

from ra3_megatron.rollout.refit.errors import RefitError

HANDSHAKE_SECONDS = 10.0
"""Whoever connects to a sender must have proved by then that it knows the key."""

Address = str | tuple[str, int]
"""Name of an abstract unix socket, which leaves nothing in the file system; or host and port."""


@dataclass(frozen=True)
class Ready:
    """The receiver waits for an update's buckets."""

    number: int
    """Of the update, as its description says."""


@dataclass(frozen=True)
class Setup:
    """How buckets travel from now on."""

    carrier: str
    """`shared` or `broadcast`."""
    capacity: int
    """Bytes of a buffer."""
    details: Any
    """The carrier's own."""


@dataclass(frozen=True)
class Accepted:
    """The receiver takes part in the transfer of this bucket."""

    bucket: int
    size: int
    """Bytes that it expects: a broadcast of another size would end its process."""


@dataclass(frozen=True)
class Taken:
    """The receiver has copied this bucket."""

    bucket: int


@dataclass(frozen=True)
class Complete:
    """The receiver has every tensor."""

    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)
    """Where its time went: stopwatch.py."""


@dataclass(frozen=True)
class Stopped:
    """The other side gave up."""

    reason: str


def readable(ends: Sequence[int], timeout: float) -> list[int]:
    """Those of these file descriptors that can be read from, or are closed, as soon as there is one; none: it took
    `timeout` seconds. A tenth of the cost of multiprocessing.connection.wait."""
    poll = select.poll()
    for end in ends:
        poll.register(end, select.POLLIN)
    return [end for end, _ in poll.poll(max(0.0, timeout) * 1000)]


def listen(host: str | None, name: str) -> tuple[socket.socket, Address]:
    """A listening socket and its address: on a free port of an interface, or (no host) on this machine under `name`."""
    if host is None:
        local = socket.socket(socket.AF_UNIX)
        local.bind("\0" + name)
        local.listen()
        return local, "\0" + name
    remote = socket.create_server((host, 0))
    return remote, (host, remote.getsockname()[1])


def accept(listening: socket.socket, authkey: bytes, timeout: float) -> Connection | None:
    """The connection of whoever connected; None when it does not know the key."""
    end = listening.accept()[0]
    _limit(end, min(timeout, HANDSHAKE_SECONDS))
    connection = Connection(os.dup(end.fileno()))
    with end:
        try:
            deliver_challenge(connection, authkey)
            answer_challenge(connection, authkey)
        except Exception:  # a stranger may send anything
            connection.close()
            return None
        _limit(end, timeout)
    return connection


def connect(address: Address, authkey: bytes, timeout: float) -> Connection:
    """A connection to a sender. Raises RefitError when there is none, or it does not know the key."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    end = socket.socket(family)
    try:
        end.settimeout(timeout)
        end.connect(address)
        _limit(end, timeout)
        connection = Connection(end.detach())
        answer_challenge(connection, authkey)
        deliver_challenge(connection, authkey)
    except Exception as error:
        end.close()
        raise RefitError(f"the trainer cannot be reached to fetch weights ({type(error).__name__}: {error})") from error
    return connection


def _limit(end: socket.socket, timeout: float) -> None:
    """From now on, reads and writes that take longer than `timeout` seconds fail."""
    end.setblocking(True)
    limit = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    if end.family == socket.AF_INET:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else every small message waits 40 ms
