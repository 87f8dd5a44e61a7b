"""`python -m benchmarks`: measure, print the tables, and write them to `benchmarks/results/`."""

import argparse
import os
import tempfile
import warnings
from datetime import date
from pathlib import Path

from rich.console import Console

from ra3_megatron.cli import prepare_threads

prepare_threads()
warnings.filterwarnings("ignore", category=FutureWarning)

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["5M", "28M"], help="sizes of the M-step benchmark")
    parser.add_argument("--rollout-model", default="5M", help="size of the rollout benchmark")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each side")
    parser.add_argument("--documents", type=int, default=16, help="documents of the rollout benchmark")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--out", type=Path, help="file of the table (default: results/DATE-MACHINE.md)")
    arguments = parser.parse_args()

    # imported here: --help needs no torch
    from benchmarks import mstep, rollout
    from ra3_megatron.config.model import ParallelConfig
    from ra3_megatron.mcore import startup

    console = Console()
    runtime = startup.initialize(ParallelConfig(threads=arguments.threads), seed=1)
    try:
        console.print("M-step …")
        steps = [mstep.measure(name, runtime, arguments.repeats) for name in arguments.models]
        rate = mstep.matrix_rate()
        console.print("rollouts …")
        with tempfile.TemporaryDirectory() as folder:
            sampled = rollout.measure(
                arguments.rollout_model, runtime, Path(folder), arguments.documents, arguments.repeats
            )
    finally:
        startup.shutdown()
    text = _report(steps, rate, sampled, arguments.repeats, arguments.rollout_model)
    out = arguments.out or RESULTS / f"{date.today().isoformat()}-{_machine()}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    console.print(text, markup=False, highlight=False)
    console.print(f"written to {out}")


def _report(steps, rate, sampled, repeats, model) -> str:  # type: ignore[no-untyped-def]
    import torch

    from benchmarks.measure import ratio
    from ra3_megatron.report.versions import collect_versions

    versions = collect_versions()
    names = ("torch", "megatron-core", "transformers", "numpy")
    packages = ", ".join(f"{name} {versions['packages'][name]}" for name in names)
    load = os.getloadavg()[0]
    lines = [
        f"# Benchmark, {date.today().isoformat()}",
        "",
        f"{versions['processor']}, {torch.get_num_threads()} threads; Python {versions['python']}, {packages}.",
        f"Load average at the end: {load:.1f}. Median (least to greatest) of {repeats} alternating repeats.",
        "Reproduce with `make bench`.",
        "",
        f"fp32 matrix product of this process, 1024 x 1024: {rate / 1e9:,.0f} GFLOP/s.",
        "",
        "## M-step: tokens/s of one optimizer step",
        "",
        "| model | parameters | side | tokens/s | share of the matrix rate |",
        "|---|---|---|---|---|",
    ]
    for result in steps:
        for side, timing in result.timings.items():
            share = result.flops_per_token * result.tokens / timing.median / rate
            size, speed = f"{result.parameters / 1e6:.1f}M", timing.rate(result.tokens)
            lines.append(f"| {result.model} | {size} | {side} | {speed} | {share:.0%} |")
        middle, least, most = ratio(result.timings["mcore fp32"], result.timings["HF fp32"])
        lines.append(
            f"| {result.model} | | **mcore fp32 / HF fp32** | **{middle:.2f}** ({least:.2f} to {most:.2f}) | |"
        )
    lines += [
        "",
        "The share counts 6 FLOP a parameter and token plus causal attention over whole rows (Megatron's side attends",
        "within documents only). bf16 can exceed 100%: the matrix rate is fp32's.",
        "",
        f"## Rollouts: documents/s, {model} model, 8 transcripts a document, thoughts of 6 tokens",
        "",
        f"{sampled[0].documents} documents, {sampled[0].lines} lines.",
        "",
        "| thinking rate | jump-ahead | naive + cache | naive | jump-ahead / naive + cache | jump-ahead / naive |",
        "|---|---|---|---|---|---|",
    ]
    for result in sampled:
        fast, cached, naive = (result.timings[name] for name in ("jump-ahead", "naive + cache", "naive"))
        first, second = ratio(fast, cached), ratio(fast, naive)
        lines.append(
            f"| {result.rate:.1f} | {fast.rate(result.documents)} | {cached.rate(result.documents)} "
            f"| {naive.rate(result.documents)} | {first[0]:.1f} ({first[1]:.1f} to {first[2]:.1f}) "
            f"| {second[0]:.1f} ({second[1]:.1f} to {second[2]:.1f}) |"
        )
    return "\n".join(lines) + "\n"


def _machine() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else f"cpu-{os.cpu_count()}"


if __name__ == "__main__":
    main()
