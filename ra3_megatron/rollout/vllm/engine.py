"""The rollout engine in front of vLLM: protocol requests into the messages of its process, and back.

`advance` is two calls a round: the decisions at all line boundaries, then the thoughts of the rows that take one. Equal
prefixes, as the transcripts of one document have them, are asked for once; behind a prefix that vLLM has
computed before, a boundary costs about one block of its prefix cache. That cache is keyed by content and emptied by
every update of the weights, so nothing has to be forgotten between batches.
"""

from collections.abc import Sequence

import numpy as np

from ra3_megatron.rollout.protocol import (
    Completion,
    Finish,
    GenerateRequest,
    LatentCompletion,
    LatentRequest,
    first_thought,
)
from ra3_megatron.rollout.vllm.messages import Answer, Draw, Drawn, Events, Health, WeightSource
from ra3_megatron.rollout.vllm.process import EngineClient, EngineError
from ra3_megatron.text.latents import LatentFormat


class VllmEngine:
    """Samples at `temperature` with the weights that `update` brought.

    The table of token sets of its process must be `token_sets(latents)`.
    """

    piece = 64  # each piece is a call, and computes the last block of its prefix again

    def __init__(self, client: EngineClient, latents: LatentFormat, temperature: float = 1.0) -> None:
        self.client = client
        self.latents = latents
        self.temperature = temperature
        self.weight_version = 0

    def update(self, version: int, source: WeightSource) -> None:
        """Take new weights. Raises EngineError when they are refused; then nothing can be sampled until an update
        succeeds."""
        self.client.call("update", version, source)
        self.weight_version = version

    def check(self) -> Health:
        """What the process says of itself. Raises EngineError when it is dead, hangs, or holds other weights."""
        health: Health = self.client.call("health")
        self._check_version(health.version)
        return health

    def close(self) -> None:
        self.client.close()

    def forget(self) -> None:
        """Nothing to do: see the module's docstring."""

    def finish(self) -> None:
        """Nothing to do: no other process of the replica takes part."""

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        asked = [request for request in requests if len(request.uniforms)]
        draws = [
            Draw(
                prompt=list(request.prompt),
                uniforms=request.uniforms.tolist(),
                first=(request.allowed, request.allowed),
                later=(request.allowed, request.allowed),
                stop=request.stop,
                greedy=request.greedy,
                top_p=request.top_p,
            )
            for request in asked
        ]
        drawn = iter(self._draw(draws))
        completions = []
        for request in requests:
            done = next(drawn) if len(request.uniforms) else Drawn([], [], False)
            finish = Finish.END if done.ended else Finish.LENGTH
            completions.append(Completion(done.ids, done.log_probs, finish, self.weight_version))
        return completions

    def advance(self, requests: Sequence[LatentRequest]) -> list[LatentCompletion]:
        sequences = [_Sequence(request) for request in requests]
        decided = self._decide(requests, sequences)
        thinking = [first_thought(request, values) for request, values in zip(requests, decided, strict=True)]
        draws = [
            self._thought(request, sequence, line)
            for request, sequence, line in zip(requests, sequences, thinking, strict=True)
            if line is not None
        ]
        drawn = iter(self._draw(draws))
        completions = []
        for values, line in zip(decided, thinking, strict=True):
            if line is None:
                completions.append(LatentCompletion(values, None, [], [], Finish.ACT, self.weight_version))
                continue
            done = next(drawn)
            finish = Finish.END if done.ended else Finish.LENGTH
            completions.append(
                LatentCompletion(values[:line], line, done.ids, done.log_probs, finish, self.weight_version)
            )
        return completions

    def _decide(self, requests: Sequence[LatentRequest], sequences: Sequence["_Sequence"]) -> list[list[float]]:
        """log q(<act>) of every line of every request; each distinct prefix is asked for once."""
        number: dict[tuple[int, tuple[int, ...]], int] = {}  # (prefix before it, piece) -> prefix
        place_of: dict[tuple[int, int], tuple[int, int]] = {}  # (prefix, act set) -> its place in the answer
        events: list[Events] = []
        wanted: list[list[tuple[int, int] | None]] = []
        for request, sequence in zip(requests, sequences, strict=True):
            prefix, begin = 0, 0
            asked = Events(sequence.ids, [], [], self.latents.universe)
            here: list[tuple[int, int] | None] = []
            for line, place in zip(request.lines, sequence.places, strict=True):
                prefix = number.setdefault((prefix, tuple(sequence.ids[begin:place])), len(number) + 1)
                begin = place
                if not line.offered:
                    here.append(None)
                    continue
                event = (prefix, self.latents.act_set(line.think_set))
                if event not in place_of:
                    place_of[event] = (len(events), len(asked.places))
                    asked.places.append(place)
                    asked.numerators.append(event[1])
                here.append(event)
            wanted.append(here)
            if asked.places:
                events.append(asked)
        answers = [values for values in self._ask(events) if isinstance(values, list)]
        found = {event: answers[which][index] for event, (which, index) in place_of.items()}
        return [[0.0 if event is None else found[event] for event in here] for here in wanted]

    def _thought(self, request: LatentRequest, sequence: "_Sequence", line: int) -> Draw:
        return Draw(
            prompt=sequence.ids[: sequence.places[line]],
            uniforms=request.uniforms[line, 1:].tolist(),
            first=(request.lines[line].think_set, self.latents.universe),
            later=(self.latents.thought_set, self.latents.thought_set),
            stop_row=len(self.latents.sets),
        )

    def _draw(self, draws: Sequence[Draw]) -> list[Drawn]:
        return [drawn for drawn in self._ask(draws) if isinstance(drawn, Drawn)]

    def _ask(self, asked: Sequence[Events | Draw]) -> list[list[float] | Drawn]:
        if not asked:
            return []
        answer: Answer = self.client.call("sample", asked, self.temperature)
        self._check_version(answer.version)
        return answer.values

    def _check_version(self, version: int | None) -> None:
        if version != self.weight_version:
            raise EngineError(f"the vLLM engine holds weight version {version}, not {self.weight_version}")


class _Sequence:
    """Ids of a request with all its lines, and the position at which each line's decision is read."""

    def __init__(self, request: LatentRequest) -> None:
        self.ids = list(request.context)
        self.places: list[int] = []
        for line in request.lines:
            self.ids += line.before
            self.places.append(len(self.ids))
            self.ids += line.act


def token_sets(latents: LatentFormat) -> np.ndarray:
    """The table of token sets of an engine for `latents`: the format's rows, and the tokens that end a thought."""
    return np.concatenate([latents.sets, latents.ends[None]])
