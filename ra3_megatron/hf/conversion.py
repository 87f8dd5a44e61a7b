"""A conversion that is whole or absent, goes on after a kill, and may use several processes.

A job is cut into units, each of which writes one file; how is decided by its input and options alone. Everything is
written to `<out>.partial`, which is renamed when all of it is on the disk. In that folder, `conversion.json` says what
is being converted, and `journal.jsonl` which units are complete: it gets a line when a unit's file is on the disk. The
same conversion, started again, does what is left; any other one begins anew. `conversion.json` stays in the result.

Units are done in this process, or handed to processes that end when this one does, however it ends.
"""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch

from ra3_megatron.config.errors import UserError
from ra3_megatron.mcore.checkpoint_files import force_to_disk
from ra3_megatron.mcore.checkpoint_record import PARTIAL
from ra3_megatron.text.files import lock_file, write_atomic

IDENTITY = "conversion.json"
JOURNAL = "journal.jsonl"
LOCK = ".lock"
OnBytes = Callable[[int], None]
"""Called with the number of bytes that were converted since the last call."""
Progress = Callable[[int], OnBytes]
"""Called once, with the number of bytes that will be converted."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Job(Protocol):
    """A conversion cut into units. Is pickled when there are several processes."""

    def sizes(self) -> list[int]:
        """Bytes of each unit's tensors."""

    def run(self, unit: int, folder: Path, on_bytes: OnBytes) -> dict[str, Any]:
        """Do one unit: write its file, `file` of the result (JSON), to `folder` and force it to the disk."""

    def finish(self, folder: Path, results: Sequence[dict[str, Any]]) -> None:
        """Write what makes the files of all units a whole."""


def convert(job: Job, out: Path, identity: dict[str, Any], workers: int = 1, progress: Progress | None = None) -> bool:
    """Do the job and leave its result at `out`; False when it is there already, from the same conversion.

    identity: what the result depends on, as JSON. Raises UserError when `out` holds something else, when the disk is
    full (what is complete is kept), and with what a unit raises (nothing is kept).
    """
    out = Path(os.path.abspath(out))
    if _is_taken(out, identity):
        return False
    partial = out.with_name(out.name + PARTIAL)
    if partial.exists() and not _is_ours(partial):
        raise UserError(f"{partial}: exists and is no unfinished conversion: choose another folder, or delete it")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial):
            try:
                if _is_taken(out, identity):  # by a process that held the folder until a moment ago
                    shutil.rmtree(partial, ignore_errors=True)
                    return False
                done = _begin(partial, identity)
                sizes = job.sizes()
                report = progress(sum(sizes)) if progress is not None else (lambda count: None)
                for unit in done:
                    report(sizes[unit])
                left = [unit for unit in range(len(sizes)) if unit not in done]
                with (partial / JOURNAL).open("a", encoding="utf-8") as journal:
                    for unit, result in _results(job, partial, left, workers, report):
                        done[unit] = result
                        journal.write(json.dumps({"unit": unit, "result": result}) + "\n")
                        journal.flush()
                        os.fsync(journal.fileno())
                job.finish(partial, [done[unit] for unit in range(len(sizes))])
                (partial / JOURNAL).unlink()
                force_to_disk(partial)
                partial.rename(out)
                (out / LOCK).unlink()  # not before: nobody else may begin in this folder
            except UserError:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        force_to_disk(out.parent, recursive=False)
    except OSError as error:
        mend = ": make room and run the same command again: it goes on where it was" if error.errno in _FULL else ""
        raise UserError(f"{error.filename or out}: cannot be read or written ({error.strerror}){mend}") from error
    return True


def _is_taken(out: Path, identity: dict[str, Any]) -> bool:
    """Whether `out` is the result of this very conversion. Raises UserError when it is anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if (out / JOURNAL).exists():
        raise UserError(f"{out}: holds an unfinished conversion ({JOURNAL}): choose another folder, or delete it")
    with suppress(OSError, ValueError):
        if json.loads((out / IDENTITY).read_text(encoding="utf-8")) == identity:
            return True
    raise UserError(f"{out}: exists already: choose another folder, or delete it")


def _is_ours(partial: Path) -> bool:
    """Whether a folder was left by an earlier attempt, so that its content may be deleted."""
    names = {path.name for path in partial.iterdir()} if partial.is_dir() else {""}
    return not names or not names.isdisjoint((LOCK, IDENTITY))


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Hold the folder against a second conversion to the same place."""
    held = lock_file(partial / LOCK)
    if held is None:
        raise UserError(f"{partial}: another process is writing there: wait for it, or stop it")
    with held:
        yield


def _begin(partial: Path, identity: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Results of the units that an earlier attempt at the same conversion completed; clears everything else."""
    done: dict[int, dict[str, Any]] = {}
    with suppress(OSError, ValueError):
        if json.loads((partial / IDENTITY).read_text(encoding="utf-8")) == identity:
            done = _completed(partial)
    kept = {LOCK, *(result["file"] for result in done.values())}
    for path in partial.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_atomic(partial / IDENTITY, (json.dumps(identity, indent=1) + "\n").encode())
    lines = [json.dumps({"unit": unit, "result": result}) + "\n" for unit, result in sorted(done.items())]
    write_atomic(partial / JOURNAL, "".join(lines).encode())
    return done


def _completed(partial: Path) -> dict[int, dict[str, Any]]:
    """What the journal says; a line that a kill tore, or a file of another size, does not count."""
    done = {}
    for line in (partial / JOURNAL).read_text(encoding="utf-8").splitlines():
        with suppress(ValueError, OSError):
            entry = json.loads(line)
            result = entry["result"]
            if (partial / result["file"]).stat().st_size == result["facts"]["bytes"]:
                done[entry["unit"]] = result
    return done


# -- processes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Failed:
    """What a worker raised."""

    error: Exception
    trace: str


def _results(
    job: Job, folder: Path, units: Sequence[int], workers: int, on_bytes: OnBytes
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each unit and its result, as they are completed."""
    if workers == 1 or len(units) < 2:
        for unit in units:
            yield unit, job.run(unit, folder, on_bytes)
        return
    with closing(_in_processes(job, folder, list(units), min(workers, len(units)), on_bytes)) as found:
        yield from found


def _in_processes(
    job: Job, folder: Path, units: list[int], workers: int, on_bytes: OnBytes
) -> Generator[tuple[int, dict[str, Any]], None, None]:
    spawn = multiprocessing.get_context("spawn")
    processes, connections, at_work = [], [], {}
    try:
        for _ in range(workers):
            here, there = spawn.Pipe()
            connections.append(here)
            process = spawn.Process(target=_work, args=(there, job, folder), daemon=True)
            process.start()
            there.close()
            processes.append(process)
            at_work[here] = units.pop(0)
            here.send(at_work[here])
        while at_work:
            for connection in wait(list(at_work)):
                assert isinstance(connection, Connection)
                try:
                    message = connection.recv()
                except EOFError as error:
                    raise RuntimeError("a process of the conversion died") from error
                if isinstance(message, int):
                    on_bytes(message)
                elif isinstance(message, _Failed):
                    message.error.add_note(message.trace)
                    raise message.error
                else:
                    unit = at_work.pop(connection)
                    if units:
                        at_work[connection] = units.pop(0)
                        connection.send(at_work[connection])
                    yield unit, message
    except BaseException:  # an error here or in a worker, or of the caller, who closes this generator
        for process in processes:
            process.kill()
        raise
    finally:
        for connection in connections:  # which ends the workers
            connection.close()
        for process in processes:
            process.join()


def _work(connection: Connection, job: Job, folder: Path) -> None:
    """A worker: does units until its parent has no more, or is no more."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end ends this process
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            unit = connection.recv()
            try:
                message: Any = job.run(unit, folder, connection.send)
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:
                message = _Failed(error, traceback.format_exc())
            connection.send(message)
