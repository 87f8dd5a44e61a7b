"""One run of RLVR: the phase `rlvr`, with evaluations on held-out problems before, in between and at the end."""

from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

import numpy as np
import torch

from ra3_megatron.corpus.sampler import DocumentSampler
from ra3_megatron.mcore import checkpoint, watchdog
from ra3_megatron.mcore.offload import park
from ra3_megatron.mcore.stopping import StopAsked
from ra3_megatron.mcore.trainer import Trainer
from ra3_megatron.report.responses import write_responses
from ra3_megatron.rlvr.cutting import Cuts
from ra3_megatron.rlvr.grpo import GRPO
from ra3_megatron.rlvr.problems.sources import Problems
from ra3_megatron.rlvr.records import records_of
from ra3_megatron.rlvr.responses import Response
from ra3_megatron.rlvr.rewards import Graded, Grader, joined
from ra3_megatron.rlvr.sampling import Responder, ResponseQueue
from ra3_megatron.rlvr.sandbox import Sandbox
from ra3_megatron.rlvr.steps import RlvrSteps
from ra3_megatron.rollout.sampling import Sampling
from ra3_megatron.training.context import RunContext
from ra3_megatron.training.phases import Phase, final_of, finished, train_phase

Prompts = Sequence[Sequence[int]]

PHASE = Phase("rlvr", 0)
HELD_OUT = "held_out"
"""Phase of the lines of metrics about evaluations: step s is behind s updates."""


class Stream(IntEnum):
    """Second part of the key of every random stream; the first is the seed of the run."""

    ORDER = 101
    RESPONSES = 102
    HELD_OUT = 103


class Rlvr:
    """RLVR of one run in one process; all processes do the same."""

    def __init__(
        self,
        run: RunContext,
        sandbox: Sandbox,
        problems: Problems,
        prompts: Prompts,
        held_out_prompts: Prompts,
        ends: frozenset[int],
    ) -> None:
        """prompts: token ids of each problem's; ends: tokens that end a response."""
        self.run, self.sandbox, self.train, self.held_out = run, sandbox, problems.train, problems.held_out
        self.prompts, self.held_out_prompts = prompts, held_out_prompts
        self.cuts = Cuts(self.train, run.tokenizer, run.latents, ends)
        self.held_out_cuts = Cuts(self.held_out, run.tokenizer, run.latents, ends)
        self.allowed = run.latents.ALL if run.config.rlvr.think else run.latents.no_thought_set

    def optimize(self) -> Path:
        """Train the policy, or go on with it; its final checkpoint."""
        run, settings = self.run, self.run.config.rlvr
        start = run.base
        assert start is not None

        def steps(trainer: Trainer) -> RlvrSteps:
            sampling = run.sampling(trainer.model)
            order = np.random.SeedSequence([run.config.seed, Stream.ORDER]).generate_state(1, np.uint64)[0]
            queue = ResponseQueue(
                self._responder(sampling, self.prompts, self.cuts),
                DocumentSampler(len(self.train), int(order >> np.uint64(1))),
                (run.config.seed, Stream.RESPONSES),
                run.config,
                trainer.clock,
            )
            grpo = GRPO(run.config, trainer, self._reference(start), self.allowed)
            grader = Grader(self.sandbox, self.train, self.cuts, run.runtime)
            responder = self._responder(sampling, self.held_out_prompts, self.held_out_cuts)

            def evaluate(step: int, waiting: ResponseQueue) -> None:
                waiting.settle(step)
                self._evaluate(responder, step)

            return RlvrSteps(run, grpo, queue, grader, self.train, evaluate)

        if not finished(run, PHASE):
            model = run.new_model(drawn=False)
            train_phase(
                run,
                PHASE,
                settings.steps,
                settings.optimizer,
                model,
                start,
                steps,
                updates_per_step=settings.updates_per_rollout,
                log_interval=1,  # totals of tokens and seconds are sums over all lines
            )
        self._evaluate_final()
        return final_of(run, PHASE)

    def _evaluate_final(self) -> None:
        run, steps = self.run, self.run.config.rlvr.steps
        if run.has_logged(HELD_OUT, 0, step=steps):
            return
        model = run.new_model(drawn=False, trained=False)
        checkpoint.load(final_of(run, PHASE), model, run.runtime, verify=run.config.checkpoint.verify)
        sampling = run.sampling(model)
        sampling.publish(steps)
        try:
            self._evaluate(self._responder(sampling, self.held_out_prompts, self.held_out_cuts), steps)
        except StopAsked as asked:
            run.stopped(asked.signal, f"in the evaluation of {PHASE.key}'s end, which begins again")

    def _responder(self, sampling: Sampling, prompts: Prompts, cuts: Cuts) -> Responder:
        return Responder(sampling, prompts, cuts, self.run.config, self.allowed)

    def _evaluate(self, responder: Responder, step: int) -> None:
        """Figures of the published weights on the held-out problems, logged once. Raises StopAsked when a signal came
        meanwhile."""
        run, samples = self.run, self.run.config.rlvr.evaluation_samples
        if not self.held_out:
            return
        responses, graded = self._graded(responder, samples)
        rewards = np.array(graded.rewards).reshape(-1, samples)
        values = {
            "pass_at_1": float(rewards.mean()),
            "solved_problems": float((rewards > 0).any(1).mean()),
            "response_tokens": float(np.mean([r.response_tokens for r in responses])),
            "cut_responses": float(np.mean([r.cut for r in responses])),
            **graded.metrics(),
        }
        run.rewind(HELD_OUT, 0, step - 1)
        run.log(HELD_OUT, 0, step, values)
        run.progress.message(
            f"held out, behind {step} updates: {values['pass_at_1']:.1%} of responses pass, "
            f"{values['response_tokens']:.0f} tokens each"
        )
        if run.runtime.is_main:  # one of each problem
            records = records_of(self.held_out, responses, graded, step, run.tokenizer, every=samples)
            write_responses(run.folder.path, f"held-out-{step:06d}", records)

    def _graded(self, responder: Responder, samples: int) -> tuple[list[Response], Graded]:
        """Responses to the held-out problems, about as many at a time as an update takes, and what became of them."""
        run, settings = self.run, self.run.config.rlvr
        key = (run.config.seed, Stream.HELD_OUT)  # the same draws every time: differences are the weights'
        grader = Grader(self.sandbox, self.held_out, self.held_out_cuts, run.runtime)
        count = max(1, settings.problems_per_step * settings.group_size // samples)
        responses: list[Response] = []
        parts: list[Graded] = []
        for first in range(0, len(self.held_out), count):
            run.stop.check(run.runtime)
            watchdog.touch()
            some = range(first, min(first + count, len(self.held_out)))
            found = responder.begin(some, key, samples, first=first)()
            parts.append(grader.grade(found))
            responses += found
        return responses, joined(parts)

    def _reference(self, start: Path) -> torch.nn.Module | None:
        """The frozen model of the KL term; None without one."""
        if not self.run.config.rlvr.kl_coefficient:
            return None
        model = self.run.new_model(drawn=False, trained=False)
        checkpoint.load(start, model, self.run.runtime, verify=self.run.config.checkpoint.verify)
        model.requires_grad_(False)
        if self.run.config.parallel.offload_scorer:
            park(model, self.run.runtime.device)
        return model
