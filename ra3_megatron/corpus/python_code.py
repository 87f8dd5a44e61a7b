"""Python files as documents: whole files, or top-level functions and methods cut out by `ast`.

Invariants: a function's text is its source lines, decorators included, with the indentation of its `def` removed from
each, those inside a multi-line string too, and nothing else changed; it parses on its own.
Line endings are read as Python reads them ("\\r\\n" and "\\r" are "\\n").
"""

import ast
import io
import re
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator

_INDENT = re.compile(r"[ \t\f]*")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def decode_python(data: bytes) -> str:
    """Text of a Python file, by its byte-order mark or coding line (UTF-8 without either).

    Raises SyntaxError for an unknown encoding, UnicodeDecodeError for bytes that are not text in it.
    """
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def parse(text: str) -> ast.Module | None:
    """Syntax tree of `text`; None when it is not Python of the running interpreter."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and such are the file's own matter
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def functions(tree: ast.Module, text: str, skipped: Counter[str]) -> Iterator[tuple[str, str]]:
    """(qualified name, text) of each top-level function and each method of a top-level (or nested) class, in order.

    A later definition of the same name gets `~2`, `~3` … behind its name. Functions with a line (of a multi-line
    string) that is indented less than their `def` are left out and counted in `skipped`.
    """
    lines = text.split("\n")
    seen: Counter[str] = Counter()
    for name, node in _definitions(tree, ""):
        seen[name] += 1
        code = _function_text(node, lines)
        if code is None:
            skipped["function_not_dedentable"] += 1
            continue
        yield (name if seen[name] == 1 else f"{name}~{seen[name]}"), code


def _definitions(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, Function]]:
    for child in node.body:
        if isinstance(child, Function):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from _definitions(child, f"{prefix}{child.name}.")


def _function_text(node: Function, lines: list[str]) -> str | None:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    block = lines[first - 1 : node.end_lineno]
    match = _INDENT.match(block[0])
    indent = match.group() if match else ""
    if any(line.strip() and not line.startswith(indent) for line in block):
        return None
    code = "\n".join(line.removeprefix(indent) for line in block) + "\n"
    return code if parse(code) is not None else None
