"""Several replicas of an engine as one: each document's transcripts go to one replica, and the replicas work at once.

A replica keeps prefixes that it has computed, so what begins alike belongs together: a transcript that is seen for the
first time goes where its text went, or else to the replica with the fewest tokens so far, and stays there until
`forget`. Which replica answers never changes a result, because a result depends on its request alone.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ra3_megatron.rollout.protocol import (
    Completion,
    Finish,
    GenerateRequest,
    LatentCompletion,
    LatentRequest,
    RolloutEngine,
)

Request = TypeVar("Request")
Result = TypeVar("Result")


class Router:
    """A RolloutEngine in front of others, which must be able to work in threads of their own."""

    def __init__(self, engines: Sequence[RolloutEngine]) -> None:
        if not engines:
            raise ValueError("a router needs at least one engine")
        self.engines = list(engines)
        self._threads = ThreadPoolExecutor(len(self.engines), thread_name_prefix="replica")
        self._start_batch()

    @property
    def weight_version(self) -> int:
        """That of every replica. Raises RuntimeError when they differ."""
        versions = [engine.weight_version for engine in self.engines]
        if len(set(versions)) > 1:
            raise RuntimeError(f"the replicas of the rollout engine hold different weight versions: {versions}")
        return versions[0]

    @weight_version.setter
    def weight_version(self, version: int) -> None:
        for engine in self.engines:
            engine.weight_version = version

    @property
    def piece(self) -> int:
        """That of the replicas, which are alike."""
        return self.engines[0].piece

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        homes = [self._home_of_text(tuple(request.prompt)) for request in requests]
        completions = self._everywhere(requests, homes, lambda engine, share: engine.generate(share))
        for request, home, completion in zip(requests, homes, completions, strict=True):
            if request.goes_on and completion.finish is Finish.LENGTH:
                self._homes[*request.prompt, *completion.ids] = home
        return completions

    def advance(self, requests: Sequence[LatentRequest]) -> list[LatentCompletion]:
        homes = []
        for request in requests:
            if request.key not in self._home_of_key:
                text = tuple(request.context) + tuple(i for line in request.lines for i in (*line.before, *line.act))
                self._home_of_key[request.key] = self._home_of_text(text)
            homes.append(self._home_of_key[request.key])
        return self._everywhere(requests, homes, lambda engine, share: engine.advance(share))

    def forget(self) -> None:
        for engine in self.engines:
            engine.forget()
        self._start_batch()

    def finish(self) -> None:
        for engine in self.engines:
            engine.finish()

    def _start_batch(self) -> None:
        self._home_of_key: dict[int, int] = {}
        self._homes: dict[tuple[int, ...], int] = {}
        self._load = [0] * len(self.engines)

    def _home_of_text(self, text: tuple[int, ...]) -> int:
        if text not in self._homes:
            self._homes[text] = self._load.index(min(self._load))
        home = self._homes[text]
        self._load[home] += len(text)
        return home

    def _everywhere(
        self,
        requests: Sequence[Request],
        homes: Sequence[int],
        call: Callable[[RolloutEngine, list[Request]], list[Result]],
    ) -> list[Result]:
        """Each replica's answers to its share of the requests, in the order of the requests."""
        self.weight_version  # noqa: B018 (raises when the replicas differ)
        shares = [[i for i, home in enumerate(homes) if home == replica] for replica in range(len(self.engines))]
        calls = {
            replica: self._threads.submit(call, self.engines[replica], [requests[i] for i in share])
            for replica, share in enumerate(shares)
            if share
        }
        failures = [error for done in calls.values() if (error := done.exception())]  # waits for all
        if failures:
            raise failures[0]
        results: dict[int, Result] = {}
        for replica, done in calls.items():
            results.update(zip(shares[replica], done.result(), strict=True))
        return [results[i] for i in range(len(requests))]
