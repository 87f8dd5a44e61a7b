"""Continuations that end where their text ends, which no engine knows: they are sampled in pieces.

Behind every piece the caller looks whether the text has met one of its stops. Places of continuations that have ended
are taken by those that wait. Engines keep what they have computed of a continuation that goes on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

from ra3_megatron.mcore import watchdog
from ra3_megatron.rollout.protocol import Completion, Finish, GenerateRequest

Until = Callable[[int, list[int], int], int | None]
"""Number of a request, what was sampled for it so far, and how many of these tokens were there the last time -> how
many are the continuation, the one that completes a stop included; None: it goes on."""


class Generates(Protocol):
    """A rollout engine, or what spreads requests over several."""

    @property
    def piece(self) -> int:
        """Tokens after which to look for stops: few where going on is cheap."""
        ...

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """A continuation of each prompt."""
        ...


@dataclass
class _Open:
    number: int
    request: GenerateRequest
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    def rest(self, piece: int) -> GenerateRequest:
        """The next piece of it."""
        done, request = len(self.ids), self.request
        return replace(
            request,
            prompt=[*request.prompt, *self.ids],
            uniforms=request.uniforms[done : done + piece],
            goes_on=len(request.uniforms) > done + piece,
        )


def complete(
    engine: Generates, requests: Iterable[GenerateRequest], batch_size: int, until: Until | None = None
) -> Iterator[tuple[int, Completion]]:
    """The completion of each request beside its number, as they end; at most `batch_size` are sampled at once.

    One that met a stop has `Finish.END`. Without `until` every request is one piece.
    """
    waiting = enumerate(requests)
    active: list[_Open] = []
    while True:
        active += [_Open(*each) for each in islice(waiting, batch_size - len(active))]
        if not active:
            return
        watchdog.touch()
        asked = [each.request if until is None else each.rest(engine.piece) for each in active]
        others = []
        for each, more in zip(active, engine.generate(asked), strict=True):
            seen = len(each.ids)
            each.ids += more.ids
            each.log_probs += more.log_probs
            kept = until(each.number, each.ids, seen) if until is not None else None
            if kept is not None:
                ended = Completion(each.ids[:kept], each.log_probs[:kept], Finish.END, more.weight_version)
                yield each.number, ended
            elif more.finish is Finish.END or len(each.ids) >= len(each.request.uniforms):
                yield each.number, replace(more, ids=each.ids, log_probs=each.log_probs)
            else:
                others.append(each)
        active = others
