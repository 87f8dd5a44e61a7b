"""`ra3 train`: corpus, EM loop, summary and report, in as many processes as the layout needs."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.report.run_folder import RunFolder, write_text
from ra3_megatron.verbs.processes import in_process, on_main, process_group, runs_here, start_processes
from ra3_megatron.verbs.run_dir import check_folder, disk_full, run_folder


def train(config: RunConfig, resume: bool) -> int:
    """Run, or resume, what `config` describes; returns the exit code."""
    if config.method == "rlvr":
        raise UserError("method=rlvr: is what `ra3 rlvr` runs; ra3 train runs ra3 and ntp")
    if runs_here(config):
        _train_here(config, resume)
        return 0
    check_folder(config, resume)  # a mistake is reported before any process starts
    return start_processes(config, __name__, *(["--resume"] if resume else []))


def _train_here(config: RunConfig, resume: bool) -> None:
    with process_group(config) as runtime, disk_full(config.run_dir):
        _run(config, resume, runtime)


def _run(config: RunConfig, resume: bool, runtime: Any) -> None:
    from ra3_megatron.em.context import EMContext
    from ra3_megatron.em.latent_stats import blank_tokens
    from ra3_megatron.em.loop import EM
    from ra3_megatron.em.outcome import summarize
    from ra3_megatron.evaluate.during import load_suites, training_suites
    from ra3_megatron.mcore.fp8 import require_fp8
    from ra3_megatron.mcore.offload import require_offload
    from ra3_megatron.mcore.watchdog import watching
    from ra3_megatron.report.build import build_report
    from ra3_megatron.report.metrics import MetricsWriter
    from ra3_megatron.report.progress import Progress
    from ra3_megatron.report.summary import write_summary
    from ra3_megatron.report.terminal import print_summary
    from ra3_megatron.rollout.decode_graphs import require_cuda_graphs
    from ra3_megatron.training.identity import identity_of
    from ra3_megatron.training.profiling import check_profile
    from ra3_megatron.verbs.base import base_checkpoint, hf_source
    from ra3_megatron.verbs.engines import rollout_engines, thinks
    from ra3_megatron.verbs.export import check_export, export_models
    from ra3_megatron.verbs.sampled_model import end_ids

    console = Console()
    folder = RunFolder(Path(config.run_dir))
    check_export(config)
    require_fp8(config.model, runtime.device)
    require_offload(config.parallel, runtime.device)
    require_cuda_graphs(config.rollout, runtime.device)
    check_profile(config.profile, runtime)
    suites = load_suites(config, runtime)
    with run_folder(config, folder, resume, runtime):
        with Progress(config.logging.progress, console, enabled=runtime.is_main) as progress:
            _check_starts(config, folder)
            corpus = _open_corpus(config, folder, runtime, progress)
            writer = MetricsWriter(folder.path, config.logging.tensorboard) if runtime.is_main else None
            base = base_checkpoint(config, folder, runtime, progress, config.warm_start.checkpoint)
            source, tokenizer, latents = hf_source(folder), corpus.tokenizer, corpus.format
            engines = rollout_engines(config, runtime, latents, tokenizer, folder.path, source, thinks(config))
            benchmarks = training_suites(
                config, suites, runtime, tokenizer, latents, end_ids(tokenizer, source), progress
            )
            with engines as pool, benchmarks as evaluates:
                run = EMContext(
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
                    corpus=corpus,
                    blank=blank_tokens(corpus.tokenizer),
                )
                try:
                    with run.stop.listening(), watching(folder.path, runtime, config.watchdog.timeout_minutes):
                        EM(run).run()
                    exported = export_models(run)
                finally:
                    if writer is not None:
                        writer.close()
        if runtime.is_main:
            summary = summarize(run)
            write_summary(folder.path, summary)
            report = build_report(folder.path)
            print_summary(summary, console, folder.path)
            for path in exported:
                console.print(f"[bold]exported[/bold]    {path}", soft_wrap=True)
            console.print(f"[bold]report[/bold]      {report}", soft_wrap=True)
        runtime.barrier()


def _check_starts(config: RunConfig, folder: RunFolder) -> None:
    """Refuse what is no checkpoint before hours go into a corpus. A run that has its own needs them no more."""
    from ra3_megatron.training.identity import require_checkpoint

    if not folder.manifest.is_file():
        for key, checkpoint in config.starts.items():
            require_checkpoint(checkpoint, key)


def _open_corpus(config: RunConfig, folder: RunFolder, runtime: Any, progress: Any) -> Any:
    """Build (on the main process) and open the corpus of a run; its manifest goes to the run folder."""
    from ra3_megatron.corpus.build import build_corpus, open_corpus

    place = folder.path / "corpus"
    on_main(runtime, lambda: build_corpus(config, place, progress))
    corpus = open_corpus(config, place)
    if runtime.is_main:
        write_text(folder.manifest, (place / "manifest.json").read_text(encoding="utf-8"))
    return corpus


if __name__ == "__main__":
    sys.exit(in_process(lambda config, arguments: _train_here(config, resume="--resume" in arguments)))
