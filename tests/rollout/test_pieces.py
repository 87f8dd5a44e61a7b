"""Continuations in pieces: what is asked for, when a place becomes free, and which end counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ra3_megatron.rollout.pieces import complete
from ra3_megatron.rollout.protocol import Completion, Finish, GenerateRequest


class Counting:
    """Continues n with n + 1, and ends at a stop token; remembers what it was asked for."""

    piece = 3

    def __init__(self) -> None:
        self.asked: list[list[tuple[int, int, bool]]] = []

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self.asked.append([(request.prompt[-1], len(request.uniforms), request.goes_on) for request in requests])
        found = []
        for request in requests:
            ids = [request.prompt[-1] + 1 + n for n in range(len(request.uniforms))]
            ends = [n for n, token in enumerate(ids) if token in request.stop]
            ids = ids[: ends[0] + 1] if ends else ids
            log_probs = [-float(token) for token in ids]
            found.append(Completion(ids, log_probs, Finish.END if ends else Finish.LENGTH, 7))
        return found


def request(start: int, length: int, stop: frozenset[int] = frozenset()) -> GenerateRequest:
    return GenerateRequest([0, start], np.zeros(length), stop=stop)


def test_places_of_ended_ones_are_taken_and_each_end_is_told() -> None:
    engine = Counting()
    asked = [request(10, 5), request(20, 9, frozenset({22})), request(30, 9), request(40, 4), request(50, 0)]

    def until(number: int, ids: list[int], seen: int) -> int | None:
        return 4 if number == 2 and 34 in ids[seen:] else None

    found = list(complete(engine, iter(asked), 2, until))
    assert [number for number, _ in found] == [1, 0, 2, 3, 4]
    by = dict(found)
    assert by[0] == Completion([11, 12, 13, 14, 15], [-11.0, -12.0, -13.0, -14.0, -15.0], Finish.LENGTH, 7)
    assert by[1] == Completion([21, 22], [-21.0, -22.0], Finish.END, 7), "the engine's own end"
    assert by[2] == Completion([31, 32, 33, 34], [-31.0, -32.0, -33.0, -34.0], Finish.END, 7), "the caller's"
    assert by[3].ids == [41, 42, 43, 44] and by[4] == Completion([], [], Finish.LENGTH, 7)
    assert engine.asked == [
        [(10, 3, True), (20, 3, True)],
        [(13, 2, False), (30, 3, True)],
        [(33, 3, True), (40, 3, True)],
        [(43, 1, False), (50, 0, False)],
    ]


def test_the_callers_end_counts_when_it_comes_first() -> None:
    (only,) = complete(Counting(), [request(20, 3, frozenset({23}))], 1, lambda *_: 1)
    assert only[1] == Completion([21], [-21.0], Finish.END, 7)


def test_without_a_caller_who_looks_every_request_is_asked_as_it_is() -> None:
    engine = Counting()
    assert [len(done.ids) for _, done in complete(engine, [request(10, 8), request(20, 2)], 5)] == [8, 2]
    assert engine.asked == [[(10, 8, False), (20, 2, False)]]
