"""E-step throughput: a whole update with the jump-ahead sampler against the same update with naive sampling.

`EStep.step` samples GROUP transcripts of each document, scores them with the frozen model and makes one policy-gradient
update. Only the sampler differs between the sides (see rollout.py, as for the forced thinking rate). The learning rate
is next to nothing, so that the weights, and with them the transcripts, are the same in every repeat.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import ra3_megatron.mcore  # noqa: F401
from benchmarks.measure import Timing, alternate
from benchmarks.rollout import GROUP, TEXT, Workload, forced_rate
from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.runtime import RolloutConfig
from ra3_megatron.config.training import EStepConfig, OptimizerConfig
from ra3_megatron.em.estep import EStep
from ra3_megatron.em.latent_stats import blank_tokens
from ra3_megatron.em.policy import latent_policy
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import Trainer
from ra3_megatron.text.latents import raw

RATE = 0.1
STILL = OptimizerConfig(learning_rate=1e-20, schedule="constant", warmup_fraction=0.0, weight_decay=0.0)


@dataclass(frozen=True)
class EStepResult:
    """Seconds of one update on `documents` documents with each sampler."""

    documents: int
    lines: int
    think_rate: float
    timings: dict[str, Timing]


def measure(work: Workload, runtime: Runtime, repeats: int) -> EStepResult:
    """Time one E-step update on these documents."""
    model, scorer = work.model(runtime), work.model(runtime, seed=2)
    trainer = Trainer(model, STILL, ParallelConfig(), runtime, steps=1_000_000)
    documents = [raw(document, work.latents, work.tokenizer) for document in work.documents]
    keys = [(number,) for number in range(len(documents))]
    think_rates: set[float] = set()

    def update(estep: EStep) -> None:
        metrics, _ = estep.step(documents, keys)
        think_rates.add(metrics["think_rate"])

    def side(sampler: str, cache: bool = True) -> Callable[[], None]:
        config = RunConfig(
            model=work.config,
            text=TEXT,
            estep=EStepConfig(group_size=GROUP, documents_per_step=len(documents), optimizer=STILL),
            rollout=RolloutConfig(sampler=sampler),  # type: ignore[arg-type]
        )
        policy = latent_policy(trainer.model, config, runtime, work.latents, work.tokenizer)
        policy.sampling.engine.share_first_pass = policy.sampling._sampler.naive_cache = cache
        return partial(update, EStep(config, policy, trainer, scorer, blank_tokens(work.tokenizer)))

    sides = {"jump-ahead": side("jump_ahead"), "naive + cache": side("naive"), "naive": side("naive", cache=False)}
    with forced_rate(RATE):
        timings = alternate(sides, repeats)
    (think_rate,) = think_rates  # every side and repeat sampled the same
    return EStepResult(len(documents), work.lines, think_rate, timings)
