"""One cell of a scaling study: real steps of the trainer, each with its time, in the processes of a layout.

    python -m ra3_megatron.verbs.scaling_cell --cell FILE CORPUS ROWS WARMUP UPDATES BUSY

FILE is the cell's configuration, BUSY how many cores others used right before. The steps are those of the warm start
(`em/mstep.py`, `mcore/trainer.py`), without checkpoints and evaluations. Then, in the same processes, the device is
measured (`scaling_probe.py`) and E-step updates are taken. Everything goes to `summary.json` of the cell, written at
the end: a cell without it was not measured.
"""

import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import load_config
from ra3_megatron.config.run import RunConfig
from ra3_megatron.report.run_folder import RunFolder, write_json
from ra3_megatron.study.scaling.results import KIND
from ra3_megatron.verbs.processes import in_process, runs_here, start_processes

GIB = 2**30
CELL = "--cell"
MODULE = "ra3_megatron.verbs.scaling_cell"
"""This module, which is __main__ in the processes of a cell."""


def command(file: Path, *arguments: object) -> list[str]:
    """The command that measures the cell in `file`."""
    return [sys.executable, "-m", MODULE, CELL, str(file), *map(str, arguments)]


def main(arguments: Sequence[str]) -> int:
    """Measure a cell, here or in processes that are started for it; the exit code."""
    try:
        config = load_config(Path(arguments[0]), [], resolved=True)
        if runs_here(config):
            _measure_here(config, list(arguments[1:]))
            return 0
        return start_processes(config, MODULE, *arguments[1:])
    except UserError as error:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            sys.stderr.write("".join(f"ra3: {line}\n" for line in str(error).splitlines()))
        return 2


def _measure_here(config: RunConfig, arguments: list[str]) -> None:
    import ra3_megatron.mcore  # noqa: F401
    from ra3_megatron.mcore import startup
    from ra3_megatron.report.versions import collect_versions

    corpus, rows, warmup, updates, busy = arguments
    runtime = startup.initialize(config.parallel, config.seed)
    try:
        measured = _measure(config, runtime, Path(corpus), rows, int(warmup), int(updates))
        if runtime.is_main:
            folder = RunFolder(Path(config.run_dir))
            write_json(folder.versions, collect_versions())
            facts = {"kind": KIND, "rows": rows, "warmup": int(warmup), "busy_cores": float(busy)}
            write_json(folder.summary, {**facts, **measured})
        runtime.barrier()
    finally:
        startup.shutdown()


def _measure(config: RunConfig, runtime: Any, corpus: Path, rows: str, warmup: int, updates: int) -> dict[str, Any]:
    from ra3_megatron.corpus.build import open_corpus
    from ra3_megatron.em.context import EMContext
    from ra3_megatron.em.latent_stats import blank_tokens
    from ra3_megatron.report.progress import Progress
    from ra3_megatron.training.identity import identity_of
    from ra3_megatron.verbs.scaling_probe import node, probe

    content = open_corpus(config, corpus)
    progress = Progress("off", enabled=False)
    folder = RunFolder(Path(config.run_dir))
    run = EMContext(
        config,
        folder,
        runtime,
        content.tokenizer,
        content.format,
        progress,
        None,
        identity_of(content.tokenizer),
        corpus=content,
        blank=blank_tokens(content.tokenizer),
    )
    before = _used(runtime)
    steps, peak, starting = _training(run, rows, warmup)
    memory = {"rank": runtime.rank, "before_gib": before / GIB, "peak_gib": peak / GIB}
    found: dict[str, Any] = {
        "processes": runtime.world_size,
        "vocab_size": content.tokenizer.vocab_size,
        "cores": len(os.sched_getaffinity(0)),
        "threads": config.parallel.threads,
        "host_processes": max(Counter(runtime.gather_all(socket.gethostname())).values()),
        "nodes": sorted(set(runtime.gather_all(node()))),
        "memory": runtime.gather_all(memory),
        "memory_of": "device memory" if runtime.device.type == "cuda" else "resident set",
        "steps": steps,
        "layer_start_seconds": starting,
    }
    found["probes"] = runtime.gather_all(probe(config, runtime))
    if updates:
        found["estep"] = _estep(run, updates)
    return found


def _training(run: Any, rows: str, warmup: int) -> tuple[list[dict[str, float]], float, float | None]:
    """All steps, each with its seconds and what the trainer says of it; bytes of this process at the peak of the steps
    behind the warm-up; seconds of a layer that has hardly anything to do (None with several processes)."""
    from ra3_megatron.em.mstep import MStep
    from ra3_megatron.mcore.trainer import Trainer

    settings, runtime = run.config.warm_start, run.runtime
    model = run.new_model()
    trainer = Trainer(model, settings.optimizer, run.config.parallel, runtime, settings.steps)
    mstep = MStep(run.config, settings, trainer, _documents(run, rows))
    steps = []
    for number in range(settings.steps):
        if number == warmup:
            _reset_peak(runtime)
        steps.append(_timed(mstep.step, trainer, runtime))
    peak = _peak(runtime)
    return steps, peak, _layer_seconds(run, trainer.model) if runtime.world_size == 1 else None


def _layer_seconds(run: Any, model: Any) -> float:
    """Seconds of a layer's forward pass over the shortest row that there is: what it takes to start its kernels."""
    from ra3_megatron.em.packing import training_batches
    from ra3_megatron.mcore.model import chunks_of
    from ra3_megatron.mcore.trainer import forward
    from ra3_megatron.training.rows import Planner

    documents = [FullRows(1, 16, run.corpus.tokenizer.vocab_size, run.config.seed)[0]]
    batches = training_batches(
        documents, Planner(run.config, run.config.warm_start, run.runtime).plan(documents), run.runtime
    )
    begun: list[float] = []
    taken: list[float] = []
    hooks = []
    for layer in chunks_of(model)[0].decoder.layers:
        hooks.append(layer.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter())))
        hooks.append(layer.register_forward_hook(lambda *_: taken.append(time.perf_counter() - begun[-1])))
    for _ in range(5):
        forward(model, batches, run.runtime)
    for hook in hooks:
        hook.remove()
    return min(taken)


def _timed(step: Any, trainer: Any, runtime: Any) -> dict[str, float]:
    """Metrics of a step with its seconds and those of its parts, as a run measures them: from the documents to the
    updated weights."""
    begin = time.perf_counter()
    with trainer.clock.step():
        metrics = step()
    if runtime.device.type == "cuda":
        import torch

        torch.cuda.synchronize(runtime.device)
    elapsed = time.perf_counter() - begin
    kept = ("loss", "tokens", "fill_rate", "think_rate", "distinct_transcripts", "refit_seconds")
    parts = {f"seconds_{part}": float(value) for part, value in trainer.clock.seconds.items()}
    return {
        "seconds": elapsed,
        **parts,
        **{k: float(v) for k, v in metrics.items() if k in kept},
    }


def _documents(run: Any, rows: str) -> Any:
    """What the steps read."""
    from ra3_megatron.em.order import DocumentOrder, Ordered, Stream, order_seed

    settings, length = run.config.warm_start, run.config.model.context_length
    if rows == "full":
        count = settings.global_batch_size * settings.steps
        return FullRows(count, length, run.corpus.tokenizer.vocab_size, run.config.seed)
    store = run.corpus.store("warm", "train")
    order = DocumentOrder(store, settings, length, order_seed(run.config.seed, Stream.WARM_ORDER))
    return Ordered(store, order.of(1))


class FullRows:
    """Documents of exactly one row each: random tokens, all of them the expert's."""

    def __init__(self, count: int, length: int, vocab_size: int, seed: int) -> None:
        self._length, self._vocab_size, self._seed = length, vocab_size, seed
        self.lengths = np.full(count + 1, length, dtype=np.int32)  # the batcher looks one document ahead

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Any:
        from ra3_megatron.text.transcript import Role, Transcript

        draw = np.random.default_rng([self._seed, index])
        return Transcript(
            ids=draw.integers(0, self._vocab_size, self._length, dtype=np.int32),
            roles=np.full(self._length, Role.EXPERT, dtype=np.uint8),
            lines=np.zeros(self._length, dtype=np.int32),
            offered=np.zeros(1, dtype=np.bool_),
            document=f"generated {index}",
        )


def _estep(run: Any, updates: int) -> dict[str, Any]:
    """E-step updates from the run's base (initial weights, where it has none), behind one that is not counted."""
    from ra3_megatron.corpus.sampler import DocumentSampler
    from ra3_megatron.em.estep import EStep
    from ra3_megatron.em.order import Stream, order_seed
    from ra3_megatron.em.rollouts import RolloutQueue
    from ra3_megatron.em.steps import EStepSteps
    from ra3_megatron.mcore import checkpoint
    from ra3_megatron.mcore.trainer import Trainer
    from ra3_megatron.verbs.base import base_checkpoint, hf_source
    from ra3_megatron.verbs.engines import rollout_engines

    config, runtime, settings = run.config, run.runtime, run.config.estep
    base = base_checkpoint(config, run.folder, runtime, run.progress, config.warm_start.checkpoint)
    source = hf_source(run.folder)
    with rollout_engines(config, runtime, run.latents, run.tokenizer, run.folder.path, source) as run.engines:
        models = [run.new_model(drawn=base is None) for _ in range(2)]
        if base is not None:
            for model in models:
                checkpoint.load(base, model, runtime)
        scorer, model = models
        scorer.requires_grad_(False)
        trainer = Trainer(model, settings.optimizer, config.parallel, runtime, settings.steps)
        policy = run.policy(trainer.model)
        store = run.corpus.store("mid", "train")
        sampler = DocumentSampler(len(store), order_seed(config.seed, Stream.ESTEP_ORDER, 1))
        queue = RolloutQueue(policy, store, sampler, (config.seed, Stream.ESTEP, 1), config, trainer.clock)
        steps = EStepSteps(run, 1, EStep(config, policy, trainer, scorer, run.blank), queue)
        taken = [_timed(lambda number=number: steps.step(number), trainer, runtime) for number in range(updates + 1)]
    return {
        "engine": config.rollout.engine,
        "documents": settings.documents_per_step,
        "group_size": settings.group_size,
        "base": base is not None,
        "updates": taken[1:],
    }


def _used(runtime: Any) -> float:
    """Bytes that this process holds."""
    if runtime.device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(runtime.device)
        return float(total - free)
    return float(psutil.Process().memory_info().rss)


def _reset_peak(runtime: Any) -> None:
    if runtime.device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(runtime.device)
        return
    with suppress(OSError):  # not allowed: the peak is since the process began
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak(runtime: Any) -> float:
    """Bytes of this process at most since `_reset_peak`; of a GPU what torch had reserved, and what it has not."""
    if runtime.device.type == "cuda":
        import torch

        outside = _used(runtime) - torch.cuda.memory_reserved(runtime.device)
        return float(torch.cuda.max_memory_reserved(runtime.device) + outside)
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


if __name__ == "__main__":
    if sys.argv[1:2] == [CELL]:
        sys.exit(main(sys.argv[2:]))
    sys.exit(in_process(_measure_here))
