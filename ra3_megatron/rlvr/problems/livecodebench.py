"""LiveCodeBench (`code_generation_lite`): rows of the published schema, their tests, and programs to grade.

Private tests are published as base64 of zlib of a pickle of JSON text. The pickle is read by an unpickler that can make
texts, numbers, lists and dictionaries and nothing else, and at most `LARGEST` bytes are unpacked.
"""

import base64
import binascii
import datetime
import io
import json
import pickle
import zlib
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.rlvr.problems import values
from ra3_megatron.rlvr.problems.room import with_room
from ra3_megatron.rlvr.sandbox import FunctionTests, Limits, Program, StdinTests

LARGEST = 512 * 2**20
"""Bytes of one task's private tests."""
SECONDS = 6.0
"""A test, as in LiveCodeBench."""
STARTING = 10.0

MODULES = (
    *(
        "string",
        "re",
        "datetime",
        "collections",
        "heapq",
        "bisect",
        "copy",
        "math",
        "random",
        "statistics",
        "itertools",
    ),
    *("functools", "operator", "io", "sys", "json", "builtins", "typing"),
)
PRELUDE = "".join(f"from {name} import *\n" for name in MODULES) + (
    f"import {', '.join(MODULES)}\nsys.setrecursionlimit(50000)\n"
)
"""What LiveCodeBench imports before a program: starter codes use `List` without an import."""

STOPS = ("###",)
"""A section of the prompt's form begins, as LiveCodeBench's runner for base models has it."""

_SETUP = (
    values.SETUP
    + """
def _same(found, wanted):
    return (list(found) if isinstance(found, tuple) else found) == wanted
"""
)
_CHECKER = """
from decimal import Decimal, InvalidOperation

def check(input, expected, output):
    wanted, found = ([line.strip() for line in text.strip().split("\\n")] for text in (expected, output))
    return len(wanted) == len(found) and all(map(_same, wanted, found))

def _same(wanted, found):
    if wanted == found:
        return True
    try:
        return [Decimal(word) for word in wanted.split()] == [Decimal(word) for word in found.split()]
    except InvalidOperation:
        return False
"""
"""As LiveCodeBench compares: results as they are, but for a tuple around them; lines of an output as text, or as exact
decimals."""


class _PlainUnpickler(pickle.Unpickler):
    """Makes values of builtin types; a pickle that names anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, and only texts, numbers, lists and dictionaries are read"
        )

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it holds a reference to something outside of it")


def decode_tests(text: str) -> list[dict[str, Any]]:
    """Tests as JSON, or packed as upstream packs private ones. Raises ValueError when they are neither."""
    try:
        found = json.loads(text)
    except ValueError:
        found = json.loads(_unpacked(text))
    if not isinstance(found, list) or not all(_is_test(row) for row in found):
        raise ValueError("tests must be objects with input, output and testtype")
    return found


def _is_test(row: Any) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("input", "output", "testtype"))


def _unpacked(text: str) -> str:
    try:
        packed = base64.b64decode(text.encode(), validate=True)
        engine = zlib.decompressobj()
        raw = engine.decompress(packed, LARGEST)
        if engine.unconsumed_tail:
            raise ValueError(f"more than {LARGEST} bytes")
        value = _PlainUnpickler(io.BytesIO(raw)).load()
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"not base64 of zlib of a pickled text ({error})") from error
    if not isinstance(value, str):
        raise ValueError(f"the pickle holds a {type(value).__name__}, not a text")
    return value


def choose(
    rows: list[dict[str, Any]], window: tuple[str | None, str | None]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of contests between two days, both included, and how many were left out."""
    days = [None if day is None else _day(day, "--since or --until") for day in window]
    kept = []
    for row in rows:
        day = _day(str(row.get("contest_date", ""))[:10], f"{row.get('question_id')}: contest_date")
        if (days[0] is None or day >= days[0]) and (days[1] is None or day <= days[1]):
            kept.append(row)
    if not kept:
        raise UserError(f"livecodebench: no contest from {window[0]} to {window[1]}")
    return kept, {"outside of the window of contest dates": len(rows) - len(kept)}


def _day(text: str, name: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise UserError(f"{name}={text}: must be a day such as 2024-08-01") from error


def prompt(row: dict[str, Any]) -> str:
    """The sections of LiveCodeBench's template for base models."""
    starter = f"### Starter Code\n{row['starter_code']}\n\n" if row.get("starter_code") else ""
    return f"### Question\n{row['question_content']}\n\n{starter}### Answer\n\n"


def program(row: dict[str, Any], code: str) -> Program:
    """What is graded. Raises UserError when the row's tests cannot be read."""
    name = row.get("question_id")
    try:
        tests = [test for key in ("public_test_cases", "private_test_cases") for test in decode_tests(row[key])]
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(f"livecodebench, {name}: tests cannot be read: {error}") from error
    kinds = {test["testtype"] for test in tests}
    try:
        if kinds == {"stdin"}:
            cases = tuple((test["input"], test["output"]) for test in tests)
            return Program(PRELUDE + code, StdinTests(cases, checker=_CHECKER))
        if kinds != {"functional"}:
            raise UserError(f"tests of kind {', '.join(sorted(kinds)) or 'none'} are not graded")
        function = json.loads(row["metadata"])["func_name"]
        if not function.isidentifier():
            raise ValueError(f"func_name {function!r}")
        setup = f"{_SETUP}\n_method = Solution().{function} if 'Solution' in globals() else {function}\n"
        return Program(PRELUDE + code, FunctionTests(setup, tuple(map(_call, tests)), ("Solution", function)))
    except UserError as error:
        raise UserError(f"livecodebench, {name}: {error}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"livecodebench, {name}: a functional task needs func_name and JSON tests ({error})") from error


def _call(test: dict[str, str]) -> str:
    """An assertion: arguments are JSON, one a line. All tests call the method of one object, or else a function."""
    arguments = [json.loads(line) for line in test["input"].split("\n") if line.strip()]
    wanted = values.source_of(json.loads(test["output"]))
    return f"assert _same(_method(*{values.source_of(arguments)}), {wanted})"


def limits(row: dict[str, Any]) -> Limits:
    """For all tests of a program together; CPU time is that of one, as in LiveCodeBench."""
    tests = [test for key in ("public_test_cases", "private_test_cases") for test in decode_tests(row[key])]
    found = Limits(seconds=STARTING + SECONDS * len(tests), cpu_seconds=SECONDS, memory_mib=1024, output_kib=4096)
    return with_room(found, ((test["input"], test["output"]) for test in tests))
