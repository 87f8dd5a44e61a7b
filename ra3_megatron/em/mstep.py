"""The M-step: next-token prediction on documents, infused or not. Warm start and NTP are the same step.

Documents come in an order that is fixed before the phase. A step takes as many as `global_batch_size` rows of
`model.context_length` tokens hold, however they are dealt out to micro-batches then.
Cross-entropy is reported apart for code tokens, thought tokens and decision markers (`tokens` format): only the first
compares with NTP. It is that of training: in the `comment` format a line's first visible token has its decision in it.
"""

from typing import Any

from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.training import PackedTraining
from ra3_megatron.corpus.packing import PackedBatcher
from ra3_megatron.corpus.sampler import SequentialSampler
from ra3_megatron.em.packing import training_batches
from ra3_megatron.mcore.loss import Stat
from ra3_megatron.mcore.trainer import Trainer
from ra3_megatron.training.rows import Planner


class MStep:
    """Trains the model in `trainer` on `documents`, one after another, as `settings`, a section of `config`, says."""

    def __init__(
        self,
        config: RunConfig,
        settings: PackedTraining,
        trainer: Trainer,
        documents: Any,
        thought_weight: float = 1.0,
    ) -> None:
        self.trainer = trainer
        self.documents = documents
        self.thought_weight = thought_weight
        self.planner = Planner(config, settings, trainer.runtime)
        self.batcher = PackedBatcher(
            documents, SequentialSampler(len(documents)), settings.global_batch_size, config.model.context_length
        )

    def step(self) -> dict[str, float]:
        """One update on the next rows; metrics of it."""
        with self.trainer.clock.part("data"):
            rows = next(self.batcher)
            taken = [index for row in rows for index in row]
            place = {index: number for number, index in enumerate(taken)}
            transcripts = [self.documents[index] for index in taken]
            self.last_documents = [t.document for t in transcripts]
            plan = self.planner.plan(transcripts, rows=[[place[index] for index in row] for row in rows])
            batches = training_batches(transcripts, plan, self.trainer.runtime, self.thought_weight)
        result = self.trainer.step(batches)
        metrics = {
            "loss": result.loss,
            "code_ce": result.mean(Stat.CODE_NLL, Stat.CODE_TOKENS) or 0.0,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "tokens": plan.tokens,  # those of prompts too: they are not trained on, but cost as much
            "fill_rate": plan.fill_rate,
        }
        apart = {
            "thought_ce": result.mean(Stat.THOUGHT_NLL, Stat.THOUGHT_TOKENS),
            "decision_ce": result.mean(Stat.DECISION_NLL, Stat.DECISION_TOKENS),
        }
        return metrics | {name: value for name, value in apart.items() if value is not None}
