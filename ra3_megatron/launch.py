"""From a configuration to a finished run: processes, run folder, corpus, the EM loop, summary and report.

`train` starts the processes that the layout needs through torchrun, unless torchrun or srun started this one already.
"""

import errno
import fcntl
import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import dump_config, load_config
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.yaml_io import scalar_text
from ra3_megatron.report.run_folder import RunFolder, write_json, write_text

RESULT_FREE = ("logging", "parallel", "checkpoint", "run_dir")
"""Sections that may change when a run is resumed: they do not decide what it computes."""
LOCK = ".lock"
"""File in the run folder that the process writing there holds locked."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def train(config: RunConfig, resume: bool) -> int:
    """Run, or resume, what `config` describes; returns the exit code."""
    from ra3_megatron.mcore.startup import launched

    if launched() or config.parallel.world_size == 1:
        _train_here(config, resume)
        return 0
    check_folder(config, resume)  # a mistake is reported before any process starts
    return start_processes(config, "train", *(["--resume"] if resume else []))


def start_processes(config: RunConfig, verb: str, *arguments: str) -> int:
    """Run `main([verb, CONFIG, ERRORS, *arguments])` in the processes that the layout needs; returns the exit code.

    Raises UserError when one of them did.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # processes speak for themselves
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "config.yaml", dump_config(config))
        layout = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=config.parallel.world_size,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
        )
        command = ["-m", "ra3_megatron.launch", verb, str(folder / "config.yaml"), str(folder), *arguments]
        try:
            elastic_launch(layout, sys.executable)(*command)
        except ChildFailedError as failure:
            errors = sorted(folder.glob("error.*"))
            if errors:
                raise UserError(errors[0].read_text(encoding="utf-8")) from failure
            return 1
        return 0


def main(arguments: list[str]) -> int:
    """Entry point of the processes that `start_processes` starts: VERB CONFIG ERRORS [ARGUMENT …]."""
    verb, file, errors, *rest = arguments
    config = load_config(Path(file), [])
    try:
        if verb == "train":
            _train_here(config, resume="--resume" in rest)
        else:
            from ra3_megatron.em.infuse_cli import infuse_here

            infuse_here(Path(rest[0]), Path(rest[1]), config)
    except UserError as error:
        write_text(Path(errors) / f"error.{int(os.environ['RANK']):06d}", str(error))
        return 2
    return 0


def _train_here(config: RunConfig, resume: bool) -> None:
    # imported here: they load torch and Megatron-Core
    import ra3_megatron.mcore  # noqa: F401
    from ra3_megatron.mcore import startup

    runtime = startup.initialize(config.parallel, config.seed)
    try:
        with disk_full(config.run_dir):
            _run(config, resume, runtime)
    finally:
        startup.shutdown()


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


def _run(config: RunConfig, resume: bool, runtime: Any) -> None:
    from ra3_megatron.em.context import RunContext
    from ra3_megatron.em.identity import identity_of
    from ra3_megatron.em.latent_stats import blank_tokens
    from ra3_megatron.em.loop import EM
    from ra3_megatron.em.outcome import summarize
    from ra3_megatron.report.build import build_report
    from ra3_megatron.report.metrics import MetricsWriter
    from ra3_megatron.report.progress import Progress
    from ra3_megatron.report.summary import write_summary
    from ra3_megatron.report.terminal import print_summary

    console = Console()
    folder = RunFolder(Path(config.run_dir))
    with run_folder(config, folder, resume, runtime):
        with Progress(config.logging.progress, console, enabled=runtime.is_main) as progress:
            corpus = open_run_corpus(config, folder, runtime, progress)
            identity = identity_of(config, corpus.tokenizer)
            blank = blank_tokens(corpus.tokenizer)
            writer = MetricsWriter(folder.path, config.logging.tensorboard) if runtime.is_main else None
            run = RunContext(config, folder, runtime, corpus, blank, progress, writer, identity)
            try:
                EM(run).run()
            finally:
                if writer is not None:
                    writer.close()
        if runtime.is_main:
            summary = summarize(run)
            write_summary(folder.path, summary)
            report = build_report(folder.path)
            print_summary(summary, console, folder.path)
            console.print(f"[bold]report[/bold]      {report}", soft_wrap=True)
        runtime.barrier()


def on_main(runtime: Any, action: Any) -> None:
    """Run `action` on the main process; its UserError is raised on every process."""
    message = ""
    if runtime.is_main:
        try:
            action()
        except UserError as error:
            message = str(error)
    message = runtime.broadcast(message)
    if message:
        raise UserError(message)


def open_run_corpus(config: RunConfig, folder: RunFolder, runtime: Any, progress: Any) -> Any:
    """Build (on the main process) and open the corpus of a run; its manifest goes to the run folder."""
    from ra3_megatron.corpus.build import build_corpus, open_corpus

    place = folder.path / "corpus"
    on_main(runtime, lambda: build_corpus(config, place, progress))
    corpus = open_corpus(config, place)
    if runtime.is_main:
        write_text(folder.manifest, (place / "manifest.json").read_text(encoding="utf-8"))
    return corpus


def check_folder(config: RunConfig, resume: bool) -> None:
    """Refuse a run folder that belongs to another configuration, or to this one unless it is to be resumed.

    A run that has not left any checkpoint has nothing to lose: it may begin anew, with any configuration.
    """
    folder = RunFolder(Path(config.run_dir))
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"run_dir={config.run_dir}: is a file: choose another run_dir")
    if not folder.config.is_file():
        if folder.path.is_dir() and any(path.name != LOCK for path in folder.path.iterdir()):
            raise UserError(f"run_dir={config.run_dir}: exists and is no run folder: choose another run_dir")
        return
    if not folder.checkpoints.is_dir():
        return
    changed = _differences(load_config(folder.config, []), config)
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
    begun = folder.config.is_file()
    on_main(runtime, lambda: held.append(_prepare_folder(config, folder, resume)))
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


def _prepare_folder(config: RunConfig, folder: RunFolder, resume: bool) -> Any:
    """Check and lock the run folder, and write what it says of itself; returns the lock."""
    from ra3_megatron.report.versions import collect_versions

    check_folder(config, resume)
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


def _differences(old: RunConfig, new: RunConfig) -> list[str]:
    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        found: dict[str, Any] = {}
        for key, item in value.items():
            found |= flat(item, f"{prefix}.{key}" if prefix else key)
        return found

    before, after = flat(old.model_dump()), flat(new.model_dump())
    return [
        f"{key}={scalar_text(before.get(key))} there, {scalar_text(after.get(key))} here"
        for key in before
        if before[key] != after.get(key) and key.split(".")[0] not in RESULT_FREE
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
