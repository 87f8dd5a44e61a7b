"""What nodes are given when they offer GPUs, and what is refused; the test speaks for the nodes."""

from __future__ import annotations

import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.rollout.nodes.meeting import FILE, read_meeting
from ra3_megatron.rollout.nodes.messages import Begin, Begun, End, Ended, Offer
from ra3_megatron.rollout.nodes.owner import EngineNodes, NodeEngine
from ra3_megatron.rollout.refit.channel import connect
from ra3_megatron.rollout.vllm.messages import EngineSpec
from ra3_megatron.rollout.vllm.process import EngineError

GPUS = tuple(str(number) for number in range(8))


def join(folder: Path, offer: Offer) -> Connection:
    """A node's connection to the trainer, which it was offered to."""
    end = time.monotonic() + 30
    while (meeting := read_meeting(folder)) is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    connection = connect(("127.0.0.1", meeting.port), meeting.key, 10.0)
    connection.send(offer)
    return connection


def started(
    folder: Path, offers: list[Offer], count: int, tensor: int, on_gpus: bool = True
) -> tuple[EngineNodes, list[NodeEngine], list[Connection]]:
    nodes, connections = EngineNodes(folder), []

    def offer_all() -> None:
        connections.extend(join(folder, offer) for offer in offers)

    thread = threading.Thread(target=offer_all)
    thread.start()
    spec = EngineSpec("model-0", np.ones((1, 4), dtype=bool), 8, tensor_parallel=tensor)
    try:
        engines = nodes.start(spec, count, on_gpus, None, 30.0)
    except BaseException:
        nodes.close(False)
        raise
    finally:
        thread.join()
    return nodes, engines, connections


def test_engines_get_the_gpus_of_their_node_in_order(tmp_path: Path) -> None:
    offers = [Offer("b", "10.0.0.2", 32, GPUS[:4], None), Offer("a", "10.0.0.1", 16, GPUS, None)]
    nodes, engines, (second, first) = started(tmp_path, offers, count=5, tensor=2)
    told = [[connection.recv() for _ in range(count)] for connection, count in ((first, 4), (second, 1))]
    assert all(isinstance(message, Begin) for messages in told for message in messages)
    assert [message.number for messages in told for message in messages] == [0, 1, 2, 3, 4]
    assert [message.spec.devices for message in told[0]] == [("0", "1"), ("2", "3"), ("4", "5"), ("6", "7")]
    assert [message.spec.devices for message in told[1]] == [("0", "1")]
    assert [told[0][0].spec.threads, told[1][0].spec.threads] == [2, 16], "cores / engines / processes of one"
    assert [told[0][3].log, told[1][0].log] == ["engine-a-3.log", "engine-b-4.log"]
    assert not (tmp_path / FILE).exists() and nodes.address == "127.0.0.1"
    second.send(Begun(4, ("10.0.0.2", 5), b"key"))
    assert engines[4].wait_ready(10.0) == ("10.0.0.2", 5) and engines[4].authkey == b"key"
    second.close()
    assert engines[4].epitaph().startswith("engine 4 on node b: the node is lost")
    with pytest.raises(EngineError, match="the node is lost"):
        engines[4].wait_ready(10.0)
    first.send(Ended(1, "killed by SIGKILL"))
    assert engines[1].epitaph() == "engine 1 on node a: killed by SIGKILL" and first.recv() == End(1, "epitaph")
    nodes.close(done=False)
    with pytest.raises(EOFError):
        first.recv()


@pytest.mark.parametrize(
    ("offer", "tensor", "on_gpus", "line"),
    [
        (
            Offer("a", "h", 8, GPUS, None),
            16,
            True,
            r"1 engines of rollout.vllm.tensor=16 GPUs do not fit on node a, wh",
        ),
        (
            Offer("a", "h", 8, GPUS, 5),
            2,
            True,
            r"5 engines of rollout.vllm.tensor=2 GPUs do not fit on node a, which has 8",
        ),
        (Offer("a", "h", 8, (), None), 1, True, r"the trainer computes on GPUs, and node a has none"),
        (Offer("a", "h", 8, GPUS, None), 1, False, r"the trainer computes on no GPU, and node a has 8"),
    ],
)
def test_a_node_that_cannot_host_is_refused(
    tmp_path: Path, offer: Offer, tensor: int, on_gpus: bool, line: str
) -> None:
    with pytest.raises(UserError, match=line):
        started(tmp_path, [offer], 1, tensor, on_gpus)
    assert not (tmp_path / FILE).exists()


def test_a_node_that_leaves_again_does_not_count(tmp_path: Path) -> None:
    nodes = EngineNodes(tmp_path)
    thread = threading.Thread(target=lambda: join(tmp_path, Offer("a", "h", 8, (), 1)).close())
    thread.start()
    spec = EngineSpec("model-0", np.ones((1, 4), dtype=bool), 8)
    with pytest.raises(EngineError, match="0 of 2 engines have a place after 2 s, on 0 nodes"):
        nodes.start(spec, 2, False, None, 2.0)
    thread.join()
    nodes.close(False)
