"""What every topology of the table runs, and everything it computes on the way, in a form that knows no layout.

Six parts, from one seed:
- `streams`: train steps on made-up documents whose every second token carries both losses, with clipped ratios;
- `scores`: rollouts of untrained weights; log-probabilities and entropies of every token; whole distributions;
- `grpo`: responses to prompts, made-up rewards, and policy gradient with a KL term, from the warm start's weights;
- `warm_start`, `estep`, `mstep`: next-token prediction on raw documents; then rollouts, rewards from the frozen warm
  start, advantages and policy gradient; then next-token prediction on documents infused by the E-step's policy. Each
  goes on from the weights of the one before.

Numbers of a part are named tensors by kind; comparison.py says how close each kind must be to one process.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ra3_megatron.config.model import ModelConfig
from ra3_megatron.config.rlvr import RlvrConfig
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.training import EStepConfig, MStepConfig, OptimizerConfig, WarmStartConfig
from ra3_megatron.em.estep import EStep, Rollouts
from ra3_megatron.em.latent_stats import blank_tokens
from ra3_megatron.em.mstep import MStep
from ra3_megatron.em.packing import policy_batches
from ra3_megatron.em.policy import LatentPolicy, latent_policy
from ra3_megatron.em.scoring import token_log_probs
from ra3_megatron.mcore.batch import Events, TokenBatch
from ra3_megatron.mcore.loss import PolicyLoss, Stat
from ra3_megatron.mcore.model import build_model, chunks_of
from ra3_megatron.mcore.startup import Runtime, initialize
from ra3_megatron.mcore.trainer import NonFiniteLoss, StepResult, Trainer, forward
from ra3_megatron.rlvr.cutting import Cuts
from ra3_megatron.rlvr.grpo import GRPO
from ra3_megatron.rlvr.problems.problem import Problem
from ra3_megatron.rlvr.sampling import Responder
from ra3_megatron.rlvr.sandbox import FunctionTests
from ra3_megatron.scaling.counts import stages
from ra3_megatron.text.latents import raw
from ra3_megatron.text.transcript import Transcript
from ra3_megatron.training.rows import Plan, Planner, RowWriter
from tests.mcore.small_models import (
    MODEL,
    VOCAB,
    gradients,
    make_documents,
    make_trainer,
    micro_batches,
    put_in_rows,
    weights,
)
from tests.parallel.topologies import MODELS, Topology
from tests.toy import LARGE, Toy

Numbers = dict[str, dict[str, Tensor]]
"""Kind (see comparison.py) -> name -> values."""
Outcome = dict[str, Numbers]
"""Part -> numbers."""

SEED = 11
STEPS = 4
"""Optimizer steps of each training part."""
POLICY = PolicyLoss(clip_ratio=5.0, importance_cap=2.0)
COUNTS = (Stat.CODE_TOKENS, Stat.THOUGHT_TOKENS, Stat.CHOICES, Stat.DECISIONS, Stat.CLIPPED)
SPLITS: dict[str, dict[str, Any]] = {
    "micro_batches_of_one_row": {"size": 1},
    "micro_batches_of_five_rows": {"size": 5},
    "padding_rows": {"padding_rows": 8},
    "other_places": {"shuffled": True},
    "unequal_ranks": {"uneven": True},
}
"""Ways to deal out a batch that must not matter."""

WORDS = [(a + b).encode() for a in "efgh" for b in "mnopqrst"]
TABLE = [*LARGE, *(b"#" + word for word in WORDS), *WORDS, *(word + b"\n" for word in WORDS[:8])]
"""Words, and as many comments. Both halves of the padded vocabulary (64 ids each) hold words and starts of thoughts."""
LINES = (
    "a = b\n",
    "  ab(c):\n",
    "   b\n\n",
    "em = fn\n",
    " d(a)\n  \n",
    "hp=gq\n",
    "    hs(gt):\n",
    "en(em)\n",
    "hm(ft)\n",
)


# -- what a training run computes -------------------------------------------------------------------------------------


class Record:
    """Results and whole gradients of every step of a trainer. Collective, as a step is."""

    def __init__(self, trainer: Trainer, runtime: Runtime) -> None:
        self.trainer, self.runtime = trainer, runtime
        self.results: list[StepResult] = []
        self.gradients: list[dict[str, Tensor]] = []
        self._step = trainer.step
        trainer.step = self._recorded  # type: ignore[method-assign]

    def _recorded(self, batches: Sequence[TokenBatch], policy: PolicyLoss | None = None) -> StepResult:
        result = self._step(batches, policy)
        self.results.append(result)
        self.gradients.append(gradients(self.trainer, self.runtime))
        return result

    def numbers(self) -> Numbers:
        """Everything so far, and the weights as they are now."""
        assert len(self.results) == STEPS
        self.trainer.synchronize()
        return {
            "loss": {"": torch.tensor([r.loss for r in self.results], dtype=torch.float64)},
            "grad_norm": {"": torch.tensor([r.grad_norm for r in self.results], dtype=torch.float64)},
            "learning_rate": {"": torch.tensor([r.learning_rate for r in self.results], dtype=torch.float64)},
            "counts": {s.name: torch.tensor([r.stats[s] for r in self.results]) for s in COUNTS},
            "stats": {s.name: torch.tensor([r.stats[s] for r in self.results]) for s in Stat if s not in COUNTS},
            "gradients": {
                f"{name}, step {step}": value for step, of in enumerate(self.gradients) for name, value in of.items()
            },
            "weights": weights(self.trainer.model, self.runtime),
        }


def metrics_of(steps: Sequence[dict[str, float]]) -> dict[str, Tensor]:
    """Metrics of several steps by name. The fill rate is left out: it is a property of how batches were dealt out."""
    names = [name for name in steps[0] if name != "fill_rate"]
    return {name: torch.tensor([float(step[name]) for step in steps]) for name in names}


# -- made-up documents ------------------------------------------------------------------------------------------------


def stream_model(topology: Topology) -> ModelConfig:
    return ModelConfig(**{**MODEL.model_dump(), **MODELS[topology.model]})


def streams(
    topology: Topology,
    runtime: Runtime,
    size: int = 2,
    uneven: bool = False,
    padding_rows: int = 0,
    shuffled: bool = False,
) -> Numbers:
    """Steps on both streams, the rows dealt out as said."""
    trainer = make_trainer(topology.parallel, runtime, STEPS, stream_model(topology))
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    planned = stages(stream_model(topology), VOCAB, topology.parallel)[runtime.pipeline_rank]
    assert parameters == planned.parameters, "what ra3 plan counts"
    record = Record(trainer, runtime)
    for step in range(STEPS):
        documents = make_documents(24, seed=100 + step)
        if shuffled:
            documents = documents[::-1]
        rows = [*put_in_rows(documents), *([] for _ in range(padding_rows))]
        trainer.step(micro_batches(rows, runtime, size, uneven), POLICY)
    return record.numbers()


def survive_a_loss_that_is_not_finite(topology: Topology, runtime: Runtime) -> None:
    """A step whose loss is NaN on one rank raises on all, and training goes on as if it had not been."""

    def steps(disturb: Callable[[Trainer], None] | None) -> dict[str, Tensor]:
        trainer = make_trainer(topology.parallel, runtime, 3, stream_model(topology))
        for step in range(2):
            if disturb is not None and step == 1:
                disturb(trainer)
            rows = put_in_rows(make_documents(12, seed=100 + step))
            result = trainer.step(micro_batches(rows, runtime, 2), POLICY)
        trainer.synchronize()
        return {**weights(trainer.model, runtime), "result": torch.tensor([result.loss, result.learning_rate])}

    def disturb(trainer: Trainer) -> None:
        batches = micro_batches(put_in_rows(make_documents(12, seed=9)), runtime, 2)
        if runtime.data_rank == 0:
            weight = batches[0].ce_weight
            assert weight is not None
            weight[0, 0] = torch.nan
        trainer.synchronize()
        before = weights(trainer.model, runtime)
        with pytest.raises(NonFiniteLoss):
            trainer.step(batches, POLICY)
        trainer.synchronize()
        assert all(torch.equal(before[name], value) for name, value in weights(trainer.model, runtime).items())

    expected, found = steps(None), steps(disturb)
    assert all(torch.equal(expected[name], value) for name, value in found.items())


# -- the method -------------------------------------------------------------------------------------------------------


class Stored(list[Transcript]):
    """Documents as a store gives them."""

    @property
    def lengths(self) -> list[int]:
        return [t.num_tokens for t in self]


class Method:
    """The phases of a run on toy documents, in one layout."""

    def __init__(self, topology: Topology, runtime: Runtime) -> None:
        self.runtime = runtime
        self.toy = Toy(runtime, "comment", TABLE, max_latent_tokens=3)
        shape = {**self.toy.architecture.model_dump(), "init_std": 0.3, **MODELS[topology.model]}
        optimizer = OptimizerConfig(
            learning_rate=2e-3, schedule="linear", warmup_fraction=0.25, weight_decay=0.1, clip_grad=0.3, epsilon=1e-4
        )
        packed: dict[str, Any] = {
            "steps": STEPS,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "micro_batch_tokens": topology.micro_batch_tokens,
            "optimizer": optimizer,
        }
        self.config = RunConfig(
            model=ModelConfig(**shape),
            text=self.toy.text,
            parallel=topology.parallel,
            warm_start=WarmStartConfig(**packed),
            mstep=MStepConfig(**packed, thought_weight=0.7),
            estep=EStepConfig(
                steps=STEPS // 2,
                updates_per_rollout=2,
                documents_per_step=5,
                group_size=4,
                micro_batch_size=2,
                micro_batch_tokens=topology.micro_batch_tokens,
                latent_price=0.1,
                format_penalty=0.2,
                horizon=3,
                discount=0.9,
                normalize_advantages=True,
                entropy_coefficient=0.05,
                clip_ratio=0.02,
                importance_cap=1.01,
                optimizer=optimizer,
            ),
            rlvr=RlvrConfig(
                steps=STEPS // 2,
                updates_per_rollout=2,
                problems_per_step=6,
                group_size=4,
                max_response_tokens=7,
                micro_batch_size=2,
                micro_batch_tokens=topology.micro_batch_tokens,
                overlong="keep",
                clip_ratio=0.02,
                clip_ratio_high=0.03,
                importance_cap=1.01,
                kl_coefficient=0.05,
                entropy_coefficient=0.05,
                optimizer=optimizer,
            ),
        )
        generator = random.Random(1)
        codes = ["em\n" + "".join(generator.choices(LINES, k=generator.randint(1, 6))) for _ in range(40)]
        self.documents = Stored(
            raw(self.toy.document(code, f"document {n}"), self.toy.latents, self.toy.tokenizer)
            for n, code in enumerate(codes)
        )

    def model(self) -> torch.nn.Module:
        config, toy = self.config, self.toy
        return build_model(
            config.model, config.parallel, self.runtime, toy.tokenizer.vocab_size, toy.latents.sets, SEED
        )

    def trainer(self, model: torch.nn.Module) -> Trainer:
        return Trainer(model, self.config.estep.optimizer, self.config.parallel, self.runtime, STEPS)

    def policy(self, model: torch.nn.Module) -> LatentPolicy:
        return latent_policy(model, self.config, self.runtime, self.toy.latents, self.toy.tokenizer)

    def sample(self, model: torch.nn.Module, count: int, group: int, key: int) -> list[Transcript]:
        return self.policy(model).sample(self.documents[:count], [(SEED, key, d) for d in range(count)], group)

    def copy(self, model: torch.nn.Module) -> torch.nn.Module:
        """A model of its own with the same weights, as each phase of a run has one."""
        other = self.model()
        for chunk, source in zip(chunks_of(other), chunks_of(model), strict=True):
            chunk.load_state_dict(source.state_dict())
        return other

    # -- parts

    def scores(self) -> Numbers:
        """Rollouts of untrained weights, and what the model says of every token of them."""
        model, latents = self.model(), self.toy.latents
        transcripts = self.sample(model, count=9, group=2, key=1)
        plan = Planner(self.config, self.config.estep, self.runtime).plan(transcripts)
        advantages = [np.ones(t.num_lines, np.float32) for t in transcripts]
        batches = policy_batches(transcripts, advantages, plan, self.runtime, latents, 0.0, temperature=0.9)
        choices = self.collect(model, transcripts, plan, batches)
        everything = token_log_probs(model, transcripts, plan, self.runtime, latents, everything=True)
        return {
            **rollout_numbers(transcripts),
            "log_probs": {
                "of tokens": torch.cat([torch.from_numpy(values) for values in everything]),
                "of choices": choices[1],
            },
            "entropies": {"of choices": choices[2]},
            "logits": {"normalised": self.distributions(model, transcripts[0])},
        }

    def collect(
        self, model: torch.nn.Module, transcripts: list[Transcript], plan: Plan, batches: list[TokenBatch]
    ) -> Tensor:
        """`trainer.forward` of every rank's batches, transcript after transcript, [3, tokens]."""
        found: list[dict[int, Any]] = [{}, {}, {}]
        for rows, out in zip(plan.mine(self.runtime), forward(model, batches, self.runtime), strict=True):
            for stream in range(3):
                found[stream] |= RowWriter(plan, rows, transcripts).collect(out[stream])
        for part in self.runtime.gather_data(found):
            for stream in range(3):
                found[stream] |= part[stream]
        assert all(len(stream) == len(transcripts) for stream in found)
        return torch.stack(
            [torch.from_numpy(np.concatenate([stream[i] for i in range(len(transcripts))])) for stream in found]
        )

    def distributions(self, model: torch.nn.Module, transcript: Transcript) -> Tensor:
        """log p of every token of the vocabulary behind every token of a transcript, [vocab, tokens].

        As training and scoring compute it: these are the logits but for a constant a position, which nothing sees.
        """
        size = self.toy.tokenizer.vocab_size
        n, batches = transcript.num_tokens, []
        padded = -(-size // 32) * 32
        ids = torch.zeros(padded, 64, dtype=torch.long)
        ids[:, :n] = torch.from_numpy(transcript.ids.astype(np.int64))
        mask = torch.zeros(padded, 64, dtype=torch.bool)
        mask[:size, :n] = True
        positions = torch.arange(64).expand(padded, 64).contiguous()
        targets = torch.arange(padded).clamp(max=size - 1)[:, None].expand(padded, 64).contiguous()
        for start in range(0, padded, 32):  # four micro-batches, the same on every data-parallel rank
            part = slice(start, start + 32)
            batches.append(
                TokenBatch(
                    ids[part],
                    positions[part],
                    torch.zeros_like(ids[part]),
                    targets[part],
                    choices=Events(mask[part]),
                )
            )
        assert len(batches) == 4
        return torch.cat([out[1] for out in forward(model, batches, self.runtime)])[:size, :n]

    def warm_start(self, model: torch.nn.Module) -> Numbers:
        return self._packed(model, self.documents, self.config.warm_start, 1.0)

    def mstep(self, model: torch.nn.Module, infused: list[Transcript]) -> Numbers:
        return self._packed(model, Stored(infused), self.config.mstep, self.config.mstep.thought_weight)

    def _packed(self, model: torch.nn.Module, documents: Stored, section: Any, thought_weight: float) -> Numbers:
        trainer = self.trainer(model)
        record = Record(trainer, self.runtime)
        step = MStep(self.config, section, trainer, documents, thought_weight)
        metrics = [step.step() for _ in range(STEPS)]
        return {**record.numbers(), "metrics": metrics_of(metrics)}

    def estep(self, model: torch.nn.Module, scorer: torch.nn.Module) -> Numbers:
        trainer = self.trainer(model)
        record = Record(trainer, self.runtime)
        step = EStep(self.config, self.policy(trainer.model), trainer, scorer, blank_tokens(self.toy.tokenizer))
        count = self.config.estep.documents_per_step
        metrics, rollouts = [], []
        for number in range(self.config.estep.steps):
            documents = self.documents[number * count : (number + 1) * count]
            found = step.step(documents, [(SEED, 2, number, d) for d in range(count)])
            metrics.append(found[0])
            rollouts.append(found[1])
        return {
            **record.numbers(),
            **rollout_numbers([t for r in rollouts for t in r.transcripts]),
            **reward_numbers(rollouts),
            "metrics": metrics_of(metrics),
        }

    def grpo(self, model: torch.nn.Module, reference: torch.nn.Module) -> Numbers:
        """Rewards are a hash of what was written: no two responses of a group need agree."""
        trainer = self.trainer(model)
        record = Record(trainer, self.runtime)
        config, toy = self.config, self.toy
        sampling = self.policy(trainer.model).sampling
        count = config.rlvr.problems_per_step * config.rlvr.steps
        prompts = [document.ids[:4].tolist() for document in self.documents[:count]]
        # every other response ends at a stop
        problems = [
            Problem(str(n), toy.tokenizer.decode(prompt), FunctionTests("", ("f()",)), stop=("a",) * (n % 2))
            for n, prompt in enumerate(prompts)
        ]
        cuts = Cuts(problems, toy.tokenizer, toy.latents)
        responder = Responder(sampling, prompts, cuts, config, toy.latents.ALL)
        step = GRPO(config, trainer, reference, toy.latents.ALL)
        metrics, responses = [], []
        for number in range(config.rlvr.steps):
            trainer.synchronize()
            sampling.publish(number)
            chosen = range(number * config.rlvr.problems_per_step, (number + 1) * config.rlvr.problems_per_step)
            found = responder.begin(list(chosen), (SEED, 4, number), config.rlvr.group_size)()
            rewards = [int(each.ids.sum()) % 5 / 4 for each in found]
            metrics.append(step.update(found, rewards))
            responses += found
        return {
            **record.numbers(),
            "transcripts": {
                "tokens of each": torch.tensor([each.num_tokens for each in responses]),
                "ids": torch.from_numpy(np.concatenate([each.ids for each in responses])),
                "versions": torch.tensor([each.weight_version for each in responses]),
            },
            "behaviour": {"log policy": torch.from_numpy(np.concatenate([each.log_probs for each in responses]))},
            "metrics": metrics_of(metrics),
        }


def rollout_numbers(transcripts: Sequence[Transcript]) -> Numbers:
    def joined(values: list[Any]) -> Tensor:
        return torch.from_numpy(np.concatenate(values))

    log_probs = [t.log_probs for t in transcripts if t.log_probs is not None]
    assert len(log_probs) == len(transcripts)
    return {
        "transcripts": {
            "tokens of each": torch.tensor([t.num_tokens for t in transcripts]),
            "ids": joined([t.ids for t in transcripts]),
            "roles": joined([t.roles for t in transcripts]),
            "think": joined([t.think for t in transcripts]),
            "offered": joined([t.offered for t in transcripts]),
        },
        "behaviour": {"log q": joined(log_probs)},
    }


def reward_numbers(rollouts: Sequence[Rollouts]) -> Numbers:
    def joined(field: str) -> Tensor:
        return torch.from_numpy(np.concatenate([values for r in rollouts for values in getattr(r, field)]))

    return {
        "rewards": {"log likelihood": joined("log_likelihoods"), "reward": joined("rewards")},
        "advantages": {"": joined("advantages")},
    }


# -- all of it --------------------------------------------------------------------------------------------------------


def run(topology: Topology) -> Outcome:
    """Every part in this layout. Collective; the same on every process."""
    runtime = initialize(topology.parallel, seed=1)
    outcome: Outcome = {"streams": streams(topology, runtime)}
    if topology.splits:
        outcome |= {f"streams, {name}": streams(topology, runtime, **split) for name, split in SPLITS.items()}
    survive_a_loss_that_is_not_finite(topology, runtime)
    method = Method(topology, runtime)
    outcome["scores"] = method.scores()
    pi = method.model()
    outcome["warm_start"] = method.warm_start(pi)
    q = method.copy(pi)
    outcome["grpo"] = method.grpo(method.copy(pi), reference=method.model().requires_grad_(False))
    outcome["estep"] = method.estep(q, scorer=method.copy(pi).requires_grad_(False))
    infused = method.sample(method.copy(q), len(method.documents), group=1, key=3)
    outcome["mstep"] = {**method.mstep(method.copy(pi), infused), **rollout_numbers(infused)}
    return outcome
