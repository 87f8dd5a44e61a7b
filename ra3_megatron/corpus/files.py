"""Finding and reading the files of a corpus. Every failure is a `UserError` that names the file."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from ra3_megatron.config.errors import UserError


def find_files(path: str, pattern: str) -> list[tuple[str, Path]]:
    """Files that `path` stands for, as (name, file) sorted by name.

    `path` is a file, a folder (searched recursively for `pattern`, a suffix such as `*.py`), or a glob (`**` works).
    Names are relative to the folder, to the fixed part of the glob, or the bare file name, with `/` between parts, so
    that they are the same on every machine. In a folder, hidden folders (`.git`, `.venv`) and symbolic links to folders
    are passed over. UserError when nothing is there.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return named([root], root.parent)
    if root.is_dir():
        suffix = pattern.removeprefix("*")
        found = []
        for parent, folders, names in os.walk(root, onerror=_refuse_folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [Path(parent, name) for name in names if name.endswith(suffix)]
        if not found:
            raise UserError(f"corpus.path={path}: the folder holds no {pattern} file")
        return named(found, root)
    if not glob.has_magic(str(root)):
        raise UserError(f"corpus.path={path}: no such file or folder")
    found = [Path(name) for name in glob.glob(str(root), recursive=True) if os.path.isfile(name)]
    if not found:
        raise UserError(f"corpus.path={path}: the pattern matches no file")
    fixed = list(root.parts)[: next(i for i, part in enumerate(root.parts) if glob.has_magic(part))]
    return named(found, Path(*fixed))


def read_bytes(file: Path) -> bytes:
    """Content of `file`; UserError when it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise unreadable(file, error) from error


def decode_utf8(data: bytes, where: str, offset: int = 0) -> str:
    """`data` as UTF-8 text; UserError naming `where` and the offset (plus `offset`) of the first wrong byte.

    A byte-order mark at offset 0, where a file begins, is no text.
    """
    try:
        text = data.decode("utf-8")
        return text if offset else text.removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte 0x{data[error.start]:02x} at offset {offset + error.start} is not UTF-8 text: "
            "convert the file to UTF-8"
        ) from error


def unreadable(file: Path, error: OSError) -> UserError:
    """The UserError for a file that the system refuses to read."""
    return UserError(f"{file}: cannot be read ({error.strerror or error})")


def _refuse_folder(error: OSError) -> None:
    raise unreadable(Path(error.filename), error) from error


def named(files: Iterable[Path], root: Path) -> list[tuple[str, Path]]:
    """(name relative to `root`, file) sorted by name; bytes of a name that are not UTF-8 become U+FFFD."""
    names = ((file.relative_to(root).as_posix(), file) for file in files)
    return sorted((name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"), file) for name, file in names)
