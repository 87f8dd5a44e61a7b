"""Real Python code for the tests of this room: functions and classes of a few standard-library modules."""

import ast
import importlib
import inspect
from functools import cache

MODULES = ("ast", "collections", "dataclasses", "fractions", "inspect", "string", "textwrap", "tokenize")

AWKWARD = (
    "x = 1",
    "\n\n  \nx = 1\n\n\n",
    "def f():\n\tif x:\n\t\treturn 1\n\treturn 2\n",
    'def f():\n    """Text.\n\n    # not a comment\n    """\n    return 1\n',
    "total = a + \\\n    b + \\\n    c\n",
    "if x: pass\nelse:\n    y = [\n        1,\n\n        # inside\n        2,\n    ]\n",
    "@decorator\n@other(1,\n       2)\nclass A:\n    pass\n",
    "s = '# no comment'  # a comment\nt = '''a\n# b\\\n# c'''\n",
    "a = 1\r\nb = '''x\r\n# y'''\r\nif a:\r\n    # c\r\n    b = 2\r\n",
    "a = 1\rb = 2\rif a:\r    c = 3\nd = 4\n",
    "\x0cclass A:\n    x = 1\n\x0c\n    y = 2\n\x0c\nz = 3\n",
    "# top\n\n# again\nx = 1\n# last",
    "s = f'{x!r:>{width}} # {y}'\nt = f'''\n# {\n  x\n}\n'''\nu = 1\n",
    "π = 'ü\u2028\u2581\u3000😀\u2581\u2581'\nx = 'a\x85b'\n",
    "x = 1  \n    \ny = 2\t\n",
    "async def f(x: int = 3, /, *, y) -> None:\n    async with x as z, y:\n        await z\n",
    "x = (  # why\n    # because\n    1  # one\n)\n",
    "try:\n    x\nexcept* E:\n    pass\nfinally: y\n",
)


@cache
def modules() -> tuple[str, ...]:
    """Whole modules."""
    return tuple(inspect.getsource(importlib.import_module(name)) for name in MODULES)


@cache
def functions() -> tuple[str, ...]:
    """Top-level functions and classes of 3 to 60 lines."""
    found = []
    for module in modules():
        for node in ast.parse(module).body:
            text = ast.get_source_segment(module, node) or ""
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and 3 < len(text.splitlines()) <= 60:
                found.append(text + "\n")
    assert len(found) > 100
    return tuple(found)


@cache
def snippets() -> tuple[str, ...]:
    """Functions, classes and awkward texts, all of them valid Python."""
    return functions() + AWKWARD
