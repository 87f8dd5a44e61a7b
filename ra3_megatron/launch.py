"""From a configuration to a finished run: processes, run folder, corpus, the EM loop, summary and report.

`train` starts the processes that the layout needs through torchrun, unless torchrun or srun started this one already.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import dump_config, load_config
from ra3_megatron.config.run import RunConfig
from ra3_megatron.report.run_folder import RunFolder, write_json, write_text

RESULT_FREE = ("logging", "parallel", "checkpoint", "run_dir")
"""Sections that may change when a run is resumed: they do not decide what it computes."""


def train(config: RunConfig, resume: bool) -> int:
    """Run, or resume, what `config` describes; returns the exit code."""
    from ra3_megatron.mcore.startup import launched

    if launched() or config.parallel.world_size == 1:
        return _train_here(config, resume)
    return _start_processes(config, resume)


def _start_processes(config: RunConfig, resume: bool) -> int:
    check_folder(config, resume)  # a mistake is reported once, before any process starts
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        write_text(file, dump_config(config))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={config.parallel.world_size}", "-m", "ra3_megatron.launch", str(file)]
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", "1")
        error_file = Path(folder) / "error"
        environment["RA3_ERROR_FILE"] = str(error_file)
        code = subprocess.run([*command, *(["--resume"] if resume else [])], env=environment, check=False).returncode
        if error_file.is_file():
            raise UserError(error_file.read_text())
        return code


def _train_here(config: RunConfig, resume: bool) -> int:
    # imported here: they load torch and Megatron-Core
    import ra3_megatron.mcore  # noqa: F401
    from ra3_megatron.mcore import startup

    runtime = startup.initialize(config.parallel, config.seed)
    try:
        _run(config, resume, runtime)
    finally:
        startup.shutdown()
    return 0


def _run(config: RunConfig, resume: bool, runtime: Any) -> None:
    from ra3_megatron.em.context import RunContext
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
    on_main(runtime, lambda: prepare_folder(config, folder, resume))
    with Progress(config.logging.progress, console, enabled=runtime.is_main) as progress:
        corpus = open_run_corpus(config, folder, runtime, progress)
        writer = MetricsWriter(folder.path, config.logging.tensorboard) if runtime.is_main else None
        identity = {
            "model": config.model.model_dump(mode="json"),
            "vocab_size": corpus.tokenizer.vocab_size,
            "tokenizer": corpus.tokenizer.fingerprint,
        }
        run = RunContext(config, folder, runtime, corpus, blank_tokens(corpus.tokenizer), progress, writer, identity)
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
    """Refuse a run folder that belongs to another configuration, or to this one unless it is to be resumed."""
    folder = RunFolder(Path(config.run_dir))
    if folder.config.is_file():
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
    elif folder.path.is_dir() and any(folder.path.iterdir()):
        raise UserError(f"run_dir={config.run_dir}: exists and is no run folder: choose another run_dir")
    elif folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"run_dir={config.run_dir}: is a file: choose another run_dir")


def prepare_folder(config: RunConfig, folder: RunFolder, resume: bool) -> None:
    """Check the run folder and write what it says of itself."""
    from ra3_megatron.report.versions import collect_versions

    check_folder(config, resume)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        write_text(folder.config, dump_config(config))
        write_json(folder.versions, collect_versions())
    except OSError as error:
        raise UserError(f"run_dir={config.run_dir}: cannot be written ({error.strerror})") from error


def _differences(old: RunConfig, new: RunConfig) -> list[str]:
    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        found: dict[str, Any] = {}
        for key, item in value.items():
            found |= flat(item, f"{prefix}.{key}" if prefix else key)
        return found

    before, after = flat(old.model_dump(mode="json")), flat(new.model_dump(mode="json"))
    return [
        f"{key}={json.dumps(before.get(key))} there, {json.dumps(after.get(key))} here"
        for key in before
        if before[key] != after.get(key) and key.split(".")[0] not in RESULT_FREE
    ]


def main(arguments: list[str]) -> int:
    """Entry point of the processes that `train` starts."""
    from ra3_megatron.report.run_folder import write_text as write

    try:
        return _train_here(load_config(Path(arguments[0]), []), resume="--resume" in arguments)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" and "RA3_ERROR_FILE" in os.environ:
            write(Path(os.environ["RA3_ERROR_FILE"]), str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
