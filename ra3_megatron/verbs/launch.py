"""`ra3 launch`: a job script shown, checked and planned before it is submitted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from ra3_megatron.cluster.job_script import Job, find_script, read_job, render, submit
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import load_config
from ra3_megatron.config.run import RunConfig
from ra3_megatron.corpus.sources import check_sources
from ra3_megatron.scaling import em
from ra3_megatron.scaling.counts import total_parameters
from ra3_megatron.scaling.em import Thinking
from ra3_megatron.scaling.memory import GIB, Memory, Work, frozen_gib
from ra3_megatron.scaling.search import Planned, describe, evaluate
from ra3_megatron.scaling.tables import Architecture, Gpu, gpu_named
from ra3_megatron.verbs.run_dir import write_out

THINKING = Thinking(think_rate=0.4)
"""What the E-step is planned for: the paper's most thoughts."""


@dataclass(frozen=True)
class Expected:
    """What the planner says of a job."""

    planned: Planned
    memory: Memory
    """With the frozen model of the E-step and an engine on the same GPU."""
    update_seconds: float
    """An E-step update."""
    estep_hours: float
    infusion_hours: float
    mstep_hours: float
    """Of the whole run, NTP's included."""

    @property
    def hours(self) -> float:
        """Of the whole run; held-out measurements, saving and starting are not in it."""
        return self.estep_hours + self.infusion_hours + self.mstep_hours


def launch(
    name: str,
    arguments: Sequence[str],
    options: Mapping[str, str],
    gpu: str,
    dry_run: bool,
    out: Path | None,
) -> None:
    """Check the job `name` with these options of sbatch and overrides; show it (dry_run) or submit it.

    Raises UserError when its configuration, layout or memory does not fit, or when what it reads is not there.
    """
    device = gpu_named(gpu)
    job = read_job(find_script(name), options, arguments)
    config = load_config(job.config, [*job.settings, f"run_dir={job.run_dir}"])
    if config.parallel.world_size != job.trainers:
        advice = config.layout_advice(job.trainers)
        raise UserError(
            f"{job.script.name}: the layout needs {config.parallel.world_size} processes, and the job has "
            f"{job.trainers} on {job.train_nodes} nodes" + (f"; {advice}" if advice else "")
        )
    each = job.trainers // job.train_nodes
    if job.gpus_per_node and each > job.gpus_per_node:
        raise UserError(
            f"{job.script.name}: {each} processes on each node (ntasks-per-node), and {job.gpus_per_node} GPUs: every "
            "process needs one of its own"
        )
    _check_inputs(config)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 180
    planned = job.gpus_per_node and job.verb == "train"
    expected = expectation(config, device) if planned else None
    if dry_run:
        console.print(
            Syntax(render(job), "bash", background_color="default") if console.is_terminal else Text(render(job))
        )
        console.print(Text(f"# every attempt runs\n{job.command()}\n"), soft_wrap=True)
    _print(job, config, expected, gpu, console)
    if expected is not None and expected.memory.total > device.memory_gib:
        raise UserError(
            f"{job.script.name}: needs {expected.memory.total:.1f} GiB of the {device.memory_gib:g} GiB of a "
            f"{gpu}: more nodes, larger parallel.tensor or parallel.pipeline, parallel.recompute=full, or "
            "RA3_ROLLOUT_NODES (`ra3 plan` shows layouts that fit)"
        )
    if out is not None:
        write_out(out, render(job), "--out")
        console.print(Text.assemble(("written to  ", "bold"), str(out)), soft_wrap=True)
    if not dry_run:
        console.print(Text.assemble(("submitted   ", "bold"), f"job {submit(job, options, arguments)}"), soft_wrap=True)


def _check_inputs(config: RunConfig) -> None:
    """Refuse files and folders that are not there, which nodes would find out hours later, when the job starts."""
    named = config.starts
    if config.method != "rlvr":
        check_sources(config.corpus)
    elif config.rlvr.problems.path is not None:
        named["rlvr.problems.path"] = Path(config.rlvr.problems.path)
    for key, path in named.items():
        if not path.exists():
            raise UserError(f"{key}={path}: no such file or folder")


def expectation(config: RunConfig, gpu: Gpu) -> Expected:
    """What the planner says of this configuration on these GPUs. Its vocabulary must be known (`model.hf`)."""
    if config.model.vocab_size is None:
        raise UserError("model.vocab_size is not known: give model.hf (RA3_MODEL), so that the job can be planned")
    made = Architecture(config.model.hf or "model", config.model, config.model.vocab_size)
    batch = config.mstep
    kind = "fp8" if config.model.fp8_recipe else config.model.precision
    work = Work(config.model.context_length, batch.global_batch_size, batch.micro_batch_size, kind)
    planned = evaluate(made, config.parallel, work, gpu, _engine_gib(config, made, work.element_bytes))
    thinks = config.method == "ra3" and not math.isinf(config.estep.latent_price)
    scorer = frozen_gib(made.model, made.vocab_size, config.parallel, work) if thinks else 0.0
    held = replace(planned.memory, scorer=scorer)
    iterations, gpus = config.em.iterations, config.parallel.world_size
    tokens = float(iterations * batch.steps * work.global_batch * work.sequence)
    thinking = replace(THINKING, documents=config.estep.documents_per_step, group=config.estep.group_size)
    if thinks:
        update = em.estep_time(made, planned, thinking, gpu).total
        cost = em.run_cost(made, planned, thinking, gpu, tokens, iterations, config.estep.steps)
        estep, infusion = cost.esteps / gpus, cost.infusion / gpus
    else:
        update, estep, infusion = 0.0, 0.0, 0.0
    arms = 1 + (config.method == "ra3" and config.em.control)
    msteps = arms * iterations * batch.steps * planned.step.total / 3600
    return Expected(planned, held, update, estep, infusion, msteps)


def _engine_gib(config: RunConfig, made: Architecture, element_bytes: int) -> float:
    """What a vLLM engine on the trainer's GPUs holds of each."""
    rollout = config.rollout
    if rollout.engine != "vllm" or rollout.placement != "colocated" or math.isinf(config.estep.latent_price):
        return 0.0
    weights = element_bytes * total_parameters(made.model, made.vocab_size) / GIB / rollout.vllm.tensor
    return float(weights + rollout.vllm.kv_cache_gib)


def _print(job: Job, config: RunConfig, expected: Expected | None, gpu: str, console: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    nodes = f"{job.train_nodes} for training"
    nodes += f", {job.rollout_nodes} for vLLM" if job.rollout_nodes else ""
    each = f"{job.gpus_per_node} {gpu}" if job.gpus_per_node else "CPU"
    rows = {
        "nodes": f"{nodes}, {each} each",
        "layout": describe(config.parallel, config.mstep.micro_batch_size) if expected else _sizes(config),
        "run folder": job.run_dir,
    }
    if job.verb != "train":
        rows["plan"] = "none: the planner knows mid-training alone; memory is about that of an M-step and the engine"
    if expected is not None:
        parts = expected.memory.as_dict()
        total = parts.pop("total")
        held = ", ".join(f"{name} {value:.1f}" for name, value in parts.items() if value >= 0.05)
        planned = expected.planned
        rows |= {
            "memory": f"{total:.1f} GiB of the {gpu_named(gpu).memory_gib:g} of the fullest GPU in an E-step: {held}",
            "M-step": f"{planned.step.total:.2f} s a step, {planned.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, MFU "
            f"{planned.mfu:.0%}",
            "E-step": f"{expected.update_seconds:.0f} s an update, with a thought on 40% of lines"
            + (", sampling reckoned as if on the trainer's GPUs" if job.rollout_nodes else ""),
            "run": f"{expected.hours:.1f} hours: E-steps {expected.estep_hours:.1f}, infusion "
            f"{expected.infusion_hours:.1f}, M-steps {expected.mstep_hours:.1f}",
        }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console.print(table)
    if expected is not None:
        console.print(Text("Predicted, not measured (docs/planner.md).", "dim"))


def _sizes(config: RunConfig) -> str:
    parallel = config.parallel
    names = ("tensor", "pipeline", "context", "data")
    return ", ".join(f"{name} {getattr(parallel, name)}" for name in names if getattr(parallel, name) > 1) or "one"
