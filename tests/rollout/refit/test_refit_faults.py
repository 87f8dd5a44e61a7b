"""Whatever goes wrong on the way is an error on both sides, in finite time, and the next refit works again."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collected import Collector, EngineProcess, differing, expected_tensors
from torch import Tensor

import ra3_megatron.mcore  # noqa: F401
from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.hf.families import family_for
from ra3_megatron.hf.weights import Link, same
from ra3_megatron.mcore.model import language_model
from ra3_megatron.mcore.shards import shards_of
from ra3_megatron.mcore.startup import Runtime, initialize
from ra3_megatron.rollout.refit import channel, shards
from ra3_megatron.rollout.refit.buckets import Bucket, Totals
from ra3_megatron.rollout.refit.errors import RefitError
from ra3_megatron.rollout.refit.receiver import StreamWeights
from ra3_megatron.rollout.refit.refit import Refit
from ra3_megatron.rollout.refit.stream import Stream
from tests.mcore.small_models import MODEL, VOCAB, build, weights
from tests.processes import ROOT, run_processes

BUCKET = 8192
TIMEOUT = 60.0
LINKS = family_for(MODEL).links(MODEL, VOCAB)
PARALLEL = ParallelConfig(threads=1)


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return initialize(PARALLEL, seed=1)


@pytest.fixture(scope="module")
def model(runtime: Runtime) -> torch.nn.Module:
    return build(PARALLEL, runtime)


@pytest.fixture(scope="module")
def expected(model: torch.nn.Module, runtime: Runtime) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in expected_tensors(weights(model, runtime), LINKS).items()}


def make_refit(model: torch.nn.Module, runtime: Runtime, **changes: Any) -> Refit:
    settings: dict[str, Any] = {"receivers": 1, "bucket_bytes": BUCKET, "timeout": TIMEOUT, "host": "127.0.0.1"}
    return Refit(model, runtime, LINKS, "colocated", **(settings | changes))


@pytest.fixture(params=["shared", "broadcast"])
def refit(request: pytest.FixtureRequest, model: torch.nn.Module, runtime: Runtime) -> Iterator[Refit]:
    made = make_refit(model, runtime, transport=request.param)
    yield made
    made.close()


@pytest.fixture(scope="module")
def spare() -> Iterator[EngineProcess]:
    """An engine's process that is started once."""
    process = EngineProcess()
    yield process
    process.close()


# -- what the sender says is not what was announced -------------------------------------------------------------------


def change_parts(**values: Any) -> Callable[[Bucket], Bucket]:
    return lambda bucket: replace(bucket, parts=(replace(bucket.parts[0], **values), *bucket.parts[1:]))


NAME = "model.layers.0.input_layernorm.weight"
CORRUPTIONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "without a tensor": (lambda b: replace(b, parts=b.parts[1:]), "8192 bytes belong to no tensor"),
    "unknown": (change_parts(name="model.other"), "tensor model.other was not announced"),
    "misshapen": (change_parts(shape=(150, 33)), r"embed_tokens.weight came with shape \[150, 33\], not \[150, 32\]"),
    "out of order": (lambda b: replace(b, number=b.number + 1), "bucket 1 came where 0 was due"),
    "truncated": (lambda b: replace(b, size=b.size - 64), "lies outside of its place|answered Accepted"),
    "no bucket": (lambda b: "hello", "sent str where a bucket was due"),
}


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_a_corrupt_stream_fails_on_both_sides(
    refit: Refit, expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    corrupt, message = CORRUPTIONS[what]
    tell = Stream._tell

    def corrupted(self: Stream, said: object) -> None:
        tell(self, corrupt(said) if isinstance(said, Bucket) and said.number == 0 else said)

    engine = Collector()
    refit.send([engine.update], 0)
    with monkeypatch.context() as patch, pytest.raises(RefitError, match=message) as raised:
        patch.setattr(Stream, "_tell", corrupted)
        refit.send([engine.update], 1)
    assert str(raised.value).startswith("weight version 1 did not reach the rollout engines: ")
    assert "\n" not in str(raised.value)
    assert engine.error and engine.version is None
    refit.send([engine.update], 2)
    assert differing(engine.weights, expected) == []


@pytest.mark.parametrize("count", [0, 2], ids=["missing", "duplicated"])
def test_each_tensor_must_come_once(
    refit: Refit, expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    from ra3_megatron.rollout.refit.sending import Sending

    put = Sending.put

    def changed(self: Sending, link: Link, whole: Tensor) -> None:
        for _ in range(count if link.names == (NAME,) else 1):
            put(self, link, whole)

    engine = Collector()
    with monkeypatch.context() as patch, pytest.raises(RefitError, match=f"tensor {NAME} (never came|came twice)"):
        patch.setattr(Sending, "put", changed)
        refit.send([engine.update], 1)
    assert NAME in engine.error
    refit.send([engine.update], 2)
    assert differing(engine.weights, expected) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_sent(
    refit: Refit, model: torch.nn.Module, expected: dict[str, Tensor], value: float
) -> None:
    engine = Collector()
    weight = language_model(model).decoder.final_layernorm.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[3] = value
    message = "tensor model.norm.weight holds values that are not finite"
    with pytest.raises(RefitError, match=f"weight version 1 did not reach the rollout engines: {message}"):
        refit.send([engine.update], 1)
    assert engine.error == f"the trainer stopped the update: {message}"
    with torch.no_grad():
        weight.copy_(before)
    refit.send([engine.update], 2)
    assert differing(engine.weights, expected) == []


def test_a_wrong_count_at_the_end_is_seen(refit: Refit, monkeypatch: pytest.MonkeyPatch) -> None:
    tell = Stream._tell

    def corrupted(self: Stream, said: object) -> None:
        tell(self, replace(said, tensors=said.tensors + 1) if isinstance(said, Totals) else said)

    monkeypatch.setattr(Stream, "_tell", corrupted)
    engine = Collector()
    with pytest.raises(RefitError, match="were sent"):
        refit.send([engine.update], 1)
    assert "were sent" in engine.error and engine.version is None


# -- engines that do not take the weights -----------------------------------------------------------------------------


def refusing(_: int, source: StreamWeights) -> None:
    """The manifest is not the engine's: it never asks for a tensor."""
    assert NAME in source.manifest()
    raise RuntimeError(f"tensor {NAME} is not part of the model")


def stopping(_: int, source: StreamWeights) -> None:
    for name, _tensor in source.tensors():
        if name == NAME:
            raise RuntimeError(f"tensor {NAME} is not part of the model")


def failing_afterwards(_: int, source: StreamWeights) -> None:
    list(source.tensors())
    raise RuntimeError(f"tensor {NAME} is not part of the model")


@pytest.mark.parametrize("update", [refusing, stopping, failing_afterwards])
def test_the_engines_own_reason_is_told(refit: Refit, expected: dict[str, Tensor], update: Any) -> None:
    engine = Collector()
    refit.send([engine.update], 0)
    with pytest.raises(RefitError, match=f"weight version 1 did not .*: tensor {NAME} is not part of the model$"):
        refit.send([update], 1)
    refit.send([engine.update], 2)
    assert differing(engine.weights, expected) == []


def test_one_of_two_engines_refuses(model: torch.nn.Module, runtime: Runtime, expected: dict[str, Tensor]) -> None:
    refit = make_refit(model, runtime, receivers=2)
    one, other = Collector(), Collector()
    with pytest.raises(RefitError, match=f"tensor {NAME} is not part of the model"):
        refit.send([one.update, refusing], 1)
    assert one.version is None and one.error
    refit.send([one.update, other.update], 2)
    assert differing(one.weights, expected) == differing(other.weights, expected) == []
    refit.close()


def test_engines_that_take_too_long(model: torch.nn.Module, runtime: Runtime) -> None:
    refit = make_refit(model, runtime, timeout=0.2)
    released = threading.Event()

    def never_asks(_: int, source: StreamWeights) -> None:
        released.wait(TIMEOUT)

    def stops_asking(_: int, source: StreamWeights) -> None:
        for _item in source.tensors():
            released.wait(TIMEOUT)

    stop = Stream.stop

    def stopped(self: Stream, reason: str) -> None:
        stop(self, reason)
        released.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "stop", stopped)
        with pytest.raises(RefitError, match=r"0 of 1 engine processes asked for the weights within 0\.2 s"):
            refit.send([never_asks], 1)
        released.clear()
        with pytest.raises(RefitError, match=r"an engine's process did not answer for 0\.2 s"):
            refit.send([stops_asking], 2)


def test_a_sender_that_says_nothing_is_given_up(model: torch.nn.Module, runtime: Runtime) -> None:
    """The receiver gives up after its time limit."""
    refit = make_refit(model, runtime)
    engine = Collector()
    with pytest.raises(RefitError, match=r"the trainer sent nothing for 0\.1 s"), pytest.MonkeyPatch.context() as patch:
        done = threading.Event()

        def update(version: int, source: StreamWeights) -> None:
            try:
                engine.update(version, replace(source, timeout=0.1))
            finally:
                done.set()

        patch.setattr(Stream, "_deliver", lambda self, bucket: done.wait(TIMEOUT))
        refit.send([update], 1)
    assert engine.version is None


def test_no_memory_for_buckets_is_a_failure_as_any_other(
    refit: Refit, expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other processes, which the sender goes on gathering with, are told as well."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("out of memory")

    engine = Collector()
    with monkeypatch.context() as patch, pytest.raises(RefitError, match=r"version 1 did not reach .*: out of memory$"):
        patch.setattr("ra3_megatron.rollout.refit.refit.make_carrier", refuse)
        refit.send([engine.update], 1)
    refit.send([engine.update], 2)
    assert differing(engine.weights, expected) == []


def test_updates_belong_to_senders(refit: Refit) -> None:
    with pytest.raises(RefitError, match="the trainer's process 0 feeds engines but was given none"):
        refit.send([], 1)


def test_strangers_are_turned_away(refit: Refit, expected: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Collector()
    outcomes: list[str] = []

    def update(version: int, source: StreamWeights) -> None:
        family = socket.AF_UNIX if isinstance(source.address, str) else socket.AF_INET
        with socket.socket(family) as leaving:
            leaving.connect(source.address)
        try:
            Client(source.address, authkey=b"guessed")
        except Exception as error:
            outcomes.append(type(error).__name__)
        with socket.socket(family) as silent:
            silent.connect(source.address)
            engine.update(version, replace(source, timeout=10.0))

    monkeypatch.setattr(channel, "HANDSHAKE_SECONDS", 0.2)
    refit.send([update], 1)
    assert outcomes == ["AuthenticationError"]
    assert differing(engine.weights, expected) == []


def test_nothing_secret_is_shown() -> None:
    source = StreamWeights("x", b"secret-key", 1, {}, torch.float32, 1.0)
    assert "secret" not in repr(source)


def test_a_map_that_is_not_the_models_is_refused_at_once(model: torch.nn.Module, runtime: Runtime) -> None:
    with pytest.raises(ValueError, match=r"decoder\.final_layernorm\.weight at .* is not part of the weight map"):
        Refit(model, runtime, [link for link in LINKS if "model.norm.weight" not in link.names], "server", 1)
    twice = [*LINKS, same(replace(LINKS[-1].slot, key="other"), "other")]
    with pytest.raises(ValueError, match="the model holds 0 of"):
        Refit(model, runtime, twice, "server", 1)


def test_weights_that_moved_in_memory_are_found(runtime: Runtime) -> None:
    model = build(PARALLEL, runtime)
    refit = make_refit(model, runtime)
    engine = Collector()
    refit.send([engine.update], 1)
    before = engine.weights
    for parameter in model.parameters():
        parameter.data = parameter.data * 2
    refit.send([engine.update], 2)
    assert differing(engine.weights, {name: 2 * tensor for name, tensor in before.items()}) == []
    refit.close()


def test_shards_that_are_copies_are_refused(
    model: torch.nn.Module, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be sent as they were at set-up, for ever."""

    def copies(*arguments: Any) -> Iterator[Any]:
        for shard in shards_of(*arguments):
            shard.data = shard.data.clone()
            yield shard

    monkeypatch.setattr(shards, "shards_of", copies)
    with pytest.raises(RuntimeError, match="is a copy of the weight, not the weight"):
        make_refit(model, runtime)


# -- processes that die -----------------------------------------------------------------------------------------------


def leftovers() -> set[str]:
    """Names of unix sockets and shared memory of refits; those of tests that run beside this one, too."""
    sockets = {word for word in Path("/proc/net/unix").read_text().split() if "ra3-refit" in word}
    return sockets | {entry.name for entry in Path("/dev/shm").iterdir() if "ra3" in entry.name}


def assert_nothing_is_left(before: set[str], seconds: float = 60) -> None:
    """Refits of tests that run beside this one end; what a refit here had left would stay."""
    end = time.monotonic() + seconds
    while left := leftovers() - before:
        assert time.monotonic() < end, left
        time.sleep(0.2)


@pytest.mark.multiprocess
@pytest.mark.parametrize("after", [0, 5])
def test_an_engine_that_is_killed(refit: Refit, spare: EngineProcess, expected: dict[str, Tensor], after: int) -> None:
    before = leftovers()
    engine = EngineProcess(kill_after=after)
    with pytest.raises(RefitError, match=r"the engine's process died \(-9\)"):
        refit.send([engine.update], 1)
    engine.close()
    refit.send([spare.update], 2)
    assert differing(spare.weights, expected) == []
    refit.close()
    assert_nothing_is_left(before)


@pytest.mark.multiprocess
def test_an_engine_that_was_replaced_between_two_refits(
    refit: Refit, spare: EngineProcess, expected: dict[str, Tensor]
) -> None:
    engine = EngineProcess()
    refit.send([engine.update], 1)
    engine.close()
    refit.send([spare.update], 2)
    assert differing(spare.weights, expected) == []


def die_while_sending(transport: str) -> None:
    """A trainer that sends to the process that reads its output, and kills itself at the second bucket."""
    runtime = initialize(PARALLEL, seed=1)
    refit = make_refit(build(PARALLEL, runtime), runtime, transport=transport)
    deliver = Stream._deliver

    def delivered(self: Stream, bucket: Bucket) -> None:
        if bucket.number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        deliver(self, bucket)

    Stream._deliver = delivered  # type: ignore[method-assign]
    answered = threading.Event()

    def update(version: int, source: StreamWeights) -> None:
        pickle.dump(source, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        answered.wait()

    refit.send([update], 1)


@pytest.mark.multiprocess
@pytest.mark.parametrize("transport", ["shared", "broadcast"])
def test_a_trainer_that_is_killed(transport: str) -> None:
    before = leftovers()
    code = f"import test_refit_faults as t; t.die_while_sending({transport!r})"
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT), *sys.path])
    sender = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    assert sender.stdout is not None
    source = pickle.load(sender.stdout)
    engine = Collector()
    with pytest.raises(RefitError, match="the trainer went away during the update"):
        engine.update(1, source)
    assert sender.wait() == -signal.SIGKILL
    with pytest.raises(RefitError, match="the trainer cannot be reached to fetch weights"):
        engine.update(1, source)
    assert_nothing_is_left(before)
    sender.stdout.close()


def fail_on_one_replica() -> tuple[str, str]:
    """Two replicas; the second one's engine refuses."""
    parallel = ParallelConfig(threads=1, data=2)
    runtime = initialize(parallel, seed=1)
    refit = make_refit(build(parallel, runtime), runtime)
    engine = Collector()
    message = ""
    try:
        refit.send([refusing if runtime.rank == 1 else engine.update], 1)
    except RefitError as error:
        message = str(error)
    refit.send([engine.update], 2)
    assert engine.version == 2
    refit.close()
    return message, engine.error


def fail_at_the_only_sender() -> tuple[str, str]:
    """TP2; the sender's engine stops midway."""
    parallel = ParallelConfig(threads=1, tensor=2)
    runtime = initialize(parallel, seed=1)
    refit = make_refit(build(parallel, runtime), runtime)
    engine = Collector()
    message = ""
    try:
        refit.send([stopping] if refit.is_sender else [], 1)
    except RefitError as error:
        message = str(error)
    refit.send([engine.update] if refit.is_sender else [], 2)
    try:
        refit.send([engine.update], 3)
    except RefitError as error:
        assert str(error).endswith("the trainer's process 1 feeds no engines but was given some")
    else:
        raise AssertionError("rank 1 has no engines")
    refit.close()
    return message, engine.error


def lose_a_process() -> tuple[str, str]:
    """TP2; the second process leaves before its weights were sent."""
    parallel = ParallelConfig(threads=1, tensor=2)
    runtime = initialize(parallel, seed=1)
    refit = make_refit(build(parallel, runtime), runtime)
    engine = Collector()
    if runtime.rank == 1:
        dist.destroy_process_group()
        return "", ""
    message = ""
    try:
        refit.send([engine.update], 1)
    except RuntimeError as error:
        message = str(error)
    return message, engine.error


def fail_in_many_ways() -> list[tuple[str, str]]:
    return [fail_on_one_replica(), fail_at_the_only_sender(), lose_a_process()]


@pytest.mark.multiprocess
def test_a_failure_on_one_process_is_raised_on_all() -> None:
    first, second = run_processes(2, fail_in_many_ways)
    assert first[2][0]
    assert first[2][1] == "the trainer stopped the update: the trainer's processes lost each other"
    for outcomes in (first, second):
        for message, error in outcomes[:2]:
            assert message == (
                f"weight version 1 did not reach the rollout engines: tensor {NAME} is not part of the model"
            )
            assert error == ""
