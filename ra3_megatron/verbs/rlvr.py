"""`ra3 rlvr`: problems, GRPO, evaluations and report, in as many processes as the layout needs."""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.inherit import TOKENIZER, run_of
from ra3_megatron.config.run import RunConfig
from ra3_megatron.report.run_folder import RunFolder, read_json, write_json
from ra3_megatron.rlvr.problems.problem import Problem
from ra3_megatron.rlvr.problems.sources import Problems, encode_prompts, load_problems
from ra3_megatron.rlvr.sandbox import Isolation, Sandbox, require_bubblewrap
from ra3_megatron.verbs.processes import in_process, on_main, process_group, runs_here, start_processes
from ra3_megatron.verbs.run_dir import check_folder, disk_full, run_folder

if TYPE_CHECKING:
    from ra3_megatron.mcore.startup import Runtime
    from ra3_megatron.text.tokenizer import Tokenizer


def rlvr(config: RunConfig, resume: bool) -> int:
    """Run, or resume, the RLVR that `config` describes; returns the exit code."""
    require_bubblewrap(Isolation(config.sandbox))
    if runs_here(config):
        _rlvr_here(config, resume)
        return 0
    check_folder(config, resume)  # a mistake is reported before any process starts
    return start_processes(config, __name__, *(["--resume"] if resume else []))


def _rlvr_here(config: RunConfig, resume: bool) -> None:
    with process_group(config) as runtime, disk_full(config.run_dir):
        _run(config, resume, runtime)


def _run(config: RunConfig, resume: bool, runtime: "Runtime") -> None:
    from ra3_megatron.evaluate.during import load_suites, training_suites
    from ra3_megatron.mcore.fp8 import require_fp8
    from ra3_megatron.mcore.offload import require_offload
    from ra3_megatron.mcore.watchdog import watching
    from ra3_megatron.report.metrics import MetricsWriter
    from ra3_megatron.report.progress import Progress
    from ra3_megatron.report.rlvr import build_rlvr_report, print_rlvr_summary, rlvr_summary
    from ra3_megatron.rlvr.loop import Rlvr
    from ra3_megatron.rollout.decode_graphs import require_cuda_graphs
    from ra3_megatron.text.latents import build_format
    from ra3_megatron.training.context import RunContext
    from ra3_megatron.training.identity import check_fit, identity_of, require_checkpoint
    from ra3_megatron.training.profiling import check_profile
    from ra3_megatron.verbs.base import base_checkpoint, hf_source
    from ra3_megatron.verbs.engines import rollout_engines
    from ra3_megatron.verbs.sampled_model import end_ids

    console = Console()
    folder = RunFolder(Path(config.run_dir))
    require_fp8(config.model, runtime.device)
    require_offload(config.parallel, runtime.device)
    require_cuda_graphs(config.rollout, runtime.device)
    check_profile(config.profile, runtime)
    suites = load_suites(config, runtime)
    on_main(runtime, lambda: check_folder(config, resume))
    for key, checkpoint in config.starts.items():
        require_checkpoint(checkpoint, key)
    problems = load_problems(config)
    on_main(runtime, lambda: _check_problems(config, folder, problems))
    with run_folder(config, folder, resume, runtime):
        with Progress(config.logging.progress, console, enabled=runtime.is_main) as progress:
            _say(problems, progress)
            tokenizer = _tokenizer(config, folder)
            latents = build_format(config.text, tokenizer)
            prompts = [
                encode_prompts(asked, tokenizer, latents, config) for asked in (problems.train, problems.held_out)
            ]
            if config.rlvr.checkpoint is not None:
                check_fit(Path(config.rlvr.checkpoint), "rlvr.checkpoint", config, tokenizer)
            on_main(runtime, lambda: tokenizer.save(folder.path / TOKENIZER))  # the run folder needs nothing else
            base = base_checkpoint(config, folder, runtime, progress, config.rlvr.checkpoint)
            assert base is not None  # the configuration names one
            on_main(runtime, lambda: write_json(folder.problems, _manifest(problems)))
            writer = MetricsWriter(folder.path, config.logging.tensorboard) if runtime.is_main else None
            source = hf_source(folder)
            engines = rollout_engines(config, runtime, latents, tokenizer, folder.path, source)
            ends = end_ids(tokenizer, source)
            benchmarks = training_suites(config, suites, runtime, tokenizer, latents, ends, progress)
            with engines as pool, _sandbox(config, runtime, problems) as sandbox, benchmarks as evaluates:
                run = RunContext(
                    config,
                    folder,
                    runtime,
                    tokenizer,
                    latents,
                    progress,
                    writer,
                    identity_of(tokenizer),
                    base,
                    pool,
                    evaluates,
                )
                try:
                    with run.stop.listening(), watching(folder.path, runtime, config.watchdog.timeout_minutes):
                        Rlvr(run, sandbox, problems, prompts[0], prompts[1], ends).optimize()
                finally:
                    if writer is not None:
                        writer.close()
        if runtime.is_main:
            write_json(folder.summary, rlvr_summary(folder.path))
            report = build_rlvr_report(folder.path)
            print_rlvr_summary(folder.path, console)
            console.print(f"[bold]report[/bold]      {report}", soft_wrap=True)
        runtime.barrier()


def _sandbox(config: RunConfig, runtime: "Runtime", problems: Problems) -> Sandbox:
    """The sandbox of this process: its share of the cores of its node."""
    import os

    from ra3_megatron.mcore.startup import available_cores
    from ra3_megatron.rlvr.rewards import sandbox_limits

    here = int(os.environ.get("LOCAL_WORLD_SIZE", runtime.world_size))
    workers = config.rlvr.limits.workers or available_cores()
    limits = sandbox_limits(config.rlvr.limits, [*problems.train, *problems.held_out])
    return Sandbox(Isolation(config.sandbox), limits, max(1, workers // here))


def _tokenizer(config: RunConfig, folder: RunFolder) -> "Tokenizer":
    """The tokenizer: the run folder's own copy, or that of the start."""
    from ra3_megatron.text.tokenizer import load_tokenizer

    settings = config.tokenizer
    if settings.path is None and config.rlvr.checkpoint is not None:
        run = run_of(Path(config.rlvr.checkpoint))
        if run is not None:
            settings = settings.model_copy(update={"path": str(run / TOKENIZER)})
    if settings.path is None:
        raise UserError("tokenizer.path is missing: name the folder of the tokenizer that the model was trained with")
    return load_tokenizer(settings, folder.path / TOKENIZER, config.model.vocab_size)


def _say(problems: Problems, progress: Any) -> None:
    for reason, count in problems.left_out.items():
        progress.message(f"{count} problems are left out: {reason}")
    report = problems.decontamination
    if report is not None:
        for file, count in report.unread.items():
            progress.message(
                f"{file}: {count} rows have neither a solution nor a prompt, and were compared with nothing"
            )
        if report.not_read:
            progress.message(f"no lines of JSON, compared with nothing: {', '.join(report.not_read)}")
        counts = ", ".join(f"{file}: {len(names)}" for file, names in report.dropped.items())
        compared = " and ".join(f"{count} by their {kind}" for kind, count in report.compared.items() if count)
        dropped = f"{len(report.names)} problems share text with a benchmark and are left out ({counts})"
        progress.message(f"{dropped}; compared: {compared}")


def _check_problems(config: RunConfig, folder: RunFolder, problems: Problems) -> None:
    """Refuse to go on with other problems than the run has: what is held out might have been trained on, or the other
    way round. A run without any checkpoint may begin anew with any."""
    if not folder.checkpoints.is_dir() or not folder.problems.is_file():
        return
    before, here = read_json(folder.problems), _manifest(problems)
    changed = [
        f"{kind.replace('_', '-')} problems, {before[kind]} there, {here[kind]} here"
        for kind in ("training", "held_out")
        if before[f"{kind}_hash"] != here[f"{kind}_hash"]
    ]
    if changed:
        asked = config.rlvr.problems
        named = f"source={asked.source}" if asked.path is None else f"path={asked.path}"
        raise UserError(
            f"rlvr.problems.{named}: the run in run_dir={config.run_dir} has others ({'; '.join(changed)}): go on with "
            "those that it began with, or choose another run_dir"
        )


def _manifest(problems: Problems) -> dict[str, Any]:
    """What the problems were."""
    report = problems.decontamination
    return {
        "training": len(problems.train),
        "held_out": len(problems.held_out),
        "training_hash": _hash(problems.train),
        "held_out_hash": _hash(problems.held_out),
        "held_out_names": [problem.name for problem in problems.held_out],
        "left_out": problems.left_out,
        "decontamination": "none" if report is None else asdict(report),
    }


def _hash(problems: Sequence[Problem]) -> str:
    text = json.dumps([asdict(problem) for problem in problems], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


if __name__ == "__main__":
    sys.exit(in_process(lambda config, arguments: _rlvr_here(config, resume="--resume" in arguments)))
