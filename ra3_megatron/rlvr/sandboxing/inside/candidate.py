"""The candidate's process of function tests: it executes the code, then does what the runner asks for.

Nothing here is trusted once the code runs: it shares this process. What it can do is to answer wrongly.
"""

from __future__ import annotations

import builtins
import os
import sys

from .channel import Broken, Channel
from .codec import Decoder, Encoder, size

TYPE_CHECKING = False  # importing typing takes longer than most tests
if TYPE_CHECKING:
    from typing import Any, NoReturn

MODULE = "candidate"
FILE = "<program>"


def become_module(name: str) -> dict[str, Any]:
    """A new module of this name in sys.modules: its namespace."""
    module = type(sys)(name)
    sys.modules[name] = module
    return vars(module)


def add_exits() -> None:
    """`exit` and `quit`, which programs use and the module `site` makes: it is not imported, for its time."""

    def leave(code: Any = None) -> NoReturn:
        raise SystemExit(code)

    builtins.exit = builtins.quit = leave  # type: ignore[assignment]


def silence(keep: tuple[int, ...]) -> None:
    """Close every file descriptor but `keep` and stderr; stdin is empty, stdout goes to stderr."""
    empty = os.open("/dev/null", os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(2, 1)
    low = 3
    for descriptor in [*sorted(keep), 65536]:
        os.closerange(low, descriptor)
        low = descriptor + 1


def serve_functions(channel: Channel, code: str) -> None:
    """Execute `code`, say how that went, and answer requests until the runner closes the channel."""
    answers = Answers()
    namespace = become_module(MODULE)
    try:
        exec(compile(code, FILE, "exec", dont_inherit=True), namespace)
    except BaseException as error:
        channel.send(b"X" + answers.failure(error))
        return
    channel.send(b"V" + answers.value(None))
    while True:
        try:
            request = channel.receive()
        except Broken:
            return
        channel.send(answers.to(request, namespace))


class Answers:
    """Answers to requests, and the objects that the runner holds handles of."""

    def __init__(self) -> None:
        self.objects: dict[int, Any] = {}
        self.numbers: dict[int, int] = {}
        self.met = 0

    def to(self, request: bytes, namespace: dict[str, Any]) -> bytes:
        """V and a value with the changed arguments; S when an iterator has ended; X and what was raised."""
        originals: list[Any] = []
        try:
            operation, dropped, *operands = Decoder(request, self.objects.__getitem__, originals, keep=True).decode()
            for number in dropped:
                del self.numbers[id(self.objects[number])]
                del self.objects[number]
            before = [_parts(container) for container in originals]
            if operation == "next":
                try:
                    return b"V" + self.value(next(operands[0]))
                except StopIteration:
                    return b"S"
            if operation == "names":
                result = {name: namespace[name] for name in operands[0] if name in namespace}
            else:
                result = OPERATIONS[operation](*operands)
            changed = [
                position
                for position, (container, parts) in enumerate(zip(originals, before, strict=True))
                if _changed(container, parts)
            ]
            return b"V" + self.value(result, originals, changed)
        except BaseException as error:
            return b"X" + self.failure(error)

    def refer(self, value: Any) -> int:
        """The number of an object that stays here."""
        number = self.numbers.get(id(value))
        if number is None:
            number = self.numbers[id(value)] = self.met
            self.objects[number] = value
            self.met += 1
        return number

    def value(self, value: Any, originals: list[Any] | None = None, changed: list[int] | None = None) -> bytes:
        """A value, and the new contents of the changed containers among the arguments."""
        encoder = Encoder(self.refer, originals or [], keep=False)
        parts = [encoder.encode(value), size(len(changed or ()))]
        for position in changed or ():
            parts += (size(position), encoder.encode_contents(encoder.originals[position]))
        return b"".join(parts)

    def failure(self, error: BaseException) -> bytes:
        """(name of the nearest builtin class of an exception, its text, what to show a reader)."""
        name = next((base.__name__ for base in type(error).__mro__ if base.__module__ == "builtins"), "Exception")
        try:
            text = str(error)[:2000]
        except BaseException:
            text = ""
        line, trace = None, error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == FILE:
                line = trace.tb_lineno
            trace = trace.tb_next
        if isinstance(error, SyntaxError):
            line = error.lineno
        where = "" if line is None else f" (line {line} of the program)"
        return Encoder(self.refer, [], keep=False).encode((name, text, f"{type(error).__name__}: {text}{where}"))


def _call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def _set_item(container: Any, key: Any, value: Any) -> None:
    container[key] = value


OPERATIONS: dict[str, Any] = {
    "call": _call,
    "get": getattr,
    "set": setattr,
    "item": lambda container, key: container[key],
    "set item": _set_item,
    "iter": lambda iterable: Iterated(iter(iterable)),
    "len": len,
    "truth": bool,
    "str": lambda value: _exact(str(value)),
    "repr": lambda value: _exact(repr(value)),
}


class Iterated:
    """An iterator that stays here, whatever it iterates over."""

    def __init__(self, iterator: Any) -> None:
        self.iterator = iterator

    def __next__(self) -> Any:
        return next(self.iterator)


def _exact(text: str) -> str:
    return text if type(text) is str else str.__str__(text)


def _parts(container: Any) -> Any:
    """What a container holds, to see later whether it is the same."""
    if isinstance(container, bytearray):
        return bytes(container)
    return [*container.keys(), *container.values()] if isinstance(container, dict) else list(container)


def _changed(container: Any, parts: Any) -> bool:
    now = _parts(container)
    if len(now) != len(parts):
        return True
    if isinstance(now, bytes):
        return bool(now != parts)
    return any(new is not old for new, old in zip(now, parts, strict=True))
