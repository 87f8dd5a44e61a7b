"""Python values as bytes between the runner and the candidate's process, decoded without pickle or eval.

By value go exact types only: a subclass could bring its own `__eq__`. What cannot go by value goes as the number of a
handle. A mutable container that the runner sent keeps its identity: the other side refers to it by its position.

A node is one byte of a tag and what the tag asks for; sizes and counts are 4 bytes, little-endian. Decoding never
trusts them: it raises Malformed for what is cut off, too deep (MAX_DEPTH), too many (MAX_NODES) or of an unknown tag.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # importing typing takes longer than most tests
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

MAX_DEPTH = 100
MAX_NODES = 2_000_000
MAX_BYTES = 32 * 2**20
MAX_TEXT = MAX_BYTES - 2**16
"""Bytes of the largest input or output of a whole program: other things stand beside it."""


class Malformed(Exception):
    """Bytes that no encoder of ours wrote."""


class Unsendable(Exception):
    """A value that is too deep or too large to be sent."""


BUILTIN_TYPES: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        bytearray,
        list,
        tuple,
        dict,
        set,
        frozenset,
        range,
        object,
        type,
    )
}
"""Types that travel by their name."""

FROM_MODULES = {
    b"q": ("collections", "deque"),
    b"C": ("collections", "Counter"),
    b"E": ("collections", "defaultdict"),
    b"O": ("collections", "OrderedDict"),
    b"D": ("decimal", "Decimal"),
    b"Q": ("fractions", "Fraction"),
    b"1": ("datetime", "date"),
    b"2": ("datetime", "datetime"),
    b"3": ("datetime", "time"),
    b"4": ("datetime", "timedelta"),
}
"""Tag -> module and name of a type of the standard library that travels by value."""

_TAGS = {place: tag for tag, place in FROM_MODULES.items()}
_PARTS = {
    b"Q": ("numerator", "denominator"),
    b"1": ("year", "month", "day"),
    b"2": ("year", "month", "day", "hour", "minute", "second", "microsecond"),
    b"3": ("hour", "minute", "second", "microsecond"),
    b"4": ("days", "seconds", "microseconds"),
}
"""Attributes that make up a value, in the order in which its type takes them."""
_CONTAINERS: dict[Any, bytes] = {list: b"l", tuple: b"t", set: b"S", frozenset: b"Z", dict: b"d", bytearray: b"a"}
_MUTABLE = (b"l", b"S", b"d", b"q", b"C", b"E", b"O", b"a")


def size(number: int) -> bytes:
    """A size or a count."""
    return number.to_bytes(4, "little")


class Encoder:
    """Encodes values of one message.

    refer: the number of the handle for an object that cannot go by value; it may raise Unsendable.
    originals: containers whose identity both sides know, in the order of their positions. With `keep`, every mutable
    container that is met is added.
    """

    def __init__(self, refer: Callable[[Any], int], originals: list[Any], keep: bool) -> None:
        self.refer = refer
        self.originals = originals
        self.keep = keep
        self.positions = {id(container): position for position, container in enumerate(originals)}
        self.nodes = 0

    def encode(self, value: Any) -> bytes:
        """The bytes of a value. Raises Unsendable."""
        parts: list[bytes] = []
        self._put(value, parts, 0)
        return self._joined(parts)

    def encode_contents(self, container: Any) -> bytes:
        """The bytes of a container whose identity is known, written out once more."""
        parts: list[bytes] = []
        self._put(container, parts, 0, contents=True)
        return self._joined(parts)

    def _joined(self, parts: list[bytes]) -> bytes:
        data = b"".join(parts)
        if len(data) > MAX_BYTES:
            raise Unsendable(f"a value of more than {MAX_BYTES // 2**20} MiB")
        return data

    def _put(self, value: Any, parts: list[bytes], depth: int, contents: bool = False) -> None:
        self.nodes += 1
        if depth > MAX_DEPTH:
            raise Unsendable(f"a value nested more than {MAX_DEPTH} deep")
        if self.nodes > MAX_NODES:
            raise Unsendable(f"a value of more than {MAX_NODES} parts")
        kind: Any = type(value)
        if value is None:
            parts.append(b"N")
        elif kind is bool:
            parts.append(b"T" if value else b"F")
        elif kind is int:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            parts += (b"i", size(len(data)), data)
        elif kind is float:
            self._text(b"f", repr(value), parts)
        elif kind is str:
            self._text(b"s", value, parts)
        elif kind is complex:
            self._text(b"c", f"{value.real!r} {value.imag!r}", parts)
        elif kind is bytes:
            parts += (b"b", size(len(value)), value)
        elif kind is range:
            parts.append(b"r")
            for part in (value.start, value.stop, value.step):
                self._put(part, parts, depth + 1)
        elif value is Ellipsis:
            parts.append(b".")
        elif kind is type and value in BUILTIN_TYPES.values():
            self._text(b"y", value.__name__, parts)
        else:
            self._put_container(value, kind, parts, depth, contents)

    def _put_container(self, value: Any, kind: Any, parts: list[bytes], depth: int, contents: bool) -> None:
        tag = _CONTAINERS.get(kind) or _tag_from_modules(kind)
        if not contents and (position := self.positions.get(id(value))) is not None:
            parts += (b"o", size(position))
            return
        if tag is not None and tag in _MUTABLE and self.keep:
            self.positions[id(value)] = len(self.originals)
            self.originals.append(value)
        if tag == b"a":
            parts += (b"a", size(len(value)), bytes(value))
        elif tag == b"D":
            self._text(b"D", str(value), parts)
        elif tag in _PARTS and getattr(value, "tzinfo", None) is None:
            parts.append(tag)
            for name in _PARTS[tag]:
                self._put(getattr(value, name), parts, depth + 1)
        elif tag in (b"d", b"C", b"E", b"O"):
            parts.append(tag)
            if tag == b"E":
                self._put(self._factory(value.default_factory), parts, depth + 1)
            parts.append(size(len(value)))
            for key, item in list(value.items()):
                self._put(key, parts, depth + 1)
                self._put(item, parts, depth + 1)
        elif tag in (b"l", b"t", b"S", b"Z", b"q"):
            if tag == b"q":
                parts.append(tag)
                self._put(value.maxlen, parts, depth + 1)
            else:
                parts.append(tag)
            items = list(value)
            parts.append(size(len(items)))
            for item in items:
                self._put(item, parts, depth + 1)
        elif kind.__bases__ == (tuple,) and _is_named_tuple(kind):
            parts.append(b"n")
            self._put(kind.__name__, parts, depth + 1)
            self._put(tuple(kind._fields), parts, depth + 1)
            self._put(tuple(value), parts, depth + 1)
        else:
            parts += (b"h", size(self.refer(value)))

    def _factory(self, factory: Any) -> Any:
        if factory is None or BUILTIN_TYPES.get(getattr(factory, "__name__", "")) is factory:
            return factory
        if self.keep:
            raise Unsendable("a defaultdict whose factory is no builtin type")
        return None  # of a result: what is missing is not asked for

    def _text(self, tag: bytes, text: str, parts: list[bytes]) -> None:
        data = text.encode("utf-8", "surrogatepass")
        parts += (tag, size(len(data)), data)


def _tag_from_modules(kind: Any) -> bytes | None:
    """The tag of a type of the standard library, if it is that very type."""
    tag = _TAGS.get((kind.__module__, kind.__name__))
    if tag is None:
        return None
    module = sys.modules.get(kind.__module__)
    return tag if getattr(module, kind.__name__, None) is kind else None


def _is_named_tuple(kind: Any) -> bool:
    fields = getattr(kind, "_fields", None)
    return type(fields) is tuple and all(type(name) is str for name in fields)


class Decoder:
    """Decodes one message.

    resolve: what a handle's number stands for. originals: as in Encoder; with `keep`, every mutable container is added
    in the order in which Encoder adds them.
    """

    def __init__(self, data: bytes, resolve: Callable[[int], Any], originals: list[Any], keep: bool) -> None:
        self.data = data
        self.at = 0
        self.resolve = resolve
        self.originals = originals
        self.keep = keep
        self.nodes = 0

    def decode(self, depth: int = 0) -> Any:
        """The next value. Raises Malformed."""
        self.nodes += 1
        if depth > MAX_DEPTH + 1 or self.nodes > MAX_NODES + 1:
            raise Malformed("too deep or too many parts")
        tag = self._bytes(1)
        if tag in _PLAIN:
            return _PLAIN[tag]
        if tag == b"i":
            return int.from_bytes(self._sized(), "little", signed=True)
        if tag in (b"s", b"f", b"c", b"D", b"y"):
            return self._from_text(tag, self._text())
        if tag == b"b":
            return self._sized()
        if tag == b"r":
            start, stop, step = (self._int(depth) for _ in range(3))
            if step == 0:
                raise Malformed("a range of step 0")
            return range(start, stop, step)
        if tag == b"h":
            return self.resolve(self._count())
        if tag == b"o":
            position = self._count()
            if position >= len(self.originals):
                raise Malformed("a container that was never sent")
            return self.originals[position]
        return self._container(tag, depth)

    def _container(self, tag: bytes, depth: int) -> Any:
        if tag == b"a":
            return self._kept(bytearray(self._sized()))
        try:
            if tag in _PARTS:
                return _type(tag)(*(self._int(depth) for _ in _PARTS[tag]))
            if tag == b"n":
                return self._named_tuple(depth)
            if tag in (b"d", b"C", b"E", b"O"):
                mapping = self._kept({} if tag == b"d" else _type(tag)())
                if tag == b"E":
                    mapping.default_factory = self.decode(depth + 1)
                for _ in range(self._count()):
                    key = self.decode(depth + 1)
                    mapping[key] = self.decode(depth + 1)
                return mapping
            if tag in (b"t", b"Z"):
                items = [self.decode(depth + 1) for _ in range(self._count())]
                return tuple(items) if tag == b"t" else frozenset(items)
            if tag == b"l":
                return self._fill(self._kept([]), list.append, depth)
            if tag == b"S":
                return self._fill(self._kept(set()), set.add, depth)
            if tag == b"q":
                limit = self.decode(depth + 1)
                return self._fill(self._kept(_type(tag)((), limit)), _type(tag).append, depth)
        except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            raise Malformed(str(error)) from None
        raise Malformed(f"no value begins with {tag!r}")

    def _kept(self, container: Any) -> Any:
        if self.keep:
            self.originals.append(container)
        return container

    def _fill(self, container: Any, add: Callable[[Any, Any], None], depth: int) -> Any:
        for _ in range(self._count()):
            add(container, self.decode(depth + 1))
        return container

    def _named_tuple(self, depth: int) -> Any:
        name, fields, values = (self.decode(depth + 1) for _ in range(3))
        if type(name) is not str or type(fields) is not tuple or type(values) is not tuple or len(fields) > 256:
            raise Malformed("a named tuple of other parts")
        if len(fields) != len(values) or not all(type(field) is str for field in fields):
            raise Malformed("a named tuple whose fields and values differ")
        from collections import namedtuple

        return namedtuple(name, fields)(*values)

    def _from_text(self, tag: bytes, text: str) -> Any:
        try:
            if tag == b"f":
                return float(text)
            if tag == b"c":
                real, imaginary = text.split(" ")
                return complex(float(real), float(imaginary))
            if tag == b"D":
                return _type(tag)(text)
            if tag == b"y":
                return BUILTIN_TYPES[text]
        except (ValueError, ArithmeticError, KeyError) as error:
            raise Malformed(str(error)) from None
        return text

    def _int(self, depth: int) -> int:
        number = self.decode(depth + 1)
        if type(number) is not int:
            raise Malformed("something else in the place of an int")
        return number

    def _text(self) -> str:
        try:
            return self._sized().decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise Malformed("text that is not UTF-8") from None

    def _count(self) -> int:
        return int.from_bytes(self._bytes(4), "little")

    def _sized(self) -> bytes:
        return self._bytes(self._count())

    def _bytes(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise Malformed("cut off")
        piece = self.data[self.at : end]
        self.at = end
        return piece


_PLAIN: dict[bytes, Any] = {b"N": None, b"T": True, b"F": False, b".": Ellipsis}


def _type(tag: bytes) -> Any:
    module, name = FROM_MODULES[tag]
    return getattr(__import__(module), name)


def no_handle(_: Any) -> NoReturn:
    """For messages that hold plain values only."""
    raise Malformed("a handle where none may be")
