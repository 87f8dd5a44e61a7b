"""Values as bytes: every value comes back, and no bytes do harm."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ra3_megatron.rlvr.sandboxing.inside import codec
from ra3_megatron.rlvr.sandboxing.inside.codec import Decoder, Encoder, Malformed, Unsendable, no_handle

PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text(st.characters())
    | st.binary()
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.dates()
    | st.datetimes()
    | st.times()
    | st.timedeltas()
    | st.just(...)
    | st.sampled_from([int, str, list, object])
    | st.builds(range, st.integers(), st.integers(), st.integers().filter(bool))
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(PLAIN, inner)
        | st.sets(PLAIN)
        | st.frozensets(PLAIN)
        | st.binary().map(bytearray)
    ),
    max_leaves=30,
)


def there_and_back(value: Any, keep: bool = True) -> Any:
    data = Encoder(no_handle, [], keep).encode(value)
    decoder = Decoder(data, no_handle, [], keep)
    result = decoder.decode()
    assert decoder.at == len(data)
    return result


def kinds(value: Any) -> Any:
    """The types inside a value, in its shape."""
    if isinstance(value, list | tuple):
        return type(value), [kinds(item) for item in value]
    if isinstance(value, dict):
        return dict, [(kinds(key), kinds(item)) for key, item in value.items()]
    return type(value)


@given(VALUES)
def test_values_come_back(value: Any) -> None:
    assert there_and_back(value) == value and kinds(there_and_back(value, keep=False)) == kinds(value)


def test_what_equality_does_not_tell() -> None:
    assert math.isnan(there_and_back(float("nan"))) and math.copysign(1, there_and_back(-0.0)) == -1
    assert there_and_back("\ud800") == "\ud800" and there_and_back(10**9999) == 10**9999
    shared: list[Any] = []
    shared += [shared, [1]]
    result = there_and_back(shared)
    assert result[0] is result and result[1] == [1]


def test_subclasses_do_not_go_by_value() -> None:
    """Whatever has a class of its own becomes a handle."""

    class Int(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    numbers = []
    encoder = Encoder(lambda value: numbers.append(value) or 7, [], keep=False)  # type: ignore[func-returns-value]
    values = [
        Int(3),
        type("Str", (str,), {})(),
        type("List", (list,), {})(),
        type("Dict", (dict,), {})(),
        object(),
        len,
    ]
    data = encoder.encode(values)
    assert numbers == values and Decoder(data, lambda number: ("handle", number), [], keep=False).decode() == [
        ("handle", 7)
    ] * len(values)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_value_or_malformed(data: bytes) -> None:
    with contextlib.suppress(Malformed):
        Decoder(data, no_handle, [], keep=False).decode()


@given(VALUES, st.data())
def test_damaged_bytes_are_a_value_or_malformed(value: Any, data: st.DataObject) -> None:
    message = bytearray(Encoder(no_handle, [], keep=False).encode(value))
    message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(Malformed):
        Decoder(bytes(message), no_handle, [], keep=False).decode()


@given(VALUES, st.data())
def test_what_is_cut_off_is_malformed(value: Any, data: st.DataObject) -> None:
    message = Encoder(no_handle, [], keep=False).encode(value)
    with pytest.raises(Malformed):
        Decoder(message[: data.draw(st.integers(0, len(message) - 1))], no_handle, [], keep=False).decode()


def test_depth_and_size_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    deep: list[Any] = []
    for _ in range(codec.MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(Unsendable, match="deep"):
        Encoder(no_handle, [], keep=False).encode(deep)
    with pytest.raises(Malformed):
        Decoder(b"l\1\0\0\0" * 5000 + b"N", no_handle, [], keep=False).decode()
    assert there_and_back(deep[0]) == deep[0]
    monkeypatch.setattr(codec, "MAX_NODES", 100)
    with pytest.raises(Unsendable, match="parts"):
        Encoder(no_handle, [], keep=False).encode([0] * 101)
    monkeypatch.setattr(codec, "MAX_BYTES", 100)
    with pytest.raises(Unsendable, match="MiB"):
        Encoder(no_handle, [], keep=False).encode("x" * 101)
