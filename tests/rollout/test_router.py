"""The router: one replica for what begins alike, all of them at once, one version."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from ra3_megatron.rollout.protocol import (
    Completion,
    Finish,
    GenerateRequest,
    LatentCompletion,
    LatentRequest,
    PlannedLine,
)
from ra3_megatron.rollout.router import Router


class Recorder:
    """Answers with what it was asked; `meet` is where replicas that work at once find each other."""

    def __init__(self, meet: threading.Barrier | None = None) -> None:
        self.weight_version = 0
        self.asked: list[list[int]] = []
        self.forgotten = 0
        self.meet = meet

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        if self.meet is not None:
            self.meet.wait(timeout=60)
        return [Completion([r.prompt[-1]], [0.0], Finish.LENGTH, self.weight_version) for r in requests]

    def advance(self, requests: Sequence[LatentRequest]) -> list[LatentCompletion]:
        self.asked.append([request.key for request in requests])
        return [LatentCompletion([float(r.key)], None, [], [], Finish.ACT, self.weight_version) for r in requests]

    def forget(self) -> None:
        self.forgotten += 1

    def finish(self) -> None:
        pass


class Broken(Recorder):
    def advance(self, requests: Sequence[LatentRequest]) -> list[LatentCompletion]:
        raise RuntimeError("this replica is dead")


def request(key: int, *ids: int) -> LatentRequest:
    return LatentRequest(key, [0], [PlannedLine((), ids, 1, True)], np.zeros((1, 3)))


def test_a_document_stays_with_its_replica() -> None:
    replicas = [Recorder(), Recorder(), Recorder()]
    router = Router(replicas)
    first = [request(0, 5, 6), request(1, 7), request(2, 5, 6), request(3, 8, 9, 9), request(4, 7)]
    answers = router.advance(first)
    assert [a.decision_log_probs for a in answers] == [[0.0], [1.0], [2.0], [3.0], [4.0]]
    assert [replica.asked for replica in replicas] == [[[0, 2]], [[1, 4]], [[3]]]
    # later rounds look alike no more, and come in any order
    router.advance([request(4, 1), request(2, 2), request(3, 1), request(0, 3)])
    assert [replica.asked[1:] for replica in replicas] == [[[2, 0]], [[4]], [[3]]]
    router.forget()
    assert [replica.forgotten for replica in replicas] == [1, 1, 1]
    router.advance([request(4, 1)])
    assert [replica.asked[2:] for replica in replicas] == [[[4]], [], []]


def test_documents_go_where_the_fewest_tokens_are() -> None:
    replicas = [Recorder(), Recorder()]
    Router(replicas).advance([request(0, *[9] * 50), request(1, 1), request(2, 2), request(3, 3)])
    assert [replica.asked for replica in replicas] == [[[0]], [[1, 2, 3]]]


def test_replicas_work_at_once() -> None:
    meet = threading.Barrier(2)
    router = Router([Recorder(meet), Recorder(meet)])
    prompts = [[1, 2], [3, 4], [1, 2], [5]]
    completions = router.generate([GenerateRequest(prompt, np.zeros(1)) for prompt in prompts])
    assert [c.ids for c in completions] == [[2], [4], [2], [5]]
    assert router.generate([]) == []


def test_versions_are_one() -> None:
    replicas = [Recorder(), Recorder()]
    router = Router(replicas)
    router.weight_version = 3
    assert router.weight_version == 3 and [r.weight_version for r in replicas] == [3, 3]
    replicas[1].weight_version = 2
    with pytest.raises(RuntimeError, match=r"different weight versions: \[3, 2\]"):
        router.advance([request(0, 1)])


def test_a_dead_replica_is_told_after_the_others_are_done() -> None:
    alive = Recorder()
    with pytest.raises(RuntimeError, match="this replica is dead"):
        Router([Broken(), alive]).advance([request(0, 1), request(1, 2)])
    assert alive.asked == [[1]]


def test_no_replica_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one engine"):
        Router([])
