"""`ra3 plan`: memory and step time of every layout that could train a model, and a YAML of the best."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ra3_megatron import __version__
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.config.problems import problems
from ra3_megatron.config.yaml_io import dump, parse
from ra3_megatron.report.pages import render_page, write_picture
from ra3_megatron.report.progress import Progress
from ra3_megatron.report.run_folder import write_text
from ra3_megatron.scaling import curves, em
from ra3_megatron.scaling.calibration import published
from ra3_megatron.scaling.counts import token_flops, total_parameters
from ra3_megatron.scaling.em import Thinking
from ra3_megatron.scaling.memory import Work
from ra3_megatron.scaling.search import Plan, Planned, describe, evaluate, layout_keys, problems_of, search
from ra3_megatron.scaling.step import peak
from ra3_megatron.scaling.tables import Architecture, Gpu, architecture_named, gpu_named
from ra3_megatron.verbs.run_dir import write_out

MFU = "3 * forward FLOPs (products with weights, causal attention, output layer) / (seconds * GPUs * {} TFLOP/s)"
"""What `mfu` means."""
FP8 = "fp8_tensorwise"
"""The recipe that a plan for FP8 is written for."""


@dataclass(frozen=True)
class Asked:
    """Options of `ra3 plan`, as they were given."""

    model: str
    gpus: int
    gpu: str
    precision: str
    sequence: int
    global_batch: int
    layout: str | None = None
    gradients: str = "fp32"
    rollouts_gib: float = 0.0
    top: int = 10
    as_json: bool = False
    out: Path | None = None
    curves: Path | None = None
    thinking: Thinking | None = None
    """What an E-step is planned for; None: it is not."""
    tokens: float = 1e9
    iterations: int = 2
    updates: int = 100


def plan(asked: Asked) -> None:
    """Print the plan, as a table or as JSON, and write the YAML of the best layout if it is asked for.

    Raises UserError for options that cannot be, and when no layout fits.
    """
    gpu = gpu_named(asked.gpu)
    made = architecture_named(asked.model, asked.sequence)
    if asked.precision == "fp8" and made.model.num_experts is None:  # which FP8 is planned for, but not trained
        made = replace(made, model=made.model.model_copy(update={"precision": FP8}))
    try:
        peak(gpu, asked.precision)
    except ValueError as error:
        raise UserError(str(error)) from error
    work = Work(asked.sequence, asked.global_batch, 1, asked.precision, {"fp32": 4, "bf16": 2}[asked.gradients])
    console = _console()
    if asked.layout is not None:
        one = _evaluate(asked.layout, made, asked.gpus, work, gpu, asked.rollouts_gib)
        found = Plan([one], [], 1)
    else:
        found = search(made, asked.gpus, work, gpu, asked.rollouts_gib)
    if not found.best:
        raise UserError(_nothing_fits(asked, found, gpu))
    if asked.out is not None:
        write_out(asked.out, configuration(asked, made, found.best[0]), "--out")
    if asked.as_json:
        one_or_many = _one(asked, made, found.best[0], gpu) if asked.layout else _json(asked, made, found, gpu)
        print(json.dumps(one_or_many, indent=2))  # noqa: T201
    else:
        _print(asked, made, found, gpu, console)
    if asked.curves is not None:
        page = _curves(asked, made, work, gpu, asked.curves, Console(stderr=asked.as_json, highlight=False))
        if not asked.as_json:
            console.print(Text.assemble(("written to  ", "bold"), str(page)), soft_wrap=True)


def calibration() -> None:
    """Print every published measurement beside what the model predicts for it."""
    table = _table("published tokens/s/GPU against predicted ones", "model")
    for name in ("GPUs", "precision", "layout", "measured", "predicted", "error", "source"):
        table.add_column(name, justify="right" if name in ("measured", "predicted", "error") else "left")
    for row in published():
        keys = row.row
        table.add_row(
            keys["model"],
            f"{keys['gpus']} {keys['gpu']}",
            keys["precision"],
            describe(row.parallel, row.work.micro_batch),
            f"{row.measured:,.0f}",
            f"{row.predicted():,.0f}",
            "fitted" if row.fit else f"{row.error():+.1%}",
            row.source,
        )
    _console().print(table)


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 180
    return console


def _evaluate(text: str, made: Architecture, gpus: int, work: Work, gpu: Gpu, rollouts_gib: float) -> Planned:
    parallel, micro_batch = parse_layout(text, made.model, gpus)
    work = Work(work.sequence, work.global_batch, micro_batch, work.precision, work.gradient_bytes)
    lines = problems_of(made.model, parallel, work)
    if lines:
        raise UserError("\n".join(f"--layout {text}: {line}" for line in lines))
    return evaluate(made, parallel, work, gpu, rollouts_gib)


def parse_layout(text: str, model: ModelConfig, gpus: int) -> tuple[ParallelConfig, int]:
    """A layout of `gpus` GPUs from "tensor=8,pipeline=8,micro_batch=1": keys of `parallel`, and micro_batch.

    What is left out: `data` from the number of GPUs; sequence parallelism with tensor parallelism, the distributed
    optimizer and overlapped messages are on; ends count as layers where only so the layers divide. UserError.
    """
    given: dict[str, Any] = {}
    known = [*ParallelConfig.model_fields, "micro_batch"]
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, written = part.partition("=")
        value = parse(written, f"--layout {part}")
        if key not in known:
            raise UserError(f"--layout {part}: {key} is no key of a layout; keys are {', '.join(known)}")
        given[key] = value
    micro_batch = given.pop("micro_batch", 1)
    if type(micro_batch) is not int or micro_batch < 1:
        raise UserError(f"--layout micro_batch={micro_batch}: must be a number of rows, at least 1")
    named = ("tensor", "pipeline", "context", "virtual_pipeline")
    tensor, pipeline, context, virtual = (_size(given.get(name, 1)) for name in named)
    product = tensor * pipeline * context
    if "data" not in given:
        if gpus % product:
            raise UserError(
                f"--gpus {gpus} is not a multiple of tensor * pipeline * context = {product} (--layout {text})"
            )
        given["data"] = gpus // product
    replicated = gpus // product > 1 or context > 1
    switches = ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
    defaults: dict[str, Any] = {"sequence": tensor > 1, **dict.fromkeys(switches, replicated)}
    ends = ("first_stage_layers", "last_stage_layers", "count_embedding", "count_output")
    chunks = pipeline * virtual
    if (
        chunks > 1
        and not given.keys() & set(ends)
        and model.num_layers % chunks
        and not (model.num_layers + 2) % chunks
    ):
        defaults |= {"count_embedding": True, "count_output": True}
    if model.num_experts is not None:
        defaults["expert_tensor"] = 1
    try:
        parallel = ParallelConfig(**(defaults | given))
    except ValidationError as error:
        raise UserError("\n".join(f"--layout {text}: {line}" for line in problems(error))) from error
    if parallel.world_size != gpus:
        raise UserError(f"--layout {text}: is of {parallel.world_size} GPUs, not of --gpus {gpus}")
    return parallel, micro_batch


def _size(value: Any) -> int:
    """A size of a layout; 1 for what is none, which `ParallelConfig` refuses."""
    return value if type(value) is int and value > 0 else 1


def configuration(asked: Asked, made: Architecture, planned: Planned) -> str:
    """YAML that `ra3 train` takes: model, layout and batches; all else keeps its default."""
    folder = Path(asked.model)
    if folder.is_dir():
        model: dict[str, Any] = {"hf": asked.model}
    else:
        fields = ModelConfig.model_fields
        values = made.model.model_dump()
        model = {k: v for k, v in values.items() if v != fields[k].get_default() and k not in ("vocab_size", "hf")}
    model |= {"context_length": asked.sequence, "precision": made.model.precision}
    batch = {"global_batch_size": asked.global_batch, "micro_batch_size": planned.work.micro_batch}
    content = {
        "model": model,
        "parallel": layout_keys(planned.parallel),
        "warm_start": batch,
        "mstep": batch,
        "estep": {"micro_batch_size": planned.work.micro_batch},
        **({"rollout": {"engine": "vllm"}} if made.model.fp8_recipe else {}),
    }
    layout = describe(planned.parallel, planned.work.micro_batch)
    lines = [
        f"# Written by ra3 {__version__}: what `ra3 plan` finds fastest for {made.name} on {asked.gpus} {asked.gpu}:",
        f"# {layout}; {planned.memory.total:.1f} GiB a GPU, {planned.step.total:.2f} s a step.",
    ]
    if asked.precision == "fp8" and not made.model.fp8_recipe:
        lines.append("# Planned for FP8, which ra3 train has not for mixtures of experts: this file trains in bf16.")
    return "\n".join(lines) + "\n" + dump(content)


def _one(asked: Asked, made: Architecture, planned: Planned, gpu: Gpu) -> dict[str, Any]:
    more = {}
    if asked.thinking is not None:
        more = em.as_dict(made, planned, asked.thinking, gpu, asked.tokens, asked.iterations, asked.updates)
    return {**planned.as_dict(), **more}


def _curves(asked: Asked, made: Architecture, work: Work, gpu: Gpu, folder: Path, console: Console) -> Path:
    """Write `throughput.png` and `plan.html`; the page."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--curves {folder}: cannot be written ({error.strerror}): choose another folder") from error
    found: list[curves.Point] = []
    with Progress(console=console) as progress, progress.task("planning", len(curves.sizes(asked.gpus))) as task:
        for each in curves.points(made, asked.gpus, work, gpu, asked.rollouts_gib):
            found += each
            task.advance()
    title = f"{made.name} on {gpu.name}, {asked.precision}, rows of {asked.sequence} tokens"
    tables: dict[str, list[dict[str, str]]] = {}
    for point in found:
        tables.setdefault(point.kind, []).append(point.row())
    picture = write_picture(folder / "throughput.png", curves.draw(found, title))
    caution = _caution(gpu, asked.precision)
    page = render_page("plan.html", title=f"Plan: {title}", caution=caution, picture=picture, tables=tables)
    write_text(folder / "plan.html", page)
    return folder / "plan.html"


def _json(asked: Asked, made: Architecture, found: Plan, gpu: Gpu) -> dict[str, Any]:
    return {
        "model": made.name,
        "parameters": total_parameters(made.model, made.vocab_size),
        "gpu": gpu.model_dump(),
        "gpus": asked.gpus,
        "precision": asked.precision,
        "mfu_formula": MFU.format(_peak_tflops(gpu, asked.precision)),
        "layouts": [_one(asked, made, planned, gpu) for planned in found.best[: asked.top]],
        "rejected": [{"reason": r.reason, "count": r.count, "fastest": r.example} for r in found.rejected],
        "tried": found.tried,
    }


def _peak_tflops(gpu: Gpu, precision: str) -> str:
    return f"{peak(gpu, precision) / 1e12:,.0f}"


def _nothing_fits(asked: Asked, found: Plan, gpu: Gpu) -> str:
    lines = [f"--gpus {asked.gpus}: no layout of {asked.model} fits ({found.tried} tried on {gpu.name})"]
    lines += [f"{each.count} layouts: {each.reason}; the nearest: {each.example}" for each in found.rejected]
    return "\n".join(lines)


def _print(asked: Asked, made: Architecture, found: Plan, gpu: Gpu, console: Console) -> None:
    parameters = total_parameters(made.model, made.vocab_size)
    flops = 3 * sum(token_flops(made.model, made.vocab_size, asked.sequence).values())
    title = f"{made.name}: {parameters / 1e9:.2f}B parameters, {flops / 1e9:.1f} GFLOP a token"
    title += (
        f"; {asked.gpus} {gpu.name}, {asked.precision}, {asked.global_batch} rows of {asked.sequence} tokens a step"
    )
    console.print(Text(title, "bold"), soft_wrap=True)
    console.print()
    console.print(_speed(found.best[: asked.top]))
    console.print()
    console.print(_memory(found.best[: asked.top], gpu))
    if asked.thinking is not None:
        console.print()
        console.print(_em_table(asked, made, found.best[: asked.top], asked.thinking, gpu))
    for each in found.rejected:
        console.print()
        text = f"{each.count} of {found.tried} layouts were left out: {each.reason}. The fastest: {each.example}"
        console.print(Text(text), soft_wrap=True)
    console.print()
    console.print(Text(_caution(gpu, asked.precision), "dim"), soft_wrap=True)
    if asked.out is not None:
        console.print(Text.assemble(("written to  ", "bold"), str(asked.out)), soft_wrap=True)


def _caution(gpu: Gpu, precision: str) -> str:
    errors = sorted(abs(row.error()) for row in published() if not row.fit)
    median, most = errors[len(errors) // 2], errors[-1]
    return (
        f"Predicted, not measured. Against {len(errors)} published measurements that the model was not fitted to, "
        f"tokens/s are off by {median:.0%} in the median and {most:.0%} at most; mixtures of experts are not among "
        "them.\n"
        f"MFU = {MFU.format(_peak_tflops(gpu, precision))}."
    )


def _speed(best: list[Planned]) -> Table:
    """Throughput, and each part's share of the step."""
    table = _table("step time, and the share of each part")
    for name in ("tokens/s/GPU", "MFU", "step s"):
        table.add_column(name, justify="right")
    shown = [name for name, _ in best[0].step if any(_share(each, name) >= 0.0005 for each in best)]
    for name in shown:
        table.add_column(name, justify="right", style="dim")
    for each in best:
        row = [f"{each.tokens_per_second_per_gpu:,.0f}", f"{each.mfu:.1%}", f"{each.step.total:.2f}"]
        table.add_row(_name(each), *row, *(f"{_share(each, name):.1%}" for name in shown))
    return table


def _memory(best: list[Planned], gpu: Gpu) -> Table:
    table = _table(f"memory of the fullest GPU, GiB of {gpu.memory_gib:g}")
    for name in best[0].memory.as_dict():
        table.add_column(name, justify="right", style="" if name == "total" else "dim")
    for each in best:
        table.add_row(_name(each), *(f"{value:.1f}" for value in each.memory.as_dict().values()))
    return table


def _em_table(asked: Asked, made: Architecture, best: list[Planned], thinking: Thinking, gpu: Gpu) -> Table:
    """An E-step update, and what a run costs."""
    table = _table(
        f"E-step update of {thinking.documents} documents x {thinking.group}, seconds; GPU hours of {asked.iterations} "
        f"x {asked.updates} updates and {asked.tokens:.3g} tokens"
    )
    names = ("sampling", "scoring", "training", "refit", "update s", "documents/s")
    for name in (*names, "E-steps", "infusion", "M-steps", "GPU hours"):
        table.add_column(name, justify="right", style="" if name in ("update s", "GPU hours") else "dim")
    for each in best:
        update = em.estep_time(made, each, thinking, gpu)
        cost = em.run_cost(made, each, thinking, gpu, asked.tokens, asked.iterations, asked.updates)
        seconds = (update.sampling, update.scoring, update.training, update.refit, update.total)
        table.add_row(
            _name(each),
            *(f"{value:.1f}" for value in seconds),
            f"{thinking.documents / update.total:.1f}",
            *(f"{value:,.0f}" for value in cost.as_dict().values()),
        )
    return table


def _table(title: str, first: str = "layout") -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    return table


def _name(planned: Planned) -> str:
    return describe(planned.parallel, planned.work.micro_batch)


def _share(planned: Planned, part: str) -> float:
    return float(dict(planned.step)[part] / planned.step.total)
