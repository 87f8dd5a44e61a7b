"""What the phase `rlvr` does at each step: responses, their rewards, one update, and now and then an evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ra3_megatron.report.responses import write_responses
from ra3_megatron.rlvr.advantages import informative
from ra3_megatron.rlvr.grpo import GRPO
from ra3_megatron.rlvr.problems.problem import Problem
from ra3_megatron.rlvr.records import records_of
from ra3_megatron.rlvr.responses import Response
from ra3_megatron.rlvr.rewards import Graded, Grader
from ra3_megatron.rlvr.sampling import ResponseQueue
from ra3_megatron.rollout.sampling import Sampling
from ra3_megatron.training.agreement import require_agreement
from ra3_megatron.training.context import RunContext


@dataclass
class _Batch:
    """Groups that were sampled for one update."""

    responses: list[Response] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    groups: int = 0


class RlvrSteps:
    """Steps of RLVR for `train_phase`."""

    def __init__(
        self,
        run: RunContext,
        grpo: GRPO,
        queue: ResponseQueue,
        grader: Grader,
        problems: Sequence[Problem],
        evaluate: Callable[[int, ResponseQueue], None],
    ) -> None:
        """problems: to train on; evaluate: the present weights on the held-out problems, behind so many updates."""
        self.run, self.grpo, self.queue, self.grader = run, grpo, queue, grader
        self.problems, self.evaluate = problems, evaluate
        self.last: list[str] = []

    def step(self, step: int) -> dict[str, float]:
        settings, clock = self.run.config.rlvr, self.grpo.trainer.clock
        with clock.part("optimizer"):
            self.grpo.trainer.synchronize()  # what samples reads the weights of the last update
        if step % settings.evaluation_interval == 0:
            with clock.part("evaluation"):
                self.evaluate(step, self.queue)
        batch, metrics = self._sample(step)
        self.last = [self.problems[r.problem].name for r in batch.responses[:: settings.group_size]]
        metrics |= self.grpo.update(batch.responses, batch.rewards)
        metrics["trained_groups"] = float(batch.groups)
        if metrics["updates"]:
            require_agreement("rlvr", f"rlvr step {step + 1}", metrics, self.run.config)
        return metrics

    def _sample(self, step: int) -> tuple[_Batch, dict[str, float]]:
        """Graded groups for one update, and metrics of all that was sampled for it."""
        settings, clock = self.run.config.rlvr, self.grpo.trainer.clock
        kept = _Batch()
        metrics: dict[str, float] = {}
        sampled: list[Response] = []
        rewards: list[float] = []
        graded: list[Graded] = []
        rounds = settings.max_sampling_rounds if settings.dynamic_sampling else 1
        for _ in range(rounds):
            with clock.part("sampling"):
                responses, told = self.queue.next(step, more=step + 1 < settings.steps)
            metrics |= told
            with clock.part("grading"):
                graded.append(self.grader.grade(responses))
            if not sampled and step % settings.evaluation_interval == 0 and self.run.runtime.is_main:
                records = records_of(self.problems, responses, graded[-1], step, self.run.tokenizer)
                write_responses(self.run.folder.path, f"train-{step:06d}", records)
            sampled += responses
            rewards += graded[-1].rewards
            self._keep(kept, responses, graded[-1].rewards)
            if kept.groups >= settings.problems_per_step or not settings.dynamic_sampling:
                break
        metrics["sampling_rounds"] = float(len(graded))
        metrics["staleness"] = float(np.mean([step - r.weight_version for r in sampled]))
        metrics |= self._describe(sampled, rewards)
        for key in graded[0].metrics():
            metrics[key] = float(np.mean([g.metrics()[key] for g in graded]))
        return kept, metrics

    def _keep(self, kept: _Batch, responses: Sequence[Response], rewards: Sequence[float]) -> None:
        """Put the groups that are trained on into `kept`, at most `problems_per_step` of them."""
        settings = self.run.config.rlvr
        size = settings.group_size
        useful = informative(torch.tensor(rewards).view(-1, size)).tolist()
        for number, differs in enumerate(useful):
            if kept.groups == settings.problems_per_step:
                return
            if differs or not settings.dynamic_sampling:
                here = slice(number * size, (number + 1) * size)
                kept.responses += responses[here]
                kept.rewards += rewards[here]
                kept.groups += 1

    def _describe(self, responses: Sequence[Response], rewards: Sequence[float]) -> dict[str, float]:
        groups = torch.tensor(rewards).view(-1, self.run.config.rlvr.group_size)
        solved = groups.mean(1)
        lengths = np.array([response.response_tokens for response in responses])
        right = np.array(rewards) > 0
        by_reward = {
            f"{name}_response_tokens": float(lengths[chosen].mean())
            for name, chosen in (("right", right), ("wrong", ~right))
            if chosen.any()
        }
        return {
            **by_reward,
            "reward": float(groups.mean()),
            "solved_problems": float((solved > 0).float().mean()),
            "all_right": float((solved == 1).float().mean()),
            "all_wrong": float((solved == 0).float().mean()),
            "response_tokens": float(lengths.mean()),
            "longest_response_tokens": float(lengths.max()),
            "cut_responses": float(np.mean([r.cut for r in responses])),
            "sampled_tokens": float(lengths.sum()),
        }

    def sampling(self, step: int) -> Sampling:
        self.queue.settle(step)
        return self.queue.sampling

    def state_dict(self) -> dict[str, Any]:
        return self.queue.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.queue.load_state_dict(state)

    def describe_batch(self) -> Sequence[str]:
        return self.last
