"""Verbs of checkpoints: inspect and convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a checkpoint.", show_default=False)],
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Read everything, not only the sizes of files; exit with 1 if one is missing or damaged."
        ),
    ] = False,
    tensors: Annotated[bool, typer.Option("--tensors/--no-tensors", help="List every tensor.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what is in a checkpoint: model, layout it was saved at, step, tensors."""
    from ra3_megatron.verbs.inspect import inspect as inspect_checkpoint

    raise typer.Exit(inspect_checkpoint(checkpoint, verify, tensors, as_json))


convert = typer.Typer(
    no_args_is_help=True, help="Convert Hugging Face folders to checkpoints and back; compare the two."
)

_HFFolder = Annotated[Path, typer.Option("--hf", metavar="DIR", help="Hugging Face folder.", show_default=False)]
_Checkpoint = Annotated[
    Path, typer.Option("--checkpoint", metavar="DIR", help="Folder of a checkpoint.", show_default=False)
]
_Out = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder to write; must not exist yet.", show_default=False)
]
_DType = Annotated[
    str | None,
    typer.Option("--dtype", metavar="fp32|bf16", help="Data type to write; that of the weights otherwise."),
]
_Workers = Annotated[int, typer.Option("--workers", metavar="N", help="Processes that convert.")]


@convert.command("hf-to-megatron")
def hf_to_megatron(hf: _HFFolder, out: _Out, dtype: _DType = None, workers: _Workers = 1) -> None:
    """Write the weights of a Hugging Face folder as a checkpoint that loads at any layout.

    A conversion that was interrupted goes on where it was when the same command is run again.
    """
    from ra3_megatron.verbs import convert as verbs

    raise typer.Exit(verbs.hf_to_megatron(hf, out, dtype, workers))


@convert.command("megatron-to-hf")
def megatron_to_hf(
    checkpoint: _Checkpoint,
    out: _Out,
    dtype: _DType = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Most that the tensors of one file take.")
    ] = "5GB",
    hf: Annotated[
        Path | None,
        typer.Option(
            "--hf",
            metavar="DIR",
            help="Hugging Face folder whose config.json, tokenizer and other small files are kept; otherwise those "
            "that the checkpoint was made from, or the tokenizer of its run.",
            show_default=False,
        ),
    ] = None,
    workers: _Workers = 1,
) -> None:
    """Write a checkpoint, saved at any layout, as a Hugging Face folder.

    A conversion that was interrupted goes on where it was when the same command is run again.
    """
    from ra3_megatron.verbs import convert as verbs

    raise typer.Exit(verbs.megatron_to_hf(checkpoint, out, dtype, max_shard_size, hf, workers))


@convert.command("check")
def check_conversion(
    hf: _HFFolder,
    checkpoint: _Checkpoint,
    tensors_only: Annotated[
        bool, typer.Option("--tensors-only", help="Compute no logits, for which each model must fit into memory.")
    ] = False,
) -> None:
    """Compare a Hugging Face folder and a checkpoint: every tensor, and logits of both; exit with 1 if they differ."""
    from ra3_megatron.verbs import convert as verbs

    raise typer.Exit(verbs.check(hf, checkpoint, tensors_only))


@convert.command("fp8")
def fp8(
    out: _Out,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", metavar="DIR", help="Folder of a checkpoint to quantise.", show_default=False),
    ] = None,
    hf: Annotated[
        Path | None,
        typer.Option("--hf", metavar="DIR", help="Hugging Face folder to quantise instead.", show_default=False),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            "--corpus",
            metavar="PATH",
            help="Texts to calibrate on: a .jsonl or text file, or a folder of them; otherwise those of the "
            "checkpoint's run.",
            show_default=False,
        ),
    ] = None,
    text_field: Annotated[str, typer.Option("--text-field", metavar="NAME", help="Field of .jsonl rows.")] = "text",
    sequences: Annotated[int, typer.Option("--sequences", metavar="N", help="Sequences to calibrate on.")] = 128,
    length: Annotated[int, typer.Option("--length", metavar="N", help="Tokens of a sequence at most.")] = 512,
    held_out: Annotated[
        int, typer.Option("--held-out", metavar="N", help="Further sequences, to compare both models on.")
    ] = 16,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the sequences drawn.")] = 1,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="cpu|cuda", help="Where the models run; cuda otherwise, if there is one."),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option("--compare/--no-compare", help="Run the original beside the result (8 bytes a parameter)."),
    ] = True,
) -> None:
    """Quantise a model to FP8 with NVIDIA's modelopt, as a Hugging Face folder that vLLM loads; measure the cost."""
    from ra3_megatron.hf.fp8.passages import CalibrationSettings
    from ra3_megatron.verbs import fp8 as verbs

    settings = CalibrationSettings(sequences, length, held_out, seed)
    raise typer.Exit(verbs.fp8(checkpoint, hf, out, corpus, text_field, settings, device, compare))
