"""The owner's side of a connection to an engine that is not there, or hangs; no vLLM is needed."""

import errno
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener
from pathlib import Path

import pytest

from ra3_megatron.rollout.vllm import process as process_module
from ra3_megatron.rollout.vllm.process import EngineClient, EngineError

KEY = b"key"
UNREACHABLE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNREFUSED)


def served(path: Path, behave: Callable[[Connection], None], authkey: bytes | None = KEY) -> Listener:
    """A listener whose first connection `behave` gets, in a thread."""
    listener = Listener(str(path), authkey=authkey)

    def serve() -> None:
        with listener.accept() as connection:
            behave(connection)

    threading.Thread(target=serve, daemon=True).start()
    return listener


@pytest.mark.parametrize("number", UNREACHABLE, ids=[errno.errorcode[number] for number in UNREACHABLE])
def test_a_machine_that_is_not_reached_is_no_mistake_of_the_user(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(number, "cannot be reached")

    monkeypatch.setattr(process_module, "connect", refuse)
    with pytest.raises(EngineError, match=r"^the vLLM engine at far:7 cannot be reached \(\w+: .*cannot be reached\)$"):
        EngineClient(("far", 7), KEY, 1.0)


def test_an_engine_that_hangs_before_it_has_proved_itself(tmp_path: Path) -> None:
    done = threading.Event()
    with served(tmp_path / "socket", lambda connection: done.wait(60) and None, authkey=None):
        with pytest.raises(EngineError, match=r"cannot be reached \(BlockingIOError: "):
            EngineClient(str(tmp_path / "socket"), KEY, 0.2)
        done.set()


def test_an_engine_that_does_not_read_what_it_is_sent(tmp_path: Path) -> None:
    done = threading.Event()
    with served(tmp_path / "socket", lambda connection: done.wait(60) and None):
        client = EngineClient(str(tmp_path / "socket"), KEY, 0.2)
        with pytest.raises(EngineError, match=r"did not answer 'sample' within 0.2 s and was given up"):
            client.call("sample", bytes(10_000_000))
        done.set()
