"""The runner's side of the candidate's process: requests, and handles of objects that stay there.

A handle never lets the candidate decide whether a test passes by comparing: it is equal to itself only, it has no order
and no arithmetic, so what a test expects is never shown to the candidate. What the test itself passes to the
candidate's functions and methods is.
"""

from __future__ import annotations

import builtins

from .channel import Broken, Channel
from .codec import Decoder, Encoder, Malformed, Unsendable

TYPE_CHECKING = False  # importing typing takes longer than most tests
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

EXCEPTIONS = {
    name: kind for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception)
}
"""What the candidate can make a test see as raised; SystemExit and its like arrive as ProgramEnded."""


MOST_DROPPED = 1000
"""Objects of the candidate that one request lets go of."""


class ProgramEnded(Exception):
    """The program called exit, or raised what is no Exception, when a test called it."""


class Remote:
    """Requests to the candidate's process."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.broken: str | None = None
        """Why the process answers no more."""
        self.held: dict[int, int] = {}
        """How many handles there are of each object."""
        self.let_go: list[int] = []
        """Numbers whose handles may all be gone."""

    def load(self, code: str) -> None:
        """Send the code. Raises what it raised; Broken when it ended."""
        self._send(Encoder(_number, [], keep=False).encode(code))
        self._answer([])

    def request(self, operation: str, *operands: Any) -> Any:
        """What the operation gives; changed arguments are changed here too. Raises what it raised; Broken."""
        if self.broken is not None:
            raise Broken(self.broken)
        originals: list[Any] = []
        asked = self.let_go[:MOST_DROPPED]
        dropped = tuple({number for number in asked if not self.held.get(number, 1)})
        try:
            message = Encoder(_number, originals, keep=True).encode((operation, dropped, *operands))
        except Unsendable as error:
            raise TypeError(f"the sandbox cannot pass this to the program: {error}") from None
        del self.let_go[: len(asked)]
        for number in dropped:
            del self.held[number]
        self._send(message)
        try:
            return self._answer(originals)
        except StopIteration as error:
            if operation == "next":
                raise
            # a test that maps over cases would take it for the end of them
            raise ProgramEnded("the program raised StopIteration") from error

    def _send(self, message: bytes) -> None:
        try:
            self.channel.send(message)
        except Broken as error:
            self.broken = str(error)
            raise

    def _answer(self, originals: list[Any]) -> Any:
        try:
            message = self.channel.receive()
            decoder = Decoder(message[1:], self._handle, originals, keep=False)
            kind = message[:1]
            if kind == b"V":
                result = decoder.decode()
                changes = [(decoder._count(), decoder.decode()) for _ in range(decoder._count())]
                for position, contents in changes:
                    _write_back(originals[position], contents)
                return result
            if kind == b"X":
                told = decoder.decode()
                if type(told) is not tuple or [type(part) for part in told] != [str, str, str]:
                    raise Malformed("an exception of other parts")
            elif kind != b"S":
                raise Malformed(f"no answer begins with {kind!r}")
        except Broken as error:
            self.broken = str(error)
            raise
        except (Malformed, ValueError, TypeError, IndexError, RecursionError) as error:
            self.broken = f"the program has written into the channel of its results ({error})"
            raise Broken(self.broken) from None
        if kind == b"S":
            raise StopIteration
        raise self._raised(*told)

    def _raised(self, name: str, text: str, shown: str) -> Exception:
        error: Exception = ProgramEnded(text)
        for kind in EXCEPTIONS.get(name, ProgramEnded).__mro__:
            try:
                error = kind(text)
                break
            except TypeError:  # UnicodeDecodeError takes five arguments
                continue
        error.__shown__ = shown  # type: ignore[attr-defined]
        return error

    def _handle(self, number: int) -> Handle:
        return Handle(self, number)


class Handle:
    """An object of the candidate."""

    __slots__ = ("_handle_number", "_handle_remote")

    def __init__(self, remote: Remote, number: int) -> None:
        object.__setattr__(self, "_handle_remote", remote)
        object.__setattr__(self, "_handle_number", number)
        remote.held[number] = remote.held.get(number, 0) + 1

    def __del__(self) -> None:
        remote, number = self._handle_remote, self._handle_number
        remote.held[number] -= 1
        if not remote.held[number]:
            remote.let_go.append(number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._handle_remote.request("call", self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._handle_remote.request("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._handle_remote.request("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._handle_remote.request("item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._handle_remote.request("set item", self, key, value)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._handle_remote.request("iter", self)
        while True:
            try:
                value = self._handle_remote.request("next", iterator)
            except StopIteration:
                return
            yield value

    def __next__(self) -> Any:
        return self._handle_remote.request("next", self)

    def __len__(self) -> int:
        return _checked(self._handle_remote.request("len", self), int)

    def __bool__(self) -> bool:
        return _checked(self._handle_remote.request("truth", self), bool)

    def __str__(self) -> str:
        return _checked(self._handle_remote.request("str", self), str)

    def __repr__(self) -> str:
        return _checked(self._handle_remote.request("repr", self), str)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def _number(value: Any) -> int:
    if type(value) is Handle:
        return value._handle_number
    raise Unsendable(f"an object of type {type(value).__name__}")


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"the program gave something else than {kind.__name__}")
    return value


def _write_back(container: Any, contents: Any) -> None:
    """Give a container of the test the contents that the candidate left in its copy."""
    if type(container) is not type(contents):
        raise Malformed("an argument that has changed its type")
    if isinstance(container, list | bytearray):
        container[:] = contents
        return
    container.clear()
    if isinstance(container, dict | set):
        container.update(contents)
    else:
        container.extend(contents)
