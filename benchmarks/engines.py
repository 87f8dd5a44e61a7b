"""E-step throughput by rollout engine: the live model, vLLM in turn with training, and vLLM one update ahead of it.

Each repeat takes UPDATES updates of one side: sampling GROUP transcripts of each document, scoring, one policy-gradient
update and, for vLLM, sending the new weights. Trainer and engine have one thread each, so in turn one of them waits,
and one update ahead both work. The thinking rate is forced and the learning rate next to nothing, as in estep.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import ra3_megatron.mcore  # noqa: F401
from benchmarks.estep import RATE, STILL
from benchmarks.measure import Timing, alternate
from benchmarks.rollout import GROUP, TEXT, Workload, forced_rate
from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.runtime import RolloutConfig, VllmConfig
from ra3_megatron.config.training import EStepConfig
from ra3_megatron.corpus.sampler import SequentialSampler
from ra3_megatron.em.estep import EStep
from ra3_megatron.em.latent_stats import blank_tokens
from ra3_megatron.em.policy import latent_policy
from ra3_megatron.em.rollouts import RolloutQueue
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import Trainer
from ra3_megatron.rollout.engine_pool import EnginePool
from ra3_megatron.text.latents import raw

UPDATES = 4
DOCUMENTS = 6
"""Of the workload at most: the sides are slow on a CPU."""
LIVE, IN_TURN, AHEAD = "live model", "vLLM, in turn", "vLLM, one update ahead"


@dataclass(frozen=True)
class EngineResult:
    """Seconds of UPDATES updates on `documents` documents with each engine."""

    documents: int
    think_rates: dict[str, float]
    timings: dict[str, Timing]


def measure(work: Workload, runtime: Runtime, repeats: int, folder: Path) -> EngineResult:
    """Time E-step updates on these documents. folder: for the engine's description and log."""
    model, scorer = work.model(runtime), work.model(runtime, seed=2)
    trainer = Trainer(model, STILL, ParallelConfig(), runtime, steps=1_000_000)
    documents = [raw(document, work.latents, work.tokenizer) for document in work.documents[:DOCUMENTS]]
    rates: dict[str, float] = {}
    blank = blank_tokens(work.tokenizer)

    def config(engine: str, staleness: int) -> RunConfig:
        settings = EStepConfig(
            steps=UPDATES, group_size=GROUP, documents_per_step=len(documents), importance_cap=2.0, optimizer=STILL
        )
        rollout = RolloutConfig(engine=engine, max_staleness=staleness, vllm=VllmConfig(threads=1))  # type: ignore[arg-type]
        return RunConfig(model=work.config, text=TEXT, estep=settings, rollout=rollout)

    pool = EnginePool(config("vllm", 0), runtime, work.latents, work.tokenizer, folder)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        of_engine = {
            engine: latent_policy(trainer.model, config(engine, 0), runtime, work.latents, work.tokenizer, 0, engines)
            for engine, engines in (("megatron", None), ("vllm", pool))
        }

        def updates(name: str, engine: str, staleness: int) -> None:
            settings, policy = config(engine, staleness), of_engine[engine]
            queue = RolloutQueue(policy, documents, SequentialSampler(len(documents)), (1,), settings)
            estep = EStep(settings, policy, trainer, scorer, blank)
            for step in range(UPDATES):
                trainer.synchronize()
                transcripts, _ = queue.next(step)
                metrics, _ = estep.update(transcripts)
            rates[name] = metrics["think_rate"]

        sides: dict[str, Callable[[], None]] = {
            LIVE: partial(updates, LIVE, "megatron", 0),
            IN_TURN: partial(updates, IN_TURN, "vllm", 0),
            AHEAD: partial(updates, AHEAD, "vllm", 1),
        }
        with forced_rate(RATE):
            timings = alternate(sides, repeats)
    finally:
        torch.set_num_threads(threads)
        pool.close()
    return EngineResult(len(documents), rates, timings)
