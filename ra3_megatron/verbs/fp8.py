"""`ra3 convert fp8`: a model quantised to FP8 for serving, and what that cost."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console

import ra3_megatron.mcore  # noqa: F401
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import load_config
from ra3_megatron.corpus import rows
from ra3_megatron.corpus.build import open_corpus
from ra3_megatron.corpus.files import named
from ra3_megatron.corpus.manifest import read_manifest
from ra3_megatron.hf.fp8.export import REPORT, export_fp8
from ra3_megatron.hf.fp8.measure import OutputResult, WeightResult, read_report
from ra3_megatron.hf.fp8.passages import CalibrationSettings, draw_passages
from ra3_megatron.report.progress import Progress
from ra3_megatron.text.latents import code_text
from ra3_megatron.verbs.infuse import run_of

ENDINGS = (".jsonl", ".txt", ".py")
"""Files of a folder of texts that are read."""


def fp8(
    checkpoint: Path | None,
    hf: Path | None,
    out: Path,
    corpus: Path | None = None,
    text_field: str = "text",
    settings: CalibrationSettings | None = None,
    device: str | None = None,
    compare: bool = True,
) -> int:
    """Write a checkpoint or a Hugging Face folder in FP8, and print what that cost; the exit code.

    corpus: a file or folder of texts; None: the corpus of the checkpoint's run. device: `cpu` or `cuda`; None: `cuda`
    where there is one. Raises what `export_fp8` raises.
    """
    settings = settings or CalibrationSettings()
    if (checkpoint is None) == (hf is None):
        raise UserError("give one of --checkpoint and --hf: the model to quantise")
    source = checkpoint or hf
    assert source is not None
    if device not in (None, "cpu", "cuda"):
        raise UserError(f"--device={device}: must be cpu or cuda")
    if corpus is None and checkpoint is None:
        raise UserError("--corpus is missing: name a file or folder of texts to calibrate on (.jsonl, .txt, .py)")
    what = f"--corpus={corpus}" if corpus is not None else f"the corpus of {checkpoint}'s run"

    def texts() -> Iterator[str]:
        if corpus is not None:
            return _texts_of(corpus, text_field)
        assert checkpoint is not None
        return _texts_of_run(checkpoint)

    with Progress(console=Console(stderr=True)) as progress:

        def start(name: str, total: int) -> Callable[[int, int], None]:
            task = progress.task(name, total=total, unit="tokens")
            return lambda done, tokens: task.advance(done, units=tokens)

        done = export_fp8(
            source,
            checkpoint is not None,
            out,
            lambda: draw_passages(texts(), settings, what),
            settings,
            what,
            device or ("cuda" if torch.cuda.is_available() else "cpu"),
            compare,
            start,
        )
    console = Console(highlight=False)
    console.print(str(out) if done else f"{out} (complete since an earlier run)", markup=False, soft_wrap=True)
    for line in _lines(*read_report((out / REPORT).read_text(encoding="utf-8"))):
        console.print(line, markup=False, soft_wrap=True)
    return 0


def _lines(weights: WeightResult, outputs: OutputResult | None) -> Iterator[str]:
    yield (
        f"weights: {weights.fp8_tensors} tensors in FP8, largest relative error {weights.largest_relative_error:.4f} "
        f"(possible: 0.0625; in {weights.largest_relative_error_in}), root mean square "
        f"{weights.relative_rms_error:.4f}; {weights.became_zero:.2%} of the numbers became 0; "
        f"{weights.other_tensors} other tensors equal in bf16"
    )
    if outputs is None:
        yield "outputs: not compared (--no-compare)"
        return
    yield (
        f"outputs: KL {outputs.kl_nats_per_token:.3g} nats a token, the same most probable token at "
        f"{outputs.top1_agreement:.1%} of {outputs.tokens} held-out positions"
    )


def _texts_of(path: Path, field: str) -> Iterator[str]:
    """Texts of a file, or of all files of a folder that end as texts do."""
    if path.is_file():
        files = named([path], path.parent)
    elif path.is_dir():
        files = named([file for file in path.rglob("*") if file.suffix in ENDINGS and file.is_file()], path)
        if not files:
            raise UserError(f"--corpus={path}: the folder holds no {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]} file")
    else:
        raise UserError(f"--corpus={path}: no such file or folder")
    for name, file in files:
        read = rows.jsonl([(name, file)], field) if file.suffix == ".jsonl" else rows.text([(name, file)], None)
        for _, _, text in read:
            yield text


def _texts_of_run(checkpoint: Path) -> Iterator[str]:
    """Training documents of the run that a checkpoint belongs to."""
    run = run_of(checkpoint)
    if run is None or read_manifest(run.path / "corpus") is None:
        raise UserError(f"{checkpoint}: stands in no run with a corpus: name texts to calibrate on with --corpus")
    corpus = open_corpus(load_config(run.config, [], resolved=True), run.path / "corpus")
    for transcript in corpus.store("mid", "train"):
        yield code_text(transcript, corpus.tokenizer)
