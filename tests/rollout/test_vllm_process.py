"""The life of a vLLM process: it is found dead or hanging, says why, and outlives nobody."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

import psutil
import pytest
from toy import FORMATS, LARGE, Toy
from vllm_processes import CALL_TIMEOUT, START_TIMEOUT, client_for, need_vllm, new_log, spec_of, wait_for_end

from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rollout.vllm import process as process_module
from ra3_megatron.rollout.vllm.messages import EngineSpec
from ra3_megatron.rollout.vllm.process import EngineClient, EngineError, EngineProcess, connect_all, last_line

STARTER = """
import pickle, sys
from pathlib import Path
from ra3_megatron.rollout.vllm.process import EngineProcess
spec, log = pickle.loads(Path(sys.argv[1]).read_bytes())
process = EngineProcess.start(spec, log)
process.wait_ready(180)
print(process.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def toys(runtime: Runtime) -> dict[str, Toy]:
    need_vllm()
    return {name: Toy(runtime, name, LARGE, max_latent_tokens=3) for name in FORMATS}


@pytest.fixture(scope="module")
def spec(toys: dict[str, Toy]) -> EngineSpec:
    return spec_of(toys["comment"])


def family(pid: int) -> list[int]:
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def test_the_key_is_asked_for_and_a_closed_process_is_gone(spec: EngineSpec) -> None:
    process = EngineProcess.start(spec, new_log(), host="127.0.0.1")
    address = process.wait_ready(START_TIMEOUT)
    assert address[0] == "127.0.0.1" and int(address[1]) > 0
    with pytest.raises(AuthenticationError):  # it is not heard, and does no harm
        Client(address, authkey=b"wrong")
    with socket.create_connection(address):  # it says nothing, and is not waited for
        client = EngineClient(address, process.authkey, CALL_TIMEOUT, process)
    assert client.call("health").pid == process.pid and client.call("health").version is None
    assert not process._folder.exists(), "a killed trainer would leave it"
    with pytest.raises(EngineError, match="no weights were loaded yet"):
        client.call("sample", [], 1.0)
    pids = family(process.pid)
    client.close()
    assert not process.alive() and not any(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(EngineError, match="the vLLM engine was closed"):
        client.call("health")
    client.close()


def test_a_killed_process_is_told(toys: dict[str, Toy]) -> None:
    client = client_for(toys["comment"])
    assert client.process is not None
    os.kill(client.process.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(EngineError, match=rf"process {client.process.pid}, killed by SIGKILL; log .*engine.log: "):
            client.call("health")


def test_a_hanging_process_is_ended(toys: dict[str, Toy]) -> None:
    client = client_for(toys["comment"], prefix_caching=False)
    assert client.process is not None
    client.call_timeout = 0.2
    os.kill(client.process.pid, signal.SIGSTOP)
    with pytest.raises(EngineError, match=r"did not answer 'health' within 0.2 s and was given up: process .* SIGKILL"):
        client.call("health")
    assert not client.process.alive()


def test_closing_waits_for_no_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that answers nothing is given the time to close alone, not that of a call."""
    monkeypatch.setattr(process_module, "CLOSE_SECONDS", 0.2)
    place, key = str(tmp_path / "socket"), b"a key"
    with Listener(place, authkey=key) as listener:
        held: list[Connection] = []
        thread = threading.Thread(target=lambda: held.append(listener.accept()))
        thread.start()
        client = EngineClient(place, key, call_timeout=120)
        thread.join()
        begin = time.monotonic()
        client.close()
        assert held and time.monotonic() - begin < 60
        with pytest.raises(EngineError, match="was closed"):
            client.call("health")
        held[0].close()


def test_a_busy_process_is_closed_at_once(toys: dict[str, Toy], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads never mix their answers, and one that waits hears of the end."""
    client = client_for(toys["tokens"])
    assert client.process is not None
    monkeypatch.setattr(process_module, "CLOSE_SECONDS", 0.1)
    os.kill(client.process.pid, signal.SIGSTOP)  # so that it stays busy
    errors: list[str] = []

    def ask() -> None:
        try:
            client.call("health")
        except EngineError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    while not client._turn.locked():
        os.sched_yield()
    client.close()
    for thread in threads:
        thread.join()
    assert len(errors) == 2 and errors[0] == errors[1]
    assert f"died during 'health': process {client.process.pid}, killed by SIGKILL" in errors[0]


def test_no_process_outlives_the_one_that_started_it(spec: EngineSpec, tmp_path: Path) -> None:
    """Whether or not anybody has connected to it."""
    task = tmp_path / "task"
    task.write_bytes(pickle.dumps((spec, new_log())))
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(task)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None
    pids = family(int(starter.stdout.readline()))
    starter.kill()
    starter.communicate()
    for pid in pids:
        wait_for_end(pid)


def test_a_process_that_does_not_start_says_why(spec: EngineSpec, tmp_path: Path) -> None:
    process = EngineProcess.start(EngineSpec(str(tmp_path), spec.sets, 64), new_log())
    with pytest.raises(EngineError, match=rf"did not start: .*Error: .*{tmp_path}.*; log .*engine.log$"):
        process.wait_ready(START_TIMEOUT)
    assert not process.alive()


def test_a_process_that_dies_while_it_starts_is_told(spec: EngineSpec) -> None:
    process = EngineProcess.start(spec, new_log())
    os.kill(process.pid, signal.SIGTERM)
    with pytest.raises(EngineError, match=rf"did not start: process {process.pid}, killed by SIGTERM; log .*: "):
        process.wait_ready(START_TIMEOUT)


def test_a_slow_start_is_given_up_with_all_that_were_started(spec: EngineSpec) -> None:
    processes = [EngineProcess.start(spec, new_log()) for _ in range(2)]
    assert all(process.alive() for process in processes)
    with pytest.raises(EngineError, match=r"was not ready after 0.01 s; log .*engine.log: "):
        connect_all(processes, 0.01, CALL_TIMEOUT)
    assert not any(process.alive() for process in processes)


def test_an_engine_is_told_its_devices_and_not_the_trainers_rank(
    spec: EngineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setenv("KEPT", "yes")
    environment = process_module._environment(replace(spec, devices=("2",), threads=5))
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"], environment["KEPT"]) == (
        "2",
        "5",
        "yes",
    )
    assert not {name for name, value in environment.items() if value == "7"}
    assert environment["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert process_module._environment(spec)["CUDA_VISIBLE_DEVICES"] == "0,1,2"


def test_threads_may_not_start_a_process(spec: EngineSpec) -> None:
    """The kernel would end it with the thread."""
    errors: list[BaseException] = []

    def start() -> None:
        try:
            EngineProcess.start(spec, new_log())
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "from the main thread" in str(errors[0])


def test_the_line_of_a_log_that_matters(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("")
    assert last_line(log) == "(empty)"
    log.write_text("one\n\n")
    assert last_line(log) == "one"
    log.write_text("one\nValueError: two\nmore\n")
    assert last_line(log) == "ValueError: two"
