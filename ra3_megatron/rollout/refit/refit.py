"""The facade: the trainer's present weights into the engines, as one collective call.

    refit = Refit(model, runtime, family.links(config, vocab_size), placement="colocated", receivers=1)
    trainer.synchronize()
    stats = refit.send([engine.update], version) if refit.is_sender else refit.send([], version)

Every process of the trainer calls it. Either all engines hold the new weights when it returns, or it raises RefitError
on every process; the engines whose update failed refuse to sample until one succeeds.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist

from ra3_megatron.hf.weights import Link, manifest
from ra3_megatron.mcore.model import chunks_of
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rollout.refit.buckets import Totals
from ra3_megatron.rollout.refit.carriers import make_carrier
from ra3_megatron.rollout.refit.errors import RefitError
from ra3_megatron.rollout.refit.gather import gathered
from ra3_megatron.rollout.refit.plan import leaders, make_plan, with_output_layer
from ra3_megatron.rollout.refit.sending import Sending, Update
from ra3_megatron.rollout.refit.shards import Holdings, addresses, follow_training, local_pieces, wire_dtype
from ra3_megatron.rollout.refit.stream import Stream


@dataclass(frozen=True)
class RefitStats:
    """One refit, the same on every process."""

    nbytes: int
    """Bytes of weights that each engine took."""
    tensors: int
    """Hugging Face tensors."""
    seconds: float
    """Of the slowest process."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Where the host's seconds went: `sender: …` of the first sender (stream.py), `receiver: …` of its slowest receiver
    (receiver.py); `sender: rest` is before and behind the stream."""


class Refit:
    """Sends the weights of one model."""

    def __init__(
        self,
        model: torch.nn.Module,
        runtime: Runtime,
        links: Sequence[Link],
        placement: Literal["colocated", "server"],
        receivers: int,
        transport: Literal["shared", "broadcast"] = "shared",
        dtype: torch.dtype | None = None,
        bucket_bytes: int = 256 * 2**20,
        timeout: float = 600.0,
        host: str | None = None,
    ) -> None:
        """Collective.

        links: of the model's family. placement: `colocated`: the lowest rank of each replica sends to engines of its
        own; `server`: rank 0 sends to all. receivers: processes that hold a share of the engines of one sender
        (engines times their tensor-parallel size). transport: `shared`: they are on the sender's machine; `broadcast`:
        they reach it at `host`. dtype: of the engines' weights; none: the model's. bucket_bytes: size of a bucket
        (`shared` has two). timeout: seconds within which an engine must have answered.

        Raises ValueError when the links are not those of the model.
        """
        self._runtime = runtime
        self._chunks = chunks_of(model)
        self._links = with_output_layer(links)
        self._shapes = manifest(self._links)
        self._read_pieces()
        self._dtype = dtype or wire_dtype(self._pieces)
        self._receivers, self._transport, self._timeout = receivers, transport, timeout
        self._host = host if transport == "broadcast" else None
        self._capacity = bucket_bytes
        holdings = Holdings(runtime.rank, runtime.replica_rank, tuple(piece for piece, _ in self._pieces))
        everybody: list[Holdings] = runtime.gather_all(holdings)
        senders = leaders([each.replica for each in everybody]) if placement == "colocated" else [0]
        self.is_sender = runtime.rank in senders
        """Whether this process feeds engines."""
        limit = max(1, self._capacity // self._dtype.itemsize)
        self._plan = make_plan(self._links, everybody, senders, runtime.rank, limit)
        self._stream: Stream | None = None
        if runtime.world_size > 1:
            # NCCL sets up its communicator with all processes, before the first message between two
            dist.all_reduce(torch.zeros(1, device=runtime.device))

    def send(self, updates: Sequence[Update], version: int) -> RefitStats:
        """Send the present weights. Collective.

        updates: on a sender, `update` of each of its engines; nothing elsewhere. Weights must be up to date on every
        process (`Trainer.synchronize`). Raises RefitError on every process when an engine did not take them.
        """
        begin = time.perf_counter()
        if not all(map(follow_training, self._chunks)) or addresses(self._chunks) != self._addresses:
            self._read_pieces()
        failure, totals = self._unfit(updates), None
        sending = None
        if self.is_sender and not failure:
            try:
                self._stream = self._stream or self._new_stream()
            except (OSError, RuntimeError) as error:  # no memory for buckets, say: the others are gathering already
                failure = str(error).split("\n")[0] or type(error).__name__
            else:
                sending = Sending(self._stream, self._shapes, self._dtype, updates, version)
        try:
            pieces = [tensor for _, tensor in self._pieces]
            for link, whole in gathered(self._plan, pieces, self._runtime.rank, self._dtype):
                if sending is not None:
                    sending.put(link, whole)
                del whole  # before the next one is put together
        except BaseException:  # another process is gone, or this one is to end
            if sending is not None:
                sending.fail(RefitError("the trainer's processes lost each other"))
            raise
        finally:
            if sending is not None:
                totals, failure = sending.finish()
                if sending.failure is not None:
                    self._stream = None
        seconds = time.perf_counter() - begin
        parts = {} if sending is None else _parts(sending, seconds)
        outcomes = self._runtime.gather_all((failure, totals, seconds, parts))
        failures = {why: None for why, *_ in outcomes if why}
        if failures:
            raise RefitError(f"weight version {version} did not reach the rollout engines: {'; '.join(failures)}")
        sent: Totals
        sent, parts = next((totals, parts) for _, totals, _, parts in outcomes if totals is not None)
        return RefitStats(sent.nbytes, sent.tensors, max(seconds for _, _, seconds, _ in outcomes), parts)

    def close(self) -> None:
        """Give back buffers and connections."""
        if self._stream is not None:
            self._stream.stop("the trainer has finished")
            self._stream = None

    def _unfit(self, updates: Sequence[Update]) -> str:
        if self.is_sender == bool(updates):
            return ""
        what = "feeds engines but was given none" if self.is_sender else "feeds no engines but was given some"
        return f"the trainer's process {self._runtime.rank} {what}"

    def _new_stream(self) -> Stream:
        carrier = make_carrier(self._transport, self._capacity, self._runtime.device, self._host, self._timeout)
        return Stream(carrier, self._receivers, self._timeout, self._host)

    def _read_pieces(self) -> None:
        self._pieces = local_pieces(self._chunks)
        self._addresses = addresses(self._chunks)


def _parts(sending: Sending, seconds: float) -> dict[str, float]:
    """Of the seconds of a process that sends, and of its receivers."""
    parts = {f"sender: {name}": value for name, value in sending.seconds.items()}
    parts["sender: rest"] = seconds - sum(sending.seconds.values())
    slowest = max(sending.received, key=lambda receiver: receiver.get("copy", 0.0), default={})
    return parts | {f"receiver: {name}": value for name, value in slowest.items()}
