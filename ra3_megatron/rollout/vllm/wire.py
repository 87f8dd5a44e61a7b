"""TCP as two machines that wait for each other need it."""

import os
import socket
import struct
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

IDLE_SECONDS, INTERVAL_SECONDS, PROBES = 20, 10, 4
"""A machine that answers nothing for about a minute is taken for lost."""


def connect(address: str | tuple[str, int], authkey: bytes, seconds: float) -> Connection:
    """A tuned connection to a Listener: path of a unix socket, or host and port.

    Raises OSError when nobody is there or a step takes longer than `seconds`, EOFError or AuthenticationError when
    whoever is there does not know the key.
    """
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as end:
        end.settimeout(seconds)
        end.connect(address)
        end.setblocking(True)
        connection = Connection(end.detach())
    try:
        limit(connection, seconds)
        answer_challenge(connection, authkey)
        deliver_challenge(connection, authkey)
        limit(connection, 0.0)
        tune(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def tune(connection: Connection) -> None:
    """Send small messages at once, and find out when the other machine is lost: reads and writes fail then (OSError).

    Does nothing to a unix socket.
    """
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        if end.family != socket.AF_INET:
            return
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else every small message waits 40 ms
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_SECONDS)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL_SECONDS)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
        patience = (IDLE_SECONDS + PROBES * INTERVAL_SECONDS) * 1000
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)  # of what was sent and not acknowledged


def limit(connection: Connection, seconds: float) -> None:
    """From now on, reads and writes that take longer fail with OSError. 0: none does."""
    value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def own_address(connection: Connection) -> str:
    """This machine's address as the other end of a TCP connection reaches it."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        return str(end.getsockname()[0])
