"""Tests of functions: assertions that run in the runner and call the candidate through handles."""

from __future__ import annotations

import builtins
import sys

from .channel import Broken
from .clock import CpuClock
from .remote import Remote

TYPE_CHECKING = False  # importing typing takes longer than most tests
if TYPE_CHECKING:
    from typing import Any

SHOWN = 500
"""Characters of a failure that are reported."""
ONLY_AST = 0x400
"""ast.PyCF_ONLY_AST: importing ast takes longer than most tests."""


class Failure(Exception):
    """Why a test failed: its kind (wrong, raised, memory, cpu, ended) and what to show a reader."""

    def __init__(self, kind: str, detail: str) -> None:
        self.kind = kind
        self.detail = detail[-SHOWN:]


def failure_of(error: BaseException, where: str) -> Failure:
    """The failure that an exception in the code of a test means."""
    shown = getattr(error, "__shown__", None)
    if isinstance(error, Broken):
        return Failure("ended", str(error))
    if isinstance(error, MemoryError):
        return Failure("memory", shown or "MemoryError")
    if shown is not None:
        return Failure("raised", f"{shown} in {where}")
    kind = "wrong" if isinstance(error, AssertionError) else "raised"
    try:
        said = f"{type(error).__name__}: {error}"
    except Broken as broken:
        return Failure("ended", str(broken))
    except Exception:  # a message made of what the program returned, which need not have a text
        said = type(error).__name__
    return Failure(kind, f"{said} in {where}")


class FunctionRunner:
    """Runs the tests one by one. entry_points: names that the candidate defines; none: what is left undefined."""

    def __init__(
        self, remote: Remote, clock: CpuClock, setup: str, tests: tuple[str, ...], entry_points: tuple[str, ...]
    ) -> None:
        self.remote = remote
        self.clock = clock
        self.setup = setup
        self.tests = tests
        self.entry_points = entry_points
        self.namespace: dict[str, Any] = {"__name__": "tests"}

    def prepare(self, code: str) -> None:
        """Load the candidate and the setup, in the time of one test. Raises Failure."""
        self.clock.begin()
        try:
            self.remote.load(code)
        except BaseException as error:
            raise self._failure(error, "loading the program") from None
        try:
            compiled = compile(self.setup, "<setup>", "exec", dont_inherit=True)
            undefined, modules = names_used([self.setup, *self.tests], modules_only=bool(self.entry_points))
            self.namespace.update(_imported([name for name in modules if name not in self.entry_points]))
            names = list(self.entry_points) or undefined
            found = self.remote.request("names", names)
            found = {name: found[name] for name in names if name in found}
            self.namespace.update(found)
            exec(compiled, self.namespace)
            self.namespace.update({name: found[name] for name in self.entry_points if name in found})
        except BaseException as error:
            raise self._failure(error, "the setup of the tests") from None
        if self.clock.over():
            raise self._failure(Broken(), "the setup of the tests")

    def run(self, number: int) -> None:
        """Run one test. Raises Failure."""
        test = self.tests[number]
        where = f"test {number + 1}: {' '.join(test.split())[:200]}"
        self.clock.begin()
        try:
            exec(compile(test, "<test>", "exec", dont_inherit=True), self.namespace)
        except BaseException as error:
            raise self._failure(error, where) from None
        if self.clock.over() or self.remote.broken is not None:
            raise self._failure(Broken(self.remote.broken), where)

    def _failure(self, error: BaseException, where: str) -> Failure:
        """Why a test failed: for its time, whatever came of that, or for what was raised."""
        failure = failure_of(error, where)  # its text may be the program's, which computes it
        return Failure("cpu", f"{self.clock.told} in {where}") if self.clock.over() else failure


def _imported(names: list[str]) -> dict[str, Any]:
    """Modules by name. One that this system lacks is not there: a test may have a variable of its name."""
    found = {}
    for name in names:
        try:
            found[name] = __import__(name)
        except ImportError:
            continue
    return found


def names_used(sources: list[str], modules_only: bool) -> tuple[list[str], list[str]]:
    """Names that the sources use and Python does not define, and modules of the standard library among them.

    modules_only: the names are not asked for; a source without the name of a module need not be parsed then.
    A module never comes from the candidate: `math.isclose(result, 3)` would show it what is expected.
    """
    names: dict[str, None] = {}
    with_attributes: set[str] = set()
    for source in sources:  # one tree at a time: they take many times the memory of their sources
        if modules_only and not _may_name_a_module(source):
            continue
        waiting: list[Any] = [compile(source, "<tests>", "exec", ONLY_AST)]
        while waiting:
            node = waiting.pop()
            kind = type(node).__name__
            if kind == "Name":
                names[node.id] = None
            if kind == "Attribute" and type(node.value).__name__ == "Name":
                with_attributes.add(node.value.id)
            for field in node._fields:
                value = getattr(node, field, None)
                parts = value if isinstance(value, list) else [value]
                waiting += [part for part in parts if hasattr(part, "_fields")]
    modules = [name for name in names if name in with_attributes and name in sys.stdlib_module_names]
    return [name for name in names if not hasattr(builtins, name) and name not in modules], modules


_WORDS = bytes(byte if chr(byte).isalnum() or byte == 95 else 32 for byte in range(128)) + bytes([32] * 128)
"""Keeps the letters of names, for bytes.translate."""


def _may_name_a_module(source: str) -> bool:
    """False: no name in it is one of a module. Other letters than ASCII's may become some (NFKC)."""
    if not source.isascii():
        return True
    words = set(source.encode().translate(_WORDS).split())
    return any(name.encode() in words for name in sys.stdlib_module_names)
