"""`python -m benchmarks`: measure, print the tables, and write them to `benchmarks/results/`."""

import argparse
import os
import tempfile
import warnings
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from benchmarks.measure import Timing, ratio
from ra3_megatron.cli import prepare_threads

if TYPE_CHECKING:
    from benchmarks.conversion import ConversionResult
    from benchmarks.engines import EngineResult
    from benchmarks.estep import EStepResult
    from benchmarks.layouts import LayoutResult
    from benchmarks.mstep import MStepResult
    from benchmarks.packing import PackingResult
    from benchmarks.refit import RefitResult
    from benchmarks.rollout import RolloutResult
    from benchmarks.sandbox import SandboxResult
    from benchmarks.shares import Shares

prepare_threads()
warnings.filterwarnings("ignore", category=FutureWarning)

RESULTS = Path(__file__).parent / "results"
SECTIONS = ["mstep", "shares", "packing", "rollouts", "estep", "engines", "layouts", "refit", "conversion", "sandbox"]


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["5M", "28M"], help="sizes of the M-step benchmark")
    parser.add_argument("--rollout-model", default="5M", help="size of the other benchmarks")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="what to measure")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each side")
    parser.add_argument("--documents", type=int, default=16, help="documents of rollouts and E-step")
    parser.add_argument(
        "--checkpoint", choices=["0.4 GB", "3 GB"], default="0.4 GB", help="size of the checkpoint that is converted"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--out", type=Path, help="file of the table (default: results/DATE-MACHINE.md)")
    arguments = parser.parse_args()

    # imported here: --help needs no torch
    from benchmarks import conversion, engines, estep, layouts, mstep, packing, refit, rollout, sandbox, shares
    from ra3_megatron.config.model import ParallelConfig
    from ra3_megatron.mcore import startup

    console = Console()
    runtime = startup.initialize(ParallelConfig(threads=arguments.threads), seed=1)
    name, repeats = arguments.rollout_model, arguments.repeats
    parts = []
    try:
        if not {"rollouts", "estep", "engines"}.isdisjoint(arguments.sections):
            with tempfile.TemporaryDirectory() as folder:
                work = rollout.load(name, Path(folder), arguments.documents)
        if "mstep" in arguments.sections:
            console.print("M-step …")
            steps = [mstep.measure(size, runtime, repeats) for size in arguments.models]
            parts.append(_mstep(steps, mstep.matrix_rate()))
        if "shares" in arguments.sections:
            console.print("shares of a step …")
            for size in arguments.models:
                parts.append(_shares(f"an optimizer step goes, {size} model", shares.measure(size, runtime, repeats)))
        if "packing" in arguments.sections:
            console.print("packing …")
            parts.append(_packing(packing.measure(name, runtime, repeats), name))
        if "rollouts" in arguments.sections:
            console.print("rollouts …")
            parts.append(_rollouts(rollout.measure(work, runtime, repeats), name))
            text = f"sampling goes, {name} model, thoughts on 30% of lines"
            sides, timings = shares.sampling(work, runtime, repeats)
            parts.append(_shares(text, sides) + _faster(timings[shares.DIRECT], timings[shares.MODULES]))
        if "estep" in arguments.sections:
            console.print("E-step …")
            parts.append(_estep(estep.measure(work, runtime, repeats), name))
        if "engines" in arguments.sections:
            console.print("rollout engines …")
            with tempfile.TemporaryDirectory() as folder:
                parts.append(_engines(engines.measure(work, runtime, repeats, Path(folder)), name))
    finally:
        startup.shutdown()
    if "layouts" in arguments.sections:
        console.print("layouts …")
        parts.append(_layouts(layouts.measure(arguments.models[-1], repeats), arguments.models[-1]))
    if "refit" in arguments.sections:
        console.print("refit …")
        parts.append(_refit(refit.measure(repeats)))
    if "conversion" in arguments.sections:
        console.print("conversion …")
        with tempfile.TemporaryDirectory() as folder:
            parts.append(_conversion(conversion.measure(arguments.checkpoint, Path(folder), repeats)))
    if "sandbox" in arguments.sections:
        console.print("sandbox …")
        parts.append(_sandbox(sandbox.measure(repeats)))
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


def _shares(what: str, sides: "dict[str, Shares]") -> str:
    lines = [
        f"## Where the time of {what}, one thread, fp32",
        "",
        "| part | " + " | ".join(sides) + " |",
        "|---|" + "---|" * len(sides),
    ]
    for kind in next(iter(sides.values())).of:
        lines.append(f"| {kind} | " + " | ".join(f"{each.of[kind]:.1%}" for each in sides.values()) + " |")
    lines.append("| seconds | " + " | ".join(f"{each.seconds:.2f}" for each in sides.values()) + " |")
    for side, each in sides.items():
        largest = ", ".join(f"{name.removeprefix('aten::')} {share:.1%}" for name, share in each.largest)
        lines += ["", f"The largest operations of {side} that are no matrix products: {largest}."]
    return _text(*lines)


def _faster(direct: Timing, modules: Timing) -> str:
    middle, least, most = ratio(direct, modules)
    return _text(
        f"Without the modules, in alternating repeats: **{middle:.2f}** ({least:.2f} to {most:.2f}) times as fast."
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
    from benchmarks.rollout import BATCH

    lines = [
        f"## Rollouts: documents/s, {model} model, 8 transcripts a document, thoughts of 6 tokens",
        "",
        f"{sampled[0].documents} documents, {sampled[0].lines} lines, {BATCH} transcripts at once.",
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


def _engines(result: "EngineResult", model: str) -> str:
    from benchmarks.engines import IN_TURN, UPDATES

    lines = [
        f"## Rollout engines: documents/s of E-step updates, {model} model, 8 transcripts a document",
        "",
        f"{UPDATES} updates of {result.documents} documents; refit included. Trainer and engine have one thread each.",
        "",
        "| rollouts | documents/s | of vLLM in turn | thinking rate |",
        "|---|---|---|---|",
    ]
    for side, timing in result.timings.items():
        middle, least, most = ratio(timing, result.timings[IN_TURN])
        speed = timing.rate(UPDATES * result.documents)
        lines.append(
            f"| {side} | {speed} | {middle:.2f} ({least:.2f} to {most:.2f}) | {result.think_rates[side]:.0%} |"
        )
    return _text(*lines)


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


def _refit(result: "RefitResult") -> str:
    size, sent = f"{result.parameters / 1e6:.0f}M", result.nbytes / 1e9
    lines = [
        f"## Refit: weights of a {size} model into a process beside the trainer, {sent:.2f} GB in fp32",
        "",
        "Trainer processes and receiver have one thread each. The receiver copies every tensor out of the buckets and",
        "drops it: an engine's own loading comes on top. A copy of as many bytes within one process is the measure.",
        "",
        "| trainer | seconds | GB/s | copy, GB/s | share of the copy rate |",
        "|---|---|---|---|---|",
    ]
    for label, sides in result.timings.items():
        refit, copy = sides["refit"], sides["copy"]
        share = copy.median / refit.median
        lines.append(f"| {label} | {refit.median:.2f} | {refit.rate(sent)} | {copy.rate(sent)} | {share:.0%} |")
    return _text(*lines)


def _conversion(result: "ConversionResult") -> str:
    copy, *others = result.timings.items()
    bound = 1.3 * result.largest_shard + result.largest_tensor
    lines = [
        f"## Conversion: MB/s, a checkpoint of {result.bytes / 1e9:.1f} GB in bf16",
        "",
        f"Largest shard {result.largest_shard / 1e6:,.0f} MB, largest tensor {result.largest_tensor / 1e6:,.0f} MB; "
        f"memory must stay below 1.3 shards and a tensor, {bound / 1e6:,.0f} MB.",
        "",
        "| side | MB/s | of the copy | peak memory, MB |",
        "|---|---|---|---|",
        f"| {copy[0]} | {copy[1].rate(result.bytes / 1e6)} | | |",
    ]
    for label, timing in others:
        share, least, most = ratio(timing, copy[1])
        memory = f"{result.memory[label] / 1e6:,.0f}" if label in result.memory else ""
        rate = timing.rate(result.bytes / 1e6)
        lines.append(f"| {label} | {rate} | {share:.2f} ({least:.2f} to {most:.2f}) | {memory} |")
    return _text(*lines)


def _sandbox(result: "SandboxResult") -> str:
    plain, *others = result.timings.items()
    lines = [
        f"## Sandbox: programs/s, {result.programs} small programs with {result.tests} tests each, "
        f"{result.workers} at once",
        "",
        "Every side starts a process for each program. The first runs program and tests in it, and believes its exit.",
        "CPU: of all processes that were awaited, so without the program's own on the second side.",
        "",
        "| side | programs/s | ms a program and worker | CPU ms a program | of the first |",
        "|---|---|---|---|---|",
    ]
    for label, timing in (plain, *others):
        share, least, most = ratio(timing, plain[1])
        latency = 1e3 * timing.median * result.workers / result.programs
        cpu = 1e3 * result.cpu_seconds[label] / result.programs
        lines.append(
            f"| {label} | {timing.rate(result.programs)} | {latency:.0f} | {cpu:.0f} "
            f"| {share:.2f} ({least:.2f} to {most:.2f}) |"
        )
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
