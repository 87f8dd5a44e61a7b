"""How the processes of a check meet and agree: through a key-value store, which no dead or hung process can block.

Invariants: every wait ends, by its answer, by its deadline, or by the word "end" that the first process leaves; what
one process lacks is known to the first one by name. No collective is used, so a check may fail anywhere.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import DistError, HashStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from ra3_megatron.cluster.place import Place

T = TypeVar("T")
_SLICE = 1.0
"""Seconds after which a process that waits for the first one looks whether all is over."""


class Silent(Exception):
    """Some processes gave no answer in time."""

    def __init__(self, ranks: list[int]) -> None:
        super().__init__(f"no answer from ranks {', '.join(map(str, ranks))}")
        self.ranks = ranks


class Failed(Exception):
    """Another process met an error that no check foresaw."""

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(text)
        self.rank = rank


class Ended(Exception):
    """The first process has ended the checks."""


class Lost(Exception):
    """The first process cannot be reached, or does not answer."""


class Meeting:
    """The store, as one of the processes sees it."""

    def __init__(self, store: Store, place: Place, deadline: float) -> None:
        self._store, self._place = store, place
        self.deadline = deadline
        """`time.monotonic()` until which the first process waits for answers."""

    def another_store(self) -> Store:
        """For a process group: the same store through a connection of its own, which these waits do not hold up."""
        clone: Store = self._store.clone()  # type: ignore[attr-defined]
        return clone

    def put(self, key: str, item: Any) -> None:
        """Leave `item`, which JSON can hold."""
        self._reach(lambda: self._store.set(key, json.dumps(item)))

    def get(self, key: str) -> Any:
        """Item of the first process; Ended if it has ended the checks instead, Lost if it is gone."""
        while not self._has([key], min(_SLICE, self._left())):
            if self._reach(lambda: self._store.check(["end"])):
                raise Ended
            if not self._place.is_main and self._left() <= 0:
                raise Lost("it does not answer")
        return json.loads(self._reach(lambda: self._store.get(key)))

    def collect(self, name: str, ranks: Iterable[int], seconds: float | None = None) -> dict[int, Any]:
        """On the first process: answers of `ranks` to `name`; those that are not there in time are left out.

        Raises Failed as soon as another process has.
        """
        keys = {rank: f"{name}/{rank}" for rank in ranks}
        until = self.deadline if seconds is None else min(self.deadline, time.monotonic() + seconds)
        while not self._has(list(keys.values()), min(_SLICE, until - time.monotonic())):
            if self._store.check(["failed"]):
                raise Failed(*json.loads(self._store.get("failed")))
            if time.monotonic() >= until:
                keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
                break
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items()}

    def fail(self, text: str) -> None:
        """On another process: say that it goes no further, instead of an answer."""
        self.put("failed", (self._place.rank, text))

    def ask(self, name: str, item: Any, ranks: list[int], judge: Callable[[dict[int, Any]], T]) -> T:
        """What the first process judges of the items of `ranks`, on every process. Silent there if one is missing."""
        if self._place.rank in ranks:
            self.put(f"{name}/{self._place.rank}", item)
        if not self._place.is_main:
            verdict: T = self.get(f"{name}/verdict")
            return verdict
        answers = self.collect(name, ranks)
        if missing := [rank for rank in ranks if rank not in answers]:
            raise Silent(missing)
        verdict = judge(answers)
        self.put(f"{name}/verdict", verdict)
        return verdict

    def end(self, bad: bool, others: int, until: float) -> None:
        """On the first process: tell the outcome, and wait until so many others have read it, or `until`."""
        self.put("end", bad)
        while self._store.add("left", 0) < others and time.monotonic() < until:
            time.sleep(0.02)

    def outcome(self) -> bool:
        """On the others: whether the allocation is bad, as the first process says."""
        while not self._has(["end"], min(_SLICE, self._left())):
            if self._left() <= 0:
                raise Lost("it does not answer")
        bad: bool = json.loads(self._reach(lambda: self._store.get("end")))
        self._reach(lambda: self._store.add("left", 1))
        return bad

    def _has(self, keys: list[str], seconds: float) -> bool:
        """Whether all keys are there, at the latest after `seconds`."""
        if seconds <= 0:
            return bool(self._reach(lambda: self._store.check(keys)))
        try:
            self._store.wait(keys, timedelta(seconds=seconds))
        except DistError as error:
            if "timeout" not in str(error).lower():
                raise Lost(str(error).splitlines()[0]) from error
            return False
        return True

    def _left(self) -> float:
        return self.deadline - time.monotonic()

    @staticmethod
    def _reach(call: Callable[[], T]) -> T:
        try:
            return call()
        except DistError as error:
            raise Lost(str(error).splitlines()[0]) from error


def connect(place: Place, seconds: float) -> Store:
    """The store that the first process holds (under torchrun: torchrun's). Lost if it is not there in time."""
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        if place.world_size > 1:
            raise Lost("MASTER_ADDR and MASTER_PORT are not set")
        return HashStore()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    holds = place.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not holds and (why := _refused(address, port, seconds)):
        raise Lost(f"{address}:{port}: not there within {seconds:.0f} s ({why})")
    try:
        wait = timedelta(seconds=seconds)
        store = TCPStore(address, port, place.world_size, holds, timeout=wait, wait_for_workers=False)
    except DistError as error:
        raise Lost(f"{address}:{port}: {str(error).splitlines()[0]}") from error
    # torchrun keeps its store when it starts processes anew
    return PrefixStore(f"preflight-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _refused(address: str, port: int, seconds: float) -> str:
    """Why nobody listens there, if nobody does within so many seconds (torch would wait up to three times as long)."""
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=max(0.1, min(2.0, until - time.monotonic()))).close()
            return ""
        except OSError as error:
            if time.monotonic() >= until:
                return error.strerror or str(error)
        time.sleep(0.2)
