"""Whether the processes can reduce a buffer together, how fast, and which node slows it down.

Bus bandwidth is that of NCCL's tests: 2 (n - 1) / n * bytes / seconds, which for a ring is what each link carries. When
it is too low, each node exchanges a buffer with its successor, pairs without a common node at once: the node whose two
pairs are both slow is the one.
"""

import time
from datetime import timedelta
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from ra3_megatron.cluster.place import Place
from ra3_megatron.cluster.results import Limits, Result

CHECK = "all-reduce GB/s"
ROUNDS = 5
BETWEEN_NODES, INSIDE_NODE = 10.0, 100.0
"""GB/s below which something is broken on GPUs: between nodes (100 Gbit/s are 12), inside one (NVLink)."""


class Stuck(Exception):
    """A transfer did not end in time."""


def floor(limits: Limits, cuda: bool, nodes: int) -> float | None:
    """GB/s that are asked for; None: any will do."""
    if limits.min_bus_gbs is not None or not cuda:
        return limits.min_bus_gbs
    return BETWEEN_NODES if nodes > 1 else INSIDE_NODE


def join_group(place: Place, device: torch.device, store: Store, seconds: float) -> None:
    """Make the process group of all ranks. seconds: after which a transfer is taken for stuck."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        seconds += 600  # NCCL's watchdog would end the process before it has said anything: `_finish` watches
    wait = timedelta(seconds=max(seconds, 1))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=wait)


def buffer(limits: Limits, device: torch.device) -> torch.Tensor:
    """What is sent, fp32."""
    mib = limits.mib or (64 if device.type == "cuda" else 16)
    return torch.zeros(max(1, int(mib * 2**18)), device=device)


def reduce_rate(values: torch.Tensor, size: int, deadline: float) -> float:
    """GB/s of bus bandwidth when `size` processes reduce `values`. Stuck, or torch's own error."""
    for rounds in (1, ROUNDS):  # connections are made by the first
        start = time.perf_counter()
        for _ in range(rounds):
            _finish(dist.all_reduce(values, async_op=True), deadline)
        seconds = time.perf_counter() - start
    return 2 * (size - 1) / size * values.nbytes * ROUNDS / seconds / 1e9


def pair_rate(values: torch.Tensor, peer: int, deadline: float) -> float:
    """GB/s that reach this process when it and `peer` send `values` to each other. Stuck, or torch's own error."""
    received = torch.empty_like(values)
    for part, rounds in ((values[:1], 1), (values, 2)):  # the first makes the connection and waits for the other
        start = time.perf_counter()
        for _ in range(rounds):
            both = [
                dist.P2POp(dist.isend, part, peer),
                dist.P2POp(dist.irecv, received[: part.numel()], peer),
            ]
            for work in dist.batch_isend_irecv(both):
                _finish(work, deadline)
        seconds = time.perf_counter() - start
    return values.nbytes * rounds / seconds / 1e9


def exchange(values: torch.Tensor, leaders: list[int], rank: int, deadline: float) -> list[tuple[int, int, float]]:
    """(node, its successor, GB/s) of the pairs that this leader is the first of. Collective over the leaders."""
    found = []
    for pairs in pair_rounds(len(leaders)):
        for one, other in pairs:
            if rank in (leaders[one], leaders[other]):
                peer = leaders[other] if rank == leaders[one] else leaders[one]
                rate = pair_rate(values, peer, deadline)
                if rank == leaders[one]:
                    found.append((one, other, rate))
    return found


def pair_rounds(count: int) -> list[list[tuple[int, int]]]:
    """Each of `count` nodes in a ring with its successor, in rounds in which no node is in two pairs."""
    if count < 2:
        return []
    pairs = [(i, (i + 1) % count) for i in range(count)] if count > 2 else [(0, 1)]
    last = [pairs.pop()] if count % 2 and count > 2 else []
    return [round_ for round_ in (pairs[0::2], pairs[1::2], last) if round_]


def slow_nodes(rates: dict[tuple[int, int], float], least: float) -> list[int]:
    """Nodes of a ring whose pairs are all slow: below `least`, or below half of the median pair.

    All of them when every pair is slow, and none when no node stands out.
    """
    usual = median(rates.values())
    slow = {pair for pair, rate in rates.items() if rate < max(least, usual / 2)}
    nodes = sorted({node for pair in rates for node in pair})
    return [node for node in nodes if all(pair in slow for pair in rates if node in pair)]


def judge(rate: float, nodes: list[str], least: float | None, rates: dict[tuple[int, int], float]) -> list[Result]:
    """Results for all nodes from the slowest process's rate; rates: of pairs of nodes, when it was too low."""
    figure = f"{rate:.2f}"
    if least is None or rate >= least:
        return [Result(node, CHECK, "ok", f"{figure} GB/s over all processes", figure) for node in nodes]
    below = f"{figure} GB/s over all processes, should be {least:g} (--min-bus-gbs)"
    named = slow_nodes(rates, least) if rates else list(range(len(nodes)))
    alone = len(named) < len(nodes)
    results = []
    for index, node in enumerate(nodes):
        pairs = ", ".join(
            f"{value:.2f} with {nodes[b if a == index else a]}" for (a, b), value in rates.items() if index in (a, b)
        )
        if named and index not in named:
            results.append(Result(node, CHECK, "ok", f"{below}, which is not this node's: {pairs}", figure))
            continue
        why = f"; {pairs}" if pairs else ""
        if len(nodes) > 1 and not (named and alone):
            why += "; no node stands out" if not named else "; every pair of nodes is slow"
        results.append(Result(node, CHECK, "bad", f"{below}{why}", figure))
    return results


def _finish(work: dist.Work | None, deadline: float) -> None:
    """Wait for a transfer; Stuck when it has not ended at the deadline (time.monotonic())."""
    if work is None:
        return
    if dist.get_backend() == "nccl":
        while not work.is_completed():  # NCCL's wait would only make the stream wait
            if time.monotonic() > deadline:
                raise Stuck("a transfer did not end")
            time.sleep(0)
    work.wait()
