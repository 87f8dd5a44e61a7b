"""`ra3 infuse`: sample latents for a corpus with a checkpoint and write the infused corpus.

The output folder holds the corpus as it was built (`corpus/`), the infused documents as indexed data sets, and
`infused.jsonl` with {"name", "code", "infused"} a line to read or to train on elsewhere.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import dump_config, load_config
from ra3_megatron.config.run import RunConfig
from ra3_megatron.report.progress import Progress
from ra3_megatron.report.run_folder import RunFolder, write_text


def infuse(checkpoint: Path, out: Path, config: RunConfig | None, overrides: Sequence[str]) -> None:
    """Infuse every training document of the corpus that `config` describes (default: that of the checkpoint's run).

    Raises UserError when the checkpoint is none, does not fit the configuration, or `out` holds something else.
    """
    import ra3_megatron.mcore  # noqa: F401
    from ra3_megatron.em import infuse as infusion
    from ra3_megatron.em.latent_stats import blank_tokens
    from ra3_megatron.em.order import Stream
    from ra3_megatron.em.policy import LatentPolicy
    from ra3_megatron.launch import check_folder, on_main
    from ra3_megatron.mcore import checkpoint as checkpoints
    from ra3_megatron.mcore import startup
    from ra3_megatron.mcore.model import build_model
    from ra3_megatron.text.latents import code_text, full_text

    record = checkpoints.read_record(checkpoint)
    own = _run_of(checkpoint)
    if config is None:
        if own is None:
            raise UserError(f"{checkpoint}: stands in no run folder: name a CONFIG that describes its model and corpus")
        config = load_config(own.config, overrides)
    config = config.model_copy(update={"run_dir": str(out)})
    console = Console()
    runtime = startup.initialize(config.parallel, config.seed)
    try:
        folder = RunFolder(out)
        on_main(runtime, lambda: check_folder(config, resume=True))
        if runtime.is_main:
            write_text(folder.config, dump_config(config))
        with Progress(config.logging.progress, console, enabled=runtime.is_main) as progress:
            corpus = _corpus(config, folder, own, runtime, progress)
            _check_fit(checkpoint, record, config, corpus)
            model = build_model(
                config.model,
                config.parallel,
                runtime,
                corpus.tokenizer.vocab_size,
                corpus.format.sets,
                config.seed,
            )
            checkpoints.load(checkpoint, model, runtime)
            policy = LatentPolicy(model, config, runtime, corpus.format, corpus.tokenizer)
            documents = corpus.store("mid", "train")
            with progress.task("infusing", total=len(documents), unit="tokens") as task:
                infused = infusion.infuse(
                    policy,
                    documents,
                    (config.seed, Stream.INFUSE, 0),
                    out / "infused",
                    runtime,
                    blank_tokens(corpus.tokenizer),
                    record["weight_version"],
                    lambda done, tokens: task.advance(done, units=tokens),
                )
        if runtime.is_main:
            tokenizer = corpus.tokenizer
            infusion.export_jsonl(
                infused, out / "infused.jsonl", lambda t: (code_text(t, tokenizer), full_text(t, tokenizer))
            )
            stats = infused.record
            console.print(
                f"{len(infused)} documents, {stats['tokens']} tokens, "
                f"{stats['thoughts'] / stats['lines']:.1%} of lines with a thought: {out / 'infused.jsonl'}",
                soft_wrap=True,
            )
    finally:
        startup.shutdown()


def _run_of(checkpoint: Path) -> RunFolder | None:
    """The run folder that a checkpoint stands in (`RUN/checkpoints/PHASE/STEP`)."""
    for parent in checkpoint.resolve().parents:
        if (parent / "config.yaml").is_file():
            return RunFolder(parent)
    return None


def _corpus(config: RunConfig, folder: RunFolder, own: RunFolder | None, runtime: Any, progress: Progress) -> Any:
    """The corpus of `config`: with the tokenizer of the checkpoint's run unless `config` names another one."""
    from ra3_megatron.corpus.manifest import config_hash, read_manifest
    from ra3_megatron.launch import open_run_corpus

    if own is not None:
        place = own.path / "corpus"
        manifest = read_manifest(place)
        if manifest is not None and manifest.config_hash == config_hash(config):
            from ra3_megatron.corpus.build import open_corpus

            return open_corpus(config, place)
        if config.tokenizer.path is None:
            tokenizer = config.tokenizer.model_copy(update={"path": str(place / "tokenizer")})
            config = config.model_copy(update={"tokenizer": tokenizer})
    return open_run_corpus(config, folder, runtime, progress)


def _check_fit(checkpoint: Path, record: dict[str, Any], config: RunConfig, corpus: Any) -> None:
    found = record["tokenizer"]
    if found != corpus.tokenizer.fingerprint:
        raise UserError(
            f"{checkpoint}: was trained with another tokenizer ({found[:12]}, not "
            f"{corpus.tokenizer.fingerprint[:12]}): set tokenizer.path to the tokenizer folder of its run"
        )
    here = config.model.model_dump(mode="json")
    for key, value in record["model"].items():
        if here[key] != value and key not in ("precision", "init_std"):
            raise UserError(f"model.{key}={here[key]}: the checkpoint {checkpoint} has {value}")
