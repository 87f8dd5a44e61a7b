"""Micro-batches of a number of rows against micro-batches of a budget of tokens, on documents of very unequal length.

Both sides make the same optimizer step (next-token prediction on the same documents); a micro-batch holds at most
MICRO_BATCH_SIZE * context_length tokens on both. Lengths are log-normal: most documents are short, a few as long as the
context.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

import ra3_megatron.mcore  # noqa: F401
from benchmarks.measure import Timing, alternate
from benchmarks.mstep import SIZES, VOCABULARY
from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.config.training import OptimizerConfig
from ra3_megatron.em.packing import training_batches
from ra3_megatron.mcore.model import build_model
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import Trainer
from ra3_megatron.text.transcript import Role, Transcript
from ra3_megatron.training.balance import DocumentCost
from ra3_megatron.training.rows import Plan, plan_rows, plan_tokens

DOCUMENTS = (16, 64)
MICRO_BATCH_SIZE = 4


@dataclass(frozen=True)
class PackingResult:
    """Seconds of one optimizer step with each plan of the same documents."""

    lengths: list[int]
    plans: dict[str, Plan]
    timings: dict[str, Timing]


def measure(name: str, runtime: Runtime, repeats: int) -> list[PackingResult]:
    """Time one optimizer step of each plan, for each number of documents."""
    config = SIZES[name]
    network = build_model(config, ParallelConfig(), runtime, VOCABULARY, np.ones((1, VOCABULARY), dtype=bool), seed=1)
    trainer = Trainer(network, OptimizerConfig(), ParallelConfig(), runtime, steps=1_000_000)
    cost = DocumentCost.of(config)
    results = []
    for count in DOCUMENTS:
        documents = make_documents(count, config.context_length)
        lengths = [document.num_tokens for document in documents]
        budget = MICRO_BATCH_SIZE * config.context_length
        plans = {
            f"micro_batch_size={MICRO_BATCH_SIZE}": plan_rows(
                lengths, config.context_length, MICRO_BATCH_SIZE, runtime
            ),
            f"micro_batch_tokens={budget}": plan_tokens(lengths, budget, cost, runtime),
        }
        sides = {
            label: partial(trainer.step, training_batches(documents, plan, runtime)) for label, plan in plans.items()
        }
        results.append(PackingResult(lengths, plans, alternate(sides, repeats)))
    return results


def make_documents(count: int, context: int) -> list[Transcript]:
    """Random tokens, as many as a log-normal draw says (median 1/16 of the context), and one full context."""
    generator = np.random.default_rng(0)
    draws = np.clip(generator.lognormal(np.log(context / 16), 1.0, count - 1), 8, context)
    documents = []
    for length in [context, *draws.astype(int).tolist()]:
        roles = np.full(length, Role.EXPERT, dtype=np.uint8)
        lines = np.zeros(length, dtype=np.int32)
        roles[0], lines[0] = Role.CONTEXT, -1
        ids = generator.integers(0, VOCABULARY, length, dtype=np.int32)
        documents.append(Transcript(ids, roles, lines, np.ones(1, dtype=bool)))
    return documents
