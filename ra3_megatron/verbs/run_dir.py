"""The run folder as a whole: refused when it belongs to something else, described, locked, and never left half-made."""

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ra3_megatron.config.differences import differences
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import dump_config, load_config
from ra3_megatron.config.run import RunConfig
from ra3_megatron.report.run_folder import RunFolder, write_json, write_text
from ra3_megatron.text.files import lock_file
from ra3_megatron.verbs.processes import on_main

LOCK = ".lock"
"""File in a run or output folder that the process writing there holds locked."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_folder(config: RunConfig, resume: bool) -> None:
    """Refuse a run folder that belongs to another configuration, or to this one unless it is to be resumed.

    A run that has not left any checkpoint has nothing to lose: it may begin anew, with any configuration.
    """
    try:
        _check_folder(config, resume)
    except OSError as error:
        raise UserError(f"run_dir={config.run_dir}: cannot be read ({error.strerror})") from error


def _check_folder(config: RunConfig, resume: bool) -> None:
    folder = RunFolder(Path(config.run_dir))
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"run_dir={config.run_dir}: is a file: choose another run_dir")
    if not folder.config.is_file():
        if folder.path.is_dir() and any(path.name != LOCK for path in folder.path.iterdir()):
            raise UserError(f"run_dir={config.run_dir}: exists and is no run folder: choose another run_dir")
        return
    if not folder.checkpoints.is_dir():
        return
    changed = [
        f"{d.key}={d.one} there, {d.other} here"
        for d in differences(load_config(folder.config, [], resolved=True), config)
    ]
    if changed:
        raise UserError(
            f"run_dir={config.run_dir}: holds a run with another configuration ({'; '.join(changed[:3])}"
            f"{'; …' if len(changed) > 3 else ''}): choose another run_dir, or the same settings"
        )
    if not resume:
        raise UserError(
            f"run_dir={config.run_dir}: holds this run already: go on with --resume, or choose another run_dir"
        )


@contextmanager
def run_folder(config: RunConfig, folder: RunFolder, resume: bool, runtime: Any) -> Iterator[None]:
    """Hold the run folder: checked, described by its configuration and versions, and locked against other processes.

    A run that fails before it has a corpus leaves no folder behind.
    """
    held: list[Any] = []
    begun = False

    def prepare() -> None:
        nonlocal begun
        check_folder(config, resume)
        begun = folder.config.is_file()
        held.append(_prepare_folder(config, folder))

    on_main(runtime, prepare)
    try:
        yield
    except UserError:
        if runtime.is_main and not begun and not (folder.path / "corpus").exists():
            for path in (folder.config, folder.versions, folder.path / LOCK):
                path.unlink(missing_ok=True)
            if not any(folder.path.iterdir()):
                folder.path.rmdir()
        raise
    finally:
        for lock in held:
            lock.close()


def _prepare_folder(config: RunConfig, folder: RunFolder) -> Any:
    """Lock the run folder, and write what it says of itself; returns the lock."""
    from ra3_megatron.report.versions import collect_versions

    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        write_text(folder.config, dump_config(config))
        write_json(folder.versions, collect_versions())
    except OSError as error:
        raise UserError(f"run_dir={config.run_dir}: cannot be written ({error.strerror})") from error
    return lock


def _lock(folder: RunFolder) -> Any:
    file = (folder.path / LOCK).open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"run_dir={folder.path}: another process is writing there: wait for it, or stop it"
            ) from error
        # a file system without locks: go on without one
    return file


@contextmanager
def only_writer(folder: Path, key: str) -> Iterator[None]:
    """Hold an output folder against other processes that would write there; makes it, and removes it if it stays empty.

    key: the option that named it. Raises UserError when another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock_file(folder / LOCK)
    except OSError as error:
        raise UserError(f"{key}={folder}: cannot be written ({error.strerror})") from error
    if held is None:
        raise UserError(f"{key}={folder}: another process is writing there: wait for it, or stop it")
    with held:
        try:
            yield
        finally:
            if [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()


def write_out(path: Path, text: str, key: str) -> None:
    """Write a file that the user asked for; key: the option that named it. Raises UserError when that cannot be."""
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{key}={path}: cannot be written ({error.strerror})") from error


@contextmanager
def disk_full(folder: str) -> Iterator[None]:
    """A disk without room is the user's to mend: UserError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise UserError(
            f"{error.filename or folder}: cannot be written ({error.strerror}): make room and go on "
            "(what was complete is kept)"
        ) from error
