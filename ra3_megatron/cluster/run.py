"""All checks of an allocation, in order, in every process of the job.

Invariants: every process ends with the same outcome. A check that raises on a node is a bad result of that node; a
process that answers nothing is named after its node, and ends the checks. One process of each node, the leader, looks
at what the processes of a node share; its processors and GPUs are dealt out. Only the reduction, which comes last, is
collective.
"""

import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from ra3_megatron.cluster import arithmetic, clock, collective, node, shared_folder
from ra3_megatron.cluster.meeting import Ended, Failed, Lost, Meeting, Silent, connect
from ra3_megatron.cluster.place import Place, absent, job_nodes
from ra3_megatron.cluster.results import Limits, Result, could_not, first_line

logger = logging.getLogger(__name__)
MEETING = "rendezvous"
_MEETING_SHARE, _ANSWER_SHARE = 0.75, 0.9
"""Parts of the time after which processes must have met, and answers must have come: the rest is for saying so."""
_LATER = 3.0
"""Seconds that others give the first process beyond its time, as it knows more."""


@dataclass
class Preflight:
    """The checks, as one process makes them. What another thread may read at any time is `results` and `check`."""

    run_dir: Path
    limits: Limits
    place: Place
    results: list[Result] = field(default_factory=list)
    """On the first process those of all nodes; on others only what keeps them from the first."""
    check: str = MEETING
    """The check that goes on."""
    nodes: list[str] = field(default_factory=list)
    """Of each rank."""
    started: float = field(default_factory=time.monotonic)
    deadline: float = 0.0
    """When this process must have ended (time.monotonic()): the first one at the time limit, others soon after it."""

    def __post_init__(self) -> None:
        self.deadline = self.started + self.limits.timeout + (0 if self.place.is_main else 2 * _LATER)

    @property
    def leaders(self) -> dict[int, str]:
        """First rank of each node -> its name."""
        first = {name: rank for rank, name in reversed(list(enumerate(self.nodes)))}
        return {first[name]: name for name in dict.fromkeys(self.nodes)}

    def run(self) -> bool:
        """Whether the allocation is good. Collective; raises nothing that another process would wait for."""
        try:
            meeting = self._meet()
        except Lost as error:
            self._add(Result(self._first_node(), MEETING, "bad", f"rank 0 cannot be reached: {error}"))
            return False
        return self._lead(meeting) if self.place.is_main else self._follow(meeting)

    def _lead(self, meeting: Meeting) -> bool:
        mute = 0
        try:
            self._all(meeting)
        except Silent as silent:
            mute = len(silent.ranks)
            for name in dict.fromkeys(self.nodes[rank] for rank in silent.ranks):
                ranks = ", ".join(str(rank) for rank in silent.ranks if self.nodes[rank] == name)
                late = f"no answer from rank {ranks} within {time.monotonic() - self.started:.0f} s"
                self._add(Result(name, self.check, "bad", f"{late}: hung or ended"))
        except Failed as failed:
            self._add(Result(self.nodes[failed.rank], self.check, "bad", f"could not be checked ({failed})", "?"))
        except Ended:  # processes are missing, which has been said
            pass
        except Exception as error:
            logger.exception("%s", self.check)
            self._add(could_not(self.place.node, self.check, error))
        bad = any(result.state == "bad" for result in self.results)
        with suppress(Lost):  # those who do not hear it take this process for gone, which is bad as well
            others = sum(map(bool, self.nodes)) - 1 - mute
            meeting.end(bad, others, min(self.deadline - 0.2, time.monotonic() + 5))
        return not bad

    def _follow(self, meeting: Meeting) -> bool:
        try:
            with suppress(Ended):
                try:
                    self._all(meeting)
                except (Ended, Lost):
                    raise
                except Exception as error:
                    logger.exception("%s", self.check)
                    meeting.fail(f"{type(error).__name__}: {first_line(error)}")
            return not meeting.outcome()
        except Lost as error:
            self._add(Result(self._first_node(), self.check, "bad", f"rank 0 is gone: {error}"))
            return False

    def _all(self, meeting: Meeting) -> None:
        self._join(meeting)
        device = self._nodes(meeting)
        self._arithmetic(meeting, device)
        self._clocks(meeting)
        self._shared_folder(meeting)
        if device is not None:
            self._collective(meeting, device)

    def _meet(self) -> Meeting:
        store = connect(self.place, self.limits.timeout * _MEETING_SHARE)
        seconds = self.limits.timeout * _ANSWER_SHARE if self.place.is_main else self.limits.timeout + _LATER
        return Meeting(store, self.place, self.started + seconds)

    def _join(self, meeting: Meeting) -> None:
        """Learn the nodes of all ranks; names those that are missing, and raises Ended."""
        rank, size = self.place.rank, self.place.world_size
        meeting.put(f"here/{rank}", self.place.node)
        if not self.place.is_main:
            self.nodes, left = meeting.get("joined")
            meeting.deadline = time.monotonic() + left + _LATER
            self.deadline = meeting.deadline + _LATER
            return
        came = meeting.collect("here", range(size), self.limits.timeout * _MEETING_SHARE)
        self.nodes = [came.get(each, "") for each in range(size)]
        if len(came) < size:
            seconds = time.monotonic() - self.started
            for name, what in absent(came, size, self.place.local_size, job_nodes()):
                self._add(Result(name, MEETING, "bad", f"{what} within {seconds:.0f} s", "absent"))
            raise Ended
        left = self.limits.timeout - (time.monotonic() - self.started)
        meeting.put("joined", (self.nodes, left))

    def _nodes(self, meeting: Meeting) -> torch.device | None:
        """What each leader sees of its node; the device for the reduction, None when there can be none."""
        self.check = "node"
        place = self.place
        mine = None
        if place.rank in self.leaders:
            mine = node.look(place.node, self.nodes.count(place.node), self.run_dir, self.limits)

        def judge(answers: dict[int, dict[str, Any]]) -> str:
            results, kind = node.compare({self.nodes[rank]: seen for rank, seen in answers.items()})
            self._add(*results)
            return kind

        kind = meeting.ask("node", mine, list(self.leaders), judge)
        if kind == "none":
            return None
        return torch.device("cuda", self._local) if kind == "cuda" else torch.device("cpu")

    @property
    def _local(self) -> int:
        """Place of this process among those of its node."""
        return [rank for rank, name in enumerate(self.nodes) if name == self.place.node].index(self.place.rank)

    def _arithmetic(self, meeting: Meeting, device: torch.device | None) -> None:
        """Every process looks at its share of the node's processors, and at its GPU."""
        if not self.limits.arithmetic:
            return
        self.check = arithmetic.CHECK
        mine = arithmetic.my_share(self._local, self.nodes.count(self.place.node))
        found, checked = arithmetic.processors(mine, self.limits.arithmetic), len(mine)
        if device is not None and device.type == "cuda":
            found, checked = found | arithmetic.gpu(device, self.limits.arithmetic), checked + 1

        def judge(answers: dict[int, list[Any]]) -> bool:
            for name in self.leaders.values():
                told = [answer for rank, answer in answers.items() if self.nodes[rank] == name]
                wrong = {unit: text for each, _ in told for unit, text in each.items()}
                self._add(*arithmetic.judge(name, wrong, sum(count for _, count in told)))
            return True

        meeting.ask("arithmetic", (found, checked), list(range(self.place.world_size)), judge)

    def _clocks(self, meeting: Meeting) -> None:
        self.check = clock.CHECK
        if self.place.is_main:
            self._add(*clock.compare(meeting, self.leaders, self.limits))
        elif self.place.rank in self.leaders:
            clock.answer(meeting, self.place.rank)

    def _shared_folder(self, meeting: Meeting) -> None:
        self.check = shared_folder.CHECK
        self._add(*shared_folder.check(meeting, self.place.rank, self.run_dir.absolute().parent, self.leaders))

    def _collective(self, meeting: Meeting, device: torch.device) -> None:
        self.check = collective.CHECK
        if self.place.world_size == 1:
            self._add(Result(self.place.node, self.check, "ok", "one process: nothing to reduce", "–"))
            return
        nodes = list(self.leaders.values())
        least = collective.floor(self.limits, device.type == "cuda", len(nodes))
        now = time.monotonic()
        left = meeting.deadline - now
        rate, problem, values = 0.0, "", torch.empty(0)
        try:
            store = PrefixStore("group", meeting.another_store())
            collective.join_group(self.place, device, store, left * 0.6)  # the rest is for the pairs
            values = collective.buffer(self.limits, device)
            rate = collective.reduce_rate(values, self.place.world_size, now + left * 0.6)
        except Exception as error:
            problem = first_line(error)

        def judge(answers: dict[int, list]) -> tuple[str, float]:
            said = [(self.nodes[rank], text) for rank, (_, text) in answers.items() if text]
            for name, text in dict(said).items():
                self._add(Result(name, self.check, "bad", f"all-reduce failed: {text}", "failed"))
            slowest = min(rate for rate, _ in answers.values())
            if not said and least is not None and slowest < least and len(nodes) > 1:
                return "pairs", slowest
            if not said:
                self._add(*collective.judge(slowest, nodes, least, {}))
            return "failed" if said else "done", slowest

        then, slowest = meeting.ask("rate", (rate, problem), list(range(self.place.world_size)), judge)
        if then == "failed":
            return  # the group is not left: that would wait for what is stuck
        if then == "pairs":
            self._pairs(meeting, values, slowest, least or 0.0)
        dist.destroy_process_group()

    def _pairs(self, meeting: Meeting, values: torch.Tensor, rate: float, least: float) -> None:
        """Find the node that slows the reduction down. Collective over the leaders."""
        nodes, leaders = list(self.leaders.values()), list(self.leaders)
        rates, problem = [], ""
        if self.place.rank in leaders:
            try:
                until = 0.5 * (meeting.deadline + time.monotonic())
                rates = collective.exchange(values, leaders, self.place.rank, until)
            except Exception as error:
                problem = first_line(error)

        def judge(answers: dict[int, list]) -> bool:
            for rank, (_, text) in answers.items():
                if text:
                    self._add(Result(self.nodes[rank], self.check, "bad", f"exchange of a pair failed: {text}", "?"))
            pairs = {(one, other): value for told, _ in answers.values() for one, other, value in told}
            self._add(*collective.judge(rate, nodes, least, pairs))
            return True

        meeting.ask("pairs", (rates, problem), leaders, judge)

    @property
    def in_group(self) -> bool:
        """Whether a process group was not left, so that the end of Python could wait for it."""
        return dist.is_initialized()

    def hung(self) -> None:
        """Note that this process is past its deadline, in a check that does not come back."""
        if self.check == MEETING and not self.place.is_main:
            self._add(Result(self._first_node(), MEETING, "bad", "rank 0 cannot be reached: it does not answer"))
            return
        seconds = time.monotonic() - self.started
        text = f"rank {self.place.rank} still hangs in it after {seconds:.0f} s"
        self._add(Result(self.place.node, self.check, "bad", text, "hangs"))

    def _add(self, *results: Result) -> None:
        self.results.extend(results)

    def _first_node(self) -> str:
        """The node of rank 0, as far as it is known."""
        known = self.nodes[:1] or job_nodes()[:1]
        return known[0] if known else os.environ.get("MASTER_ADDR", "of rank 0")
