"""Runs whose engines another process hosts, at another address: the numbers of engines beside the trainer."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_run import CHUNK, Ra3, metrics, weights

from ra3_megatron.rollout.nodes.meeting import FILE, Meeting
from ra3_megatron.rollout.nodes.messages import Done, Offer
from ra3_megatron.rollout.refit.channel import accept, listen

pytest.importorskip("vllm", reason="vllm is not installed")

MODEL = ("model.head_dim=32", "em.iterations=1", "em.control=false", "rollout.engine=vllm")
NODES = ("rollout.placement=nodes", "checkpoint.interval=1")
ADDRESS = "127.0.0.2"
"""Of the node with the engines: this machine's, too, but not the trainer's."""
APART = CHUNK | {"ra3_megatron.rollout.refit.carriers:SharedCarrier": None}
"""Memory that both share would be no way to another machine."""


class Host:
    """`ra3 engines` in a process of its own."""

    def __init__(self, run: Path, *options: str) -> None:
        self.output = run.with_name(f"{run.name}.host")
        words = [sys.executable, "-m", "ra3_megatron", "engines", "--run-dir", str(run), "--address", ADDRESS, *options]
        environment = {**os.environ, "SLURMD_NODENAME": "rollouts"}
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment)

    def says(self, text: str, seconds: float = 120) -> str:
        """Wait for it to say so; all that it said."""
        end = time.monotonic() + seconds
        while text not in self.output.read_text():
            assert self.process.poll() is None and time.monotonic() < end, self.output.read_text()
            time.sleep(0.05)
        return self.output.read_text()

    def ends(self) -> int:
        return self.process.wait(60)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Callable[..., Host]]:
    hosts: list[Host] = []

    def start(*options: str) -> Host:
        hosts.append(Host(tmp_path / "run", *options))
        return hosts[-1]

    yield start
    for each in hosts:
        each.process.kill()
        each.process.wait()


def infused(run: Path) -> dict[str, bytes]:
    files = [path for path in (run / "infused").rglob("*") if path.suffix in (".bin", ".idx")]
    assert files
    return {path.name: path.read_bytes() for path in files}


def engines_of(run: Path) -> list[int]:
    """Engines that still run, by the name of their log."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            target, state = os.readlink(process / "fd" / "1"), (process / "stat").read_text()
        except OSError:
            continue
        if target.startswith(str(run / "vllm")) and ") Z " not in state:
            found.append(int(process.name))
    return found


@pytest.mark.extended
def test_engines_elsewhere_give_the_same_run_also_to_a_second_attempt(
    ra3: Ra3, config: Path, tmp_path: Path, host: Callable[..., Host]
) -> None:
    servers, run = tmp_path / "servers", tmp_path / "run"
    ra3("train", config, *MODEL, "rollout.placement=server", f"run_dir={servers}")
    hosting = host("--engines-per-node", "2")
    arguments = ("train", config, *MODEL, *NODES, "rollout.vllm.refit_bucket_mb=1", f"run_dir={run}")
    killed = ra3(*arguments, code=None, kill=["ra3_megatron.em.steps:EStepSteps.step", "before", 2])
    assert killed.code == -signal.SIGKILL
    hosting.says("the trainer has gone, and its engines with it")
    assert not engines_of(run)
    ra3(*arguments, "rollout.replicas=2", "--resume", set=APART)
    assert hosting.ends() == 0 and "the run is finished" in hosting.output.read_text()
    assert metrics(run) == metrics(servers)
    assert infused(run) == infused(servers)
    final = Path("checkpoints") / "mstep-1" / "final"
    one, other = weights(run / final), weights(servers / final)
    assert all((one[name] == other[name]).all() for name in one)
    logs = sorted(path.name for path in (run / "vllm").iterdir())
    assert logs == ["engine-rollouts-0.log", "engine-rollouts-1.log", "model-0"], "the meeting's file is gone"
    assert not engines_of(run)


def test_a_run_without_nodes_says_how_many_it_needs(
    ra3: Ra3, config: Path, tmp_path: Path, host: Callable[..., Host]
) -> None:
    hosting, run = host(), tmp_path / "run"
    hosting.says("waiting for the trainer")
    settings = ("rollout.placement=nodes", "rollout.replicas=2", "rollout.vllm.start_timeout=8")
    failed = ra3("train", config, *MODEL, *settings, f"run_dir={run}", code=None)
    (line,) = [line for line in failed.errors.splitlines() if line.startswith("ra3: ")]
    assert failed.code and line.count("1 of 2 engines have a place after 8 s, on 1 nodes") == 1
    assert f"start `ra3 engines --run-dir {run}`" in line
    assert not (run / "vllm" / FILE).exists() and not (run / "checkpoints").exists()
    assert hosting.process.poll() is None, "it waits for the next attempt"


@pytest.mark.extended
def test_an_engine_that_dies_is_named_with_its_node(config: Path, tmp_path: Path, host: Callable[..., Host]) -> None:
    hosting, run = host(), tmp_path / "run"
    settings = [*MODEL, "rollout.placement=nodes", "warm_start.steps=1", "estep.steps=100000", f"run_dir={run}"]
    trainer = subprocess.Popen(
        [sys.executable, "-m", "ra3_megatron", "train", str(config), *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdout is not None and trainer.stderr is not None
    for line in trainer.stdout:
        if line.startswith("estep-1"):
            break
    (engine,) = engines_of(run)
    os.kill(engine, signal.SIGKILL)
    trainer.stdout.read()
    (message,) = [line for line in trainer.stderr.read().splitlines() if line.startswith("ra3: ")]
    assert trainer.wait()
    assert f"engine 0 on node rollouts: process {engine}, killed by SIGKILL" in message
    assert "engine-rollouts-0.log" in message
    hosting.says("the trainer has gone")
    hosting.process.send_signal(signal.SIGTERM)
    assert hosting.ends() == 0


def test_both_sides_ask_for_the_key(tmp_path: Path, host: Callable[..., Host]) -> None:
    """A host stays up when the trainer of a file does not know its key, and offers its node to one that does."""
    folder = tmp_path / "run" / "vllm"
    listening, address = listen("127.0.0.1", "")
    wrong, right = (Meeting.new(["127.0.0.1"], int(address[1])) for _ in range(2))
    wrong.write(folder)
    assert stat.S_IMODE((folder / FILE).stat().st_mode) == 0o600
    accepted: list[Any] = []

    def listen_on() -> None:
        while not accepted:
            if (connection := accept(listening, right.key, 10.0)) is not None:
                accepted.append(connection)

    listener = threading.Thread(target=listen_on, daemon=True)
    listener.start()
    hosting = host("--engines-per-node", "3")
    said = hosting.says(f"attempt {wrong.attempt} does not answer")
    assert "AuthenticationError" in said or "digest" in said, said
    assert not accepted and hosting.process.poll() is None
    right.write(folder)
    wrong.remove(folder)
    assert (folder / FILE).exists(), "another attempt's"
    listener.join(60)
    (trainer,) = accepted
    offer = trainer.recv()
    assert isinstance(offer, Offer) and (offer.node, offer.address, offer.engines) == ("rollouts", ADDRESS, 3)
    hosting.process.send_signal(signal.SIGTERM)  # for the trainer
    time.sleep(0.5)
    assert hosting.process.poll() is None
    trainer.send(Done())
    assert hosting.ends() == 0
    listening.close()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(address[1])))
