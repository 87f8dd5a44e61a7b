"""`python -m benchmarks`: measure, print the tables, and write them to `benchmarks/results/`."""

import argparse
import os
import tempfile
import warnings
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from benchmarks.measure import ratio
from ra3_megatron.cli import prepare_threads

if TYPE_CHECKING:
    from benchmarks.estep import EStepResult
    from benchmarks.layouts import LayoutResult
    from benchmarks.mstep import MStepResult
    from benchmarks.packing import PackingResult
    from benchmarks.rollout import RolloutResult

prepare_threads()
warnings.filterwarnings("ignore", category=FutureWarning)

RESULTS = Path(__file__).parent / "results"
SECTIONS = ["mstep", "packing", "rollouts", "estep", "layouts"]


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["5M", "28M"], help="sizes of the M-step benchmark")
    parser.add_argument("--rollout-model", default="5M", help="size of the other benchmarks")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="what to measure")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each side")
    parser.add_argument("--documents", type=int, default=16, help="documents of rollouts and E-step")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--out", type=Path, help="file of the table (default: results/DATE-MACHINE.md)")
    arguments = parser.parse_args()

    # imported here: --help needs no torch
    from benchmarks import estep, layouts, mstep, packing, rollout
    from ra3_megatron.config.model import ParallelConfig
    from ra3_megatron.mcore import startup

    console = Console()
    runtime = startup.initialize(ParallelConfig(threads=arguments.threads), seed=1)
    name, repeats = arguments.rollout_model, arguments.repeats
    parts = []
    try:
        if not {"rollouts", "estep"}.isdisjoint(arguments.sections):
            with tempfile.TemporaryDirectory() as folder:
                work = rollout.load(name, Path(folder), arguments.documents)
        if "mstep" in arguments.sections:
            console.print("M-step …")
            steps = [mstep.measure(size, runtime, repeats) for size in arguments.models]
            parts.append(_mstep(steps, mstep.matrix_rate()))
        if "packing" in arguments.sections:
            console.print("packing …")
            parts.append(_packing(packing.measure(name, runtime, repeats), name))
        if "rollouts" in arguments.sections:
            console.print("rollouts …")
            parts.append(_rollouts(rollout.measure(work, runtime, repeats), name))
        if "estep" in arguments.sections:
            console.print("E-step …")
            parts.append(_estep(estep.measure(work, runtime, repeats), name))
    finally:
        startup.shutdown()
    if "layouts" in arguments.sections:
        console.print("layouts …")
        parts.append(_layouts(layouts.measure(arguments.models[-1], repeats), arguments.models[-1]))
    text = "\n".join([_head(repeats), *parts])
    out = arguments.out or RESULTS / f"{date.today().isoformat()}-{_machine()}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"written to {out}")


def _head(repeats: int) -> str:
    import torch

    from ra3_megatron.report.versions import collect_versions

    versions = collect_versions()
    names = ("torch", "megatron-core", "transformers", "numpy")
    packages = ", ".join(f"{name} {versions['packages'][name]}" for name in names)
    return _text(
        f"# Benchmark, {date.today().isoformat()}",
        "",
        f"{versions['processor']}, {torch.get_num_threads()} threads; Python {versions['python']}, {packages}.",
        f"Load average at the end: {os.getloadavg()[0]:.1f}.",
        f"Median (least to greatest) of {repeats} alternating repeats. Reproduce with `make bench`.",
    )


def _mstep(steps: "list[MStepResult]", rate: float) -> str:
    lines = [
        "## M-step: tokens/s of one optimizer step",
        "",
        f"fp32 matrix product of this process, 1024 x 1024: {rate / 1e9:,.0f} GFLOP/s.",
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
    return _text(
        *lines,
        "",
        "The share counts 6 FLOP a parameter and token plus causal attention over whole rows (Megatron's side attends",
        "within documents only). bf16 can exceed 100%: the matrix rate is fp32's.",
    )


def _packing(results: "list[PackingResult]", model: str) -> str:
    lines = [
        f"## Micro-batches by rows and by tokens: one optimizer step, {model} model, documents of very unequal length",
        "",
        "| documents | tokens | side | micro-batches | positions of each | fill rate | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        tokens = sum(result.lengths)
        for side, plan in result.plans.items():
            size = plan.micro_batch_size
            lines.append(
                f"| {len(result.lengths)} | {tokens:,} | {side} | {len(plan.rows) // size} | {size} x {plan.length} "
                f"| {plan.fill_rate:.0%} | {result.timings[side].rate(tokens)} |"
            )
        rows, budget = result.timings.values()
        middle, least, most = ratio(budget, rows)
        faster = f"**{middle:.2f}** ({least:.2f} to {most:.2f})"
        lines.append(f"| {len(result.lengths)} | | **by tokens / by rows** | | | | {faster} |")
    shortest, longest = min(min(r.lengths) for r in results), max(max(r.lengths) for r in results)
    return _text(
        *lines,
        "",
        f"Documents of {shortest} to {longest} tokens, log-normal. Tokens are those of documents, without padding.",
    )


def _rollouts(sampled: "list[RolloutResult]", model: str) -> str:
    lines = [
        f"## Rollouts: documents/s, {model} model, 8 transcripts a document, thoughts of 6 tokens",
        "",
        f"{sampled[0].documents} documents, {sampled[0].lines} lines.",
        "",
        "| thinking rate | jump-ahead | naive + cache | naive | jump-ahead / naive + cache | jump-ahead / naive |",
        "|---|---|---|---|---|---|",
    ]
    return _text(*lines, *(f"| {result.rate:.1f} {_samplers(result)}" for result in sampled))


def _estep(result: "EStepResult", model: str) -> str:
    return _text(
        f"## E-step: documents/s of one update, {model} model, 8 transcripts a document, thoughts of 6 tokens",
        "",
        f"{result.documents} documents, {result.lines} lines, thoughts on {result.think_rate:.0%} of them.",
        "An update samples, scores and makes one policy-gradient step; only the sampler differs.",
        "",
        "| jump-ahead | naive + cache | naive | jump-ahead / naive + cache | jump-ahead / naive |",
        "|---|---|---|---|---|",
        _samplers(result),
    )


def _layouts(result: "LayoutResult", model: str) -> str:
    one, *others = result.timings.items()
    lines = [
        f"## Layouts: tokens/s of one optimizer step, {model} model, 2 processes of 1 thread",
        "",
        f"{result.tokens:,} tokens, {result.micro_batches} micro-batches. One process of 2 threads has as many cores:",
        "what is lost are messages, bubbles and narrower matrices. Repeats of a side follow each other.",
        "",
        "| layout | tokens/s | of one process |",
        "|---|---|---|",
        f"| {one[0]} | {one[1].rate(result.tokens)} | |",
    ]
    for label, timing in others:
        share = one[1].median / timing.median
        lines.append(f"| {label} | {timing.rate(result.tokens)} | {share:.2f} |")
    return _text(*lines)


def _samplers(result: "RolloutResult | EStepResult") -> str:
    """Cells: documents/s of each sampler, and by how much jump-ahead is faster."""
    fast, cached, naive = (result.timings[name] for name in ("jump-ahead", "naive + cache", "naive"))
    cells = [timing.rate(result.documents) for timing in (fast, cached, naive)]
    for other in (cached, naive):
        middle, least, most = ratio(fast, other)
        cells.append(f"{middle:.1f} ({least:.1f} to {most:.1f})")
    return "| " + " | ".join(cells) + " |"


def _text(*lines: str) -> str:
    return "\n".join(lines) + "\n"


def _machine() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else f"cpu-{os.cpu_count()}"


if __name__ == "__main__":
    main()
