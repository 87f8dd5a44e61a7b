"""Where expert text comes from: each source yields named texts, lazily and in a fixed order.

Invariants: the same source gives the same texts in the same order; `Source.path` is the same on every machine;
nothing is left out without being counted; a file that cannot be read or decoded is a `UserError` that names it.
"""

import hashlib
import importlib.util
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ra3_megatron.config.data import CorpusConfig
from ra3_megatron.config.errors import UserError
from ra3_megatron.corpus import python_code, rows
from ra3_megatron.corpus.files import decode_utf8, find_files, named, read_bytes
from ra3_megatron.corpus.generated import Tasks

FUNCTION_SEPARATOR = "::"
"""Stands in `Source.path` between a file and a function of it."""

_NO_EXPERT_CODE = frozenset(
    {"test", "tests", "idlelib", "turtledemo", "site-packages", "dist-packages", "_bundled", "__pycache__"}
)
"""Folders left out of installed code: tests, demonstrations and other people's packages."""


@dataclass(frozen=True)
class Source:
    """One text as a source gives it."""

    path: str
    """Stable name: `json/decoder.py::JSONDecoder.decode`, `rows.jsonl#17`."""
    text: str
    """The text, unchanged."""
    file: str
    """What it was read from: a file, or a hub data set."""
    prompt: str = ""
    """What stands before the text and is given."""

    @property
    def digest(self) -> str:
        """sha256 of the prompt and the text, hexadecimal."""
        return hashlib.sha256((self.prompt + self.text).encode("utf-8")).hexdigest()

    @property
    def split_key(self) -> str:
        """What decides the split: the file for a function, the row for a row. Two texts of one key share a split."""
        return self.path.partition(FUNCTION_SEPARATOR)[0]


def iter_texts(config: CorpusConfig, skipped: Counter[str] | None = None) -> Iterator[Source]:
    """Texts of the configured source, lazily. What the source itself leaves out is counted by reason in `skipped`.

    UserError: missing or unreadable path, unknown package, bytes that are not text, malformed row, missing column.
    """
    skipped = Counter() if skipped is None else skipped
    if config.source == "installed":
        yield from _installed(config, skipped)
    elif config.source == "folder":
        for name, file in find_files(_path(config), "*.py"):
            yield from _python_file(config, name, _decode(file), skipped)
    elif config.source == "tasks":
        for task in Tasks(config):
            body = task.warm_text.removeprefix(task.prompt)
            yield Source(path=task.name, text=body, file=config.tasks.family, prompt=task.prompt)
    else:
        for file_name, row, text in _rows(config):
            yield Source(path=file_name if row is None else f"{file_name}#{row}", text=text, file=file_name)


def check_sources(config: CorpusConfig) -> None:
    """UserError when the files that `config` names are not there. Reads none of them."""
    pattern = {"folder": "*.py", "jsonl": "*.jsonl", "parquet": "*.parquet", "text": "*.txt"}.get(config.source)
    if pattern is not None:
        find_files(_path(config), pattern)


def _rows(config: CorpusConfig) -> Iterator[rows.Row]:
    path = _path(config)
    if config.source == "jsonl":
        return rows.jsonl(find_files(path, "*.jsonl"), config.text_field)
    if config.source == "parquet":
        return rows.parquet(find_files(path, "*.parquet"), config.text_field)
    if config.source == "text":
        return rows.text(find_files(path, "*.txt"), config.document_separator)
    return rows.hub(path, config.hub_config, config.hub_split, config.text_field, config.streaming)


def _path(config: CorpusConfig) -> str:
    if config.path is None:
        raise UserError(f"corpus.path is missing: corpus.source={config.source} needs one")
    return config.path


# -- Python code ------------------------------------------------------------------------------------------------------


def _installed(config: CorpusConfig, skipped: Counter[str]) -> Iterator[Source]:
    standard_library = Path(sysconfig.get_paths()["stdlib"])
    files = _code_files(standard_library, standard_library)
    for package in config.packages:
        files += _package_files(package)
    for name, file in files:
        try:
            text = python_code.decode_python(read_bytes(file))
        except (SyntaxError, UnicodeDecodeError):
            skipped["file_not_decodable"] += 1
            continue
        yield from _python_file(config, name, text, skipped)


def _package_files(package: str) -> list[tuple[str, Path]]:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise UserError(f"corpus.packages: no package named {package!r} is installed here: install it or leave it out")
    depth = package.count(".") + 1
    if spec.submodule_search_locations:
        folders = [Path(location) for location in spec.submodule_search_locations]
        files = [pair for folder in folders for pair in _code_files(folder, Path(*folder.parts[:-depth]))]
    else:
        origin = Path(spec.origin or "")
        files = [(origin.name, origin)] if origin.suffix == ".py" else []
    if not files:
        raise UserError(f"corpus.packages: the package {package!r} has no Python source files: leave it out")
    return files


def _code_files(folder: Path, relative_to: Path) -> list[tuple[str, Path]]:
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _NO_EXPERT_CODE]
        # _sysconfigdata_*.py is a table of this machine's build
        found += [Path(parent, n) for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
    return named(found, relative_to)


def _decode(file: Path) -> str:
    data = read_bytes(file)
    try:
        return python_code.decode_python(data)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: byte 0x{data[error.start]:02x} at offset {error.start} is not {error.encoding} text: "
            "convert the file to UTF-8 or declare its encoding"
        ) from error
    except SyntaxError as error:
        decode_utf8(data, str(file))
        raise UserError(f"{file}: {error.msg}: declare the encoding that the file has") from error


def _python_file(config: CorpusConfig, name: str, text: str, skipped: Counter[str]) -> Iterator[Source]:
    tree = python_code.parse(text)
    if tree is None:
        skipped["file_not_python"] += 1
    elif config.unit == "file":
        yield Source(path=name, text=text, file=name)
    else:
        for function, code in python_code.functions(tree, text, skipped):
            yield Source(path=f"{name}{FUNCTION_SEPARATOR}{function}", text=code, file=name)
