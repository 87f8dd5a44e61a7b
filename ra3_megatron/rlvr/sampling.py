"""Responses for one update after another: sampled with the present weights, or one batch ahead of time.

With `rollout.max_staleness=0` what an update trains on was sampled with the weights it starts from. With 1, the next
batch is sampled while this update trains, with the weights that it started from; the behaviour log-probabilities that
responses carry correct for it. The first batch has no older weights.

What is sampled ahead is part of the position that a checkpoint keeps. A response depends on the weights and on its key
(seed, batch, place, number in the group) alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ra3_megatron.config.run import RunConfig
from ra3_megatron.corpus.sampler import DocumentSampler
from ra3_megatron.mcore.step_clock import StepClock
from ra3_megatron.rlvr.cutting import Cuts
from ra3_megatron.rlvr.responses import Response, pack, response_of, unpack
from ra3_megatron.rollout.protocol import GenerateRequest
from ra3_megatron.rollout.randomness import generator
from ra3_megatron.rollout.sampling import Sampling

Wait = Callable[[], list[Response]]


class Responder:
    """Samples responses of one model to prompts. All calls are collective."""

    def __init__(
        self,
        sampling: Sampling,
        prompts: Sequence[Sequence[int]],
        cuts: Cuts,
        config: RunConfig,
        allowed: int,
    ) -> None:
        """prompts: ids of each problem's; cuts: of the same problems; allowed: row of the table of sets."""
        self.sampling, self._cuts = sampling, cuts
        self._prompts, self._allowed = prompts, allowed
        self._most = config.rlvr.max_response_tokens

    def begin(
        self,
        problems: Sequence[int],
        key: Sequence[int],
        group: int,
        background: bool = False,
        first: int = 0,
    ) -> Wait:
        """Begin to sample `group` responses to each of these problems; call the result to wait for them.

        key: names the random stream of this batch; first: place of the first problem in it. Responses come problem by
        problem, the same on every process.
        """
        requests: dict[int, list[GenerateRequest]] = {}
        for place in self.sampling.mine(len(problems)):
            prompt = self._prompts[problems[place]]
            requests[place] = [
                GenerateRequest(
                    prompt,
                    generator((*key, first + place, number)).random(self._most),
                    allowed=self._allowed,
                    stop=self._cuts.ends,
                )
                for number in range(group)
            ]

        def ended(place: int, ids: Sequence[int], seen: int) -> int | None:
            return self._cuts.ended(problems[place], ids, seen)

        wait = self.sampling.generate(requests, background, ended if self._cuts.needed else None)

        def responses() -> list[Response]:
            found = wait()
            return [
                response_of(problem, self._prompts[problem], completion)
                for place, problem in enumerate(problems)
                for completion in found[place]
            ]

        return responses


class ResponseQueue:
    """Batches of responses to training problems, in the order of a sampler. All calls are collective."""

    def __init__(
        self,
        responder: Responder,
        sampler: DocumentSampler,
        key: Sequence[int],
        config: RunConfig,
        clock: StepClock | None = None,
    ) -> None:
        """key: names the random streams; clock: of the steps."""
        self._responder, self._sampler, self._key = responder, sampler, tuple(key)
        self._count, self._group = config.rlvr.problems_per_step, config.rlvr.group_size
        self._ahead = config.rollout.max_staleness
        self._clock = clock or StepClock()
        self._published: int | None = None
        self._batch = 0
        self._pending: Wait | None = None

    @property
    def sampling(self) -> Sampling:
        """What samples."""
        return self._responder.sampling

    def next(self, version: int, more: bool) -> tuple[list[Response], dict[str, float]]:
        """A batch, G responses to each of `problems_per_step` problems, and metrics of how it came about.

        version: of the model's present weights; more: another batch will be asked for, of these weights or later ones.
        """
        metrics: dict[str, float] = {}
        if self._pending is None:
            metrics |= self._publish(version)
            self._pending = self._begin()
        responses = self._pending()
        self._pending = None
        if self._ahead and more:
            metrics |= self._publish(version)
            self._pending = self._begin(background=True)
        return responses, metrics

    def settle(self, version: int) -> None:
        """Wait for what is being sampled, and sample with the model's present weights from now on, so that others may
        use the sampling in between."""
        if self._pending is not None:
            responses = self._pending()
            self._pending = lambda: responses
        self._publish(version)

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable: the position, and what was sampled ahead (which is waited for)."""
        pending = None
        if self._pending is not None:
            responses = self._pending()
            self._pending = lambda: responses
            pending = pack(responses)
        return {"sampler": dict(self._sampler.state_dict()), "batch": self._batch, "pending": pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._sampler.load_state_dict(state["sampler"])
        self._batch = state["batch"]
        self._pending = None
        if state["pending"] is not None:
            responses = unpack(state["pending"])
            self._pending = lambda: responses

    def _publish(self, version: int) -> dict[str, float]:
        if self._published == version:
            return {}
        self._published = version
        with self._clock.part("refit"):
            return self._responder.sampling.publish(version)

    def _begin(self, background: bool = False) -> Wait:
        problems = self._sampler.next(self._count)
        key = (*self._key, self._batch)
        self._batch += 1
        return self._responder.begin(problems, key, self._group, background)
