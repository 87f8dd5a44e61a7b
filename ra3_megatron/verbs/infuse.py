"""`ra3 infuse`: sample latents for a corpus with a checkpoint and write the infused corpus.

The output folder holds the corpus as it was built (`corpus/`, unless it is that of the checkpoint's run), the infused
documents as indexed data sets (`infused/`), and `infused.jsonl` with {"name", "code", "infused"} a line to read or to
train on elsewhere. An interrupted infusion goes on where it was; an output folder belongs to one checkpoint.
"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from ra3_megatron.config import inherit
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import dump_config, load_config
from ra3_megatron.config.run import RunConfig
from ra3_megatron.report.progress import Progress
from ra3_megatron.report.run_folder import RunFolder, read_json, write_json, write_text
from ra3_megatron.verbs.processes import in_process, on_main, process_group, runs_here, start_processes
from ra3_megatron.verbs.run_dir import LOCK, disk_full, only_writer

SOURCE = "source.json"
"""Names the checkpoint that an output folder belongs to."""


def infuse(checkpoint: Path, out: Path, config: RunConfig | None, overrides: Sequence[str]) -> None:
    """Infuse every training document of the corpus that `config` describes (default: that of the checkpoint's run).

    Raises UserError when the checkpoint is none, does not fit the configuration, or `out` holds something else.
    """
    import ra3_megatron.mcore  # noqa: F401
    from ra3_megatron.mcore.checkpoint_record import read_record

    read_record(checkpoint)
    if config is None:
        own = run_of(checkpoint)
        if own is None:
            raise UserError(f"{checkpoint}: stands in no run folder: name a CONFIG that describes its model and corpus")
        config = load_config(own.config, overrides, resolved=True)
    _check_out(checkpoint, out, config)
    if runs_here(config):
        _infuse_here(checkpoint, out, config)
    elif code := start_processes(config, __name__, str(checkpoint), str(out)):
        if code != 1:  # hung, which they have said, or ended by a signal
            sys.exit(code)
        raise RuntimeError("a process failed: see its message above")


def _infuse_here(checkpoint: Path, out: Path, config: RunConfig) -> None:
    """`infuse` in this process, one of those that the layout needs."""
    import ra3_megatron.mcore  # noqa: F401
    from ra3_megatron.em import infuse as infusion
    from ra3_megatron.em.latent_stats import blank_tokens
    from ra3_megatron.em.order import Stream
    from ra3_megatron.em.policy import latent_policy
    from ra3_megatron.mcore import checkpoint as checkpoints
    from ra3_megatron.mcore.model import build_model
    from ra3_megatron.mcore.watchdog import watching
    from ra3_megatron.text.latents import code_text, full_text
    from ra3_megatron.training.identity import check_fit
    from ra3_megatron.verbs.engines import rollout_engines, thinks

    console = Console()
    with process_group(config) as runtime, ExitStack() as held:
        on_main(runtime, lambda: held.enter_context(only_writer(out, "--out")))
        with disk_full(str(out)), Progress(config.logging.progress, console, enabled=runtime.is_main) as progress:
            corpus = _corpus(checkpoint, out, config, runtime, progress)
            tokenizer = corpus.tokenizer
            record = check_fit(checkpoint, "--checkpoint", config, tokenizer)
            on_main(runtime, lambda: _describe(checkpoint, out, config))
            model = build_model(
                config.model.frozen, config.parallel, runtime, tokenizer.vocab_size, corpus.format.sets, None
            )
            checkpoints.load(checkpoint, model, runtime, verify=config.checkpoint.verify)
            documents = corpus.store("mid", "train")
            with (
                watching(out, runtime, config.watchdog.timeout_minutes),
                rollout_engines(
                    config, runtime, corpus.format, tokenizer, out, hf_source_of(checkpoint), thinks(config)
                ) as engines,
                progress.task("infusing", total=len(documents), unit="tokens") as task,
            ):
                version = record["weight_version"]
                infused = infusion.infuse(
                    latent_policy(model, config, runtime, corpus.format, tokenizer, version, engines),
                    documents,
                    (config.seed, Stream.INFUSE, 0),
                    out / "infused",
                    runtime,
                    blank_tokens(tokenizer),
                    lambda done, tokens: task.advance(done, units=tokens),
                )
            if runtime.is_main:
                infusion.export_jsonl(
                    infused, out / "infused.jsonl", lambda t: (code_text(t, tokenizer), full_text(t, tokenizer))
                )
            runtime.barrier()
        if runtime.is_main:
            stats = infused.record
            console.print(
                f"{len(infused)} documents, {stats['tokens']} tokens, "
                f"{stats['thoughts'] / stats['lines']:.1%} of lines with a thought: {out / 'infused.jsonl'}",
                soft_wrap=True,
            )


def run_of(checkpoint: Path) -> RunFolder | None:
    """The run folder that a checkpoint stands in (`RUN/checkpoints/PHASE/STEP`)."""
    found = inherit.run_of(checkpoint)
    return None if found is None else RunFolder(found)


def weights_of(checkpoint: Path) -> dict[str, str]:
    """The checksums of its files, as another one may stand in its place by now. Raises UserError when it is none."""
    from ra3_megatron.mcore.checkpoint_record import read_record

    return {name: facts["sha256"] for name, facts in read_record(checkpoint)["files"].items()}


def hf_source_of(checkpoint: Path) -> Path | None:
    """The small files of the Hugging Face folder that the model came from, if any."""
    from ra3_megatron.hf.importing import HF_FOLDER
    from ra3_megatron.verbs.base import hf_source

    run = run_of(checkpoint)
    kept = checkpoint / HF_FOLDER if run is None else hf_source(run)
    return kept if kept is not None and kept.is_dir() else None


def _source(checkpoint: Path, config: RunConfig) -> dict[str, Any]:
    """What decides the infused documents, apart from the layout."""
    decisive = config.model_dump(include={"seed", "corpus", "tokenizer", "text", "model", "rollout"})
    decisive["latent_price"] = str(config.estep.latent_price)
    return {"checkpoint": str(checkpoint.resolve()), "weights": weights_of(checkpoint), **decisive}


def _check_out(checkpoint: Path, out: Path, config: RunConfig) -> None:
    """Refuse an output folder that holds anything but a (begun) infusion with this checkpoint and configuration."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out}: is a file: choose another folder")
    if not (out / SOURCE).is_file():
        left = [path.name for path in out.iterdir()] if out.is_dir() else []
        if set(left) - {LOCK, "corpus", ".corpus.partial"}:
            raise UserError(f"--out={out}: exists and holds no infused corpus: choose another folder")
        return
    there, here = read_json(out / SOURCE), _source(checkpoint, config)
    for key, value in here.items():
        if there.get(key) != value:
            raise UserError(f"--out={out}: holds a corpus infused with another {key}: choose another folder")


def _describe(checkpoint: Path, out: Path, config: RunConfig) -> None:
    try:
        write_text(out / "config.yaml", dump_config(config))
        write_json(out / SOURCE, _source(checkpoint, config))
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error.strerror})") from error


def _corpus(checkpoint: Path, out: Path, config: RunConfig, runtime: Any, progress: Progress) -> Any:
    """The corpus of `config`: with the tokenizer of the checkpoint's run unless `config` names another one."""
    from ra3_megatron.corpus.build import build_corpus, open_corpus
    from ra3_megatron.corpus.manifest import config_hash, read_manifest

    own = run_of(checkpoint)
    if own is not None:
        place = own.path / "corpus"
        manifest = read_manifest(place)
        if manifest is not None and manifest.config_hash == config_hash(config):
            return open_corpus(config, place)
        if config.tokenizer.path is None:
            tokenizer = config.tokenizer.model_copy(update={"path": str(place / "tokenizer")})
            config = config.model_copy(update={"tokenizer": tokenizer})
    on_main(runtime, lambda: build_corpus(config, out / "corpus", progress))
    return open_corpus(config, out / "corpus")


if __name__ == "__main__":
    sys.exit(in_process(lambda config, arguments: _infuse_here(Path(arguments[0]), Path(arguments[1]), config)))
