"""The trainer's side of the rollout nodes: they are waited for, given engines, and asked how those ended."""

import contextlib
import os
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

from ra3_megatron.config.errors import UserError
from ra3_megatron.rollout.nodes.meeting import Meeting
from ra3_megatron.rollout.nodes.messages import Answer, Begin, Begun, Done, End, Ended, Failed, Offer
from ra3_megatron.rollout.refit.channel import HANDSHAKE_SECONDS, accept, listen
from ra3_megatron.rollout.vllm.messages import Address, EngineSpec
from ra3_megatron.rollout.vllm.process import CLOSE_SECONDS, EngineError
from ra3_megatron.rollout.vllm.wire import own_address, tune

ANSWER_SECONDS = 2 * CLOSE_SECONDS + 10.0
"""A node that has not said by then how an engine ended is taken for lost."""


class EngineNodes:
    """The rollout nodes of one attempt, as rank 0 sees them."""

    def __init__(self, folder: Path) -> None:
        """folder: shared with the nodes."""
        self._folder = folder
        self._nodes: list[_Node] = []
        self._socket, address = listen("0.0.0.0", "")
        self._meeting = Meeting.new(own_addresses(), int(address[1]))

    def start(
        self, spec: EngineSpec, count: int, on_gpus: bool, threads: int | None, timeout: float
    ) -> list["NodeEngine"]:
        """Wait until nodes with room for `count` engines are there, and start these.

        spec: of each, with the name of a model's folder in the shared one. on_gpus: what the trainer computes on; the
        nodes must have the same. threads: of each of an engine's processes; none: its share of the node's cores.
        Raises EngineError when too few come within `timeout` seconds, UserError when one does not fit.
        """
        self._meeting.write(self._folder)
        try:
            self._gather(count, spec.tensor_parallel, on_gpus, timeout)
        finally:
            self._socket.close()
            self._meeting.remove(self._folder)
        engines: list[NodeEngine] = []
        for node in sorted(self._nodes, key=lambda node: (node.offer.node, node.offer.address)):
            here = min(node.places(spec.tensor_parallel), count - len(engines))
            share = threads or max(1, node.offer.cores // max(1, here * spec.tensor_parallel))
            for place in range(here):
                first = place * spec.tensor_parallel
                devices = node.offer.gpus[first : first + spec.tensor_parallel]
                number = len(engines)
                engines.append(NodeEngine(node, number))
                log = f"engine-{node.offer.node}-{number}.log"
                node.send(Begin(number, replace(spec, devices=devices, threads=share), log))
        return engines

    @property
    def address(self) -> str:
        """This machine's, as the nodes reach it."""
        addresses = [own_address(node.connection) for node in self._nodes]
        return next((address for address in addresses if not address.startswith("127.")), addresses[0])

    def close(self, done: bool) -> None:
        """Let the nodes go. done: no other attempt follows, and their hosts end, too."""
        for node in self._nodes:
            if done:
                with contextlib.suppress(EngineError):
                    node.send(Done())
            node.connection.close()
        self._nodes = []

    def _gather(self, count: int, tensor: int, on_gpus: bool, timeout: float) -> None:
        end = time.monotonic() + timeout
        while (room := sum(node.places(tensor) for node in self._nodes)) < count:
            waiting = {node.connection: node for node in self._nodes}
            events = wait([self._socket, *waiting], max(0.0, end - time.monotonic()))
            if not events:
                raise EngineError(
                    f"rollout.placement=nodes: {room} of {count} engines have a place after {timeout:g} s, on "
                    f"{len(self._nodes)} nodes: start `ra3 engines --run-dir {self._folder.parent}` on each of them"
                )
            for event in events:
                if event is self._socket:
                    self._admit(tensor, on_gpus)
                elif isinstance(event, Connection):  # nothing is due yet: it is gone
                    self._nodes.remove(waiting[event])
                    event.close()

    def _admit(self, tensor: int, on_gpus: bool) -> None:
        connection = accept(self._socket, self._meeting.key, ANSWER_SECONDS)
        if connection is None:
            return
        tune(connection)
        try:
            offer = connection.recv() if connection.poll(HANDSHAKE_SECONDS) else None
        except (EOFError, OSError):
            offer = None
        if not isinstance(offer, Offer):
            connection.close()
            return
        node = _Node(connection, offer)
        self._nodes.append(node)
        node.check(tensor, on_gpus)


class NodeEngine:
    """An engine on a rollout node; like an `EngineProcess`, but the node's host looks after it."""

    def __init__(self, node: "_Node", number: int) -> None:
        self.authkey = b""
        """Known when it is ready."""
        self._node, self._number = node, number
        self._name = f"engine {number} on node {node.offer.node}"

    def wait_ready(self, timeout: float) -> Address:
        """Wait until it listens; its address. Raises EngineError, after which it is gone."""
        answer = self._node.answer(self._number, timeout)
        if isinstance(answer, Begun):
            self.authkey = answer.authkey
            return answer.address
        if isinstance(answer, Failed):
            raise EngineError(f"{self._name}: {answer.why}")
        self.kill()
        raise EngineError(f"{self._name} was not ready after {timeout:g} s")

    def epitaph(self) -> str:
        """How it ended; it is made to end when it still runs."""
        try:
            return f"{self._name}: {self._node.end(self._number, 'epitaph')}"
        except EngineError as error:
            return f"{self._name}: {error}"

    def close(self) -> None:
        """Wait for the engine, whose connection was closed, to end."""
        with contextlib.suppress(EngineError):
            self._node.end(self._number, "close")

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(EngineError):
            self._node.end(self._number, "kill")


class _Node:
    """One rollout node. Its engines' threads take turns."""

    def __init__(self, connection: Connection, offer: Offer) -> None:
        self.connection, self.offer = connection, offer
        self._turn = threading.Lock()
        self._answers: dict[int, Answer] = {}
        self._lost = ""

    def places(self, tensor: int) -> int:
        """Engines that it can host."""
        if self.offer.engines is not None:
            return self.offer.engines
        return len(self.offer.gpus) // tensor if self.offer.gpus else 1

    def check(self, tensor: int, on_gpus: bool) -> None:
        """Raises UserError when its engines could not run."""
        gpus, places, name = len(self.offer.gpus), self.places(tensor), self.offer.node
        if bool(gpus) != on_gpus:
            here, there = ("GPUs", "none") if on_gpus else ("no GPU", str(gpus))
            raise UserError(f"rollout.placement=nodes: the trainer computes on {here}, and node {name} has {there}")
        if gpus and (places * tensor > gpus or not places):
            raise UserError(
                f"rollout.placement=nodes: {max(1, places)} engines of rollout.vllm.tensor={tensor} GPUs do not fit on "
                f"node {name}, which has {gpus}: use a smaller rollout.vllm.tensor or --engines-per-node"
            )

    def send(self, message: object) -> None:
        try:
            self.connection.send(message)
        except OSError as error:
            self._lose(error)

    def end(self, number: int, how: str) -> str:
        """How an engine ended."""
        with self._turn:
            self._answers.pop(number, None)
            self.send(End(number, how))  # type: ignore[arg-type]
            end = time.monotonic() + ANSWER_SECONDS
            while not isinstance(answer := self._next(number, end - time.monotonic()), Ended):
                if answer is None:
                    self._lose(TimeoutError(f"no answer within {ANSWER_SECONDS:g} s"))
            return answer.epitaph

    def answer(self, number: int, timeout: float) -> Answer | None:
        """The next that is said of an engine; None when nothing is within `timeout` seconds."""
        with self._turn:
            return self._next(number, timeout)

    def _next(self, number: int, timeout: float) -> Answer | None:
        end = time.monotonic() + timeout
        try:
            while number not in self._answers:
                if self._lost:
                    raise EngineError(self._lost)
                if not self.connection.poll(max(0.0, end - time.monotonic())):
                    return None
                answer: Answer = self.connection.recv()
                self._answers[answer.number] = answer
        except (EOFError, OSError) as error:
            self._lose(error)
        return self._answers.pop(number)

    def _lose(self, why: Exception) -> None:
        self._lost = self._lost or f"the node is lost, or `ra3 engines` has ended there ({type(why).__name__})"
        raise EngineError(self._lost) from why


def own_addresses() -> list[str]:
    """Addresses at which other machines may reach this one, the likeliest first."""
    import psutil  # sampling without nodes does without it

    found = [os.environ["MASTER_ADDR"]] if "MASTER_ADDR" in os.environ else []
    local = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family.name == "AF_INET"
    ]
    found += sorted(local, key=lambda address: address.startswith("127."))
    return list(dict.fromkeys(found))
