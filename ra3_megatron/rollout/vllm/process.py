"""A process that hosts vLLM, as its owner sees it: start, call, watch, end.

`EngineProcess` starts the process and knows how it ended; `EngineClient` is the connection to one. A call waits for
its answer, for the death of the process or for `call_timeout`, whichever comes first, and the last two
are one `EngineError` that says what happened and where the log is. Nothing sleeps and nothing is left behind: the
process ends with its owner and with whoever started it.
"""

import contextlib
import os
import pickle
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from ra3_megatron.rollout.vllm.messages import Address, Call, EngineSpec, Ready, Reply, Start
from ra3_megatron.rollout.vllm.segments import Segment, remove, segments_of
from ra3_megatron.rollout.vllm.wire import connect, limit

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the process itself
    # a process that has asked for its GPUs without NVML must not fork: CUDA would not work in its workers
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the runner whose logits processors see every token of a request
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "passive",  # threads that spin starve the trainer's, a hundredfold on a full machine
}

FOREIGN = re.compile(
    r"(GROUP_|LOCAL_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|VLLM_CPU_KVCACHE_SPACE"
)
"""Variables of the trainer that torch or vLLM would take for the engine's."""

CLOSE_SECONDS = 10.0
"""A process that was asked to end and has not by then is killed."""

HANGS = (BlockingIOError, TimeoutError)
"""How a connection fails at a time limit."""

ERROR_LINE = re.compile(r"^\S*(Error|Exception|Exit|Interrupt)\b.*")


class EngineError(RuntimeError):
    """A vLLM process died, hung or refused a call; the message is complete by itself."""


class Watched(Protocol):
    """A process with an engine, wherever it runs."""

    authkey: bytes
    """Of its connection, once it is ready."""

    def wait_ready(self, timeout: float) -> Address:
        """Wait until it listens; its address. Raises EngineError, after which it is gone."""
        ...

    def epitaph(self) -> str:
        """How it ended; it is made to end when it still runs."""
        ...

    def close(self) -> None:
        """Wait for the process, whose connection was closed, to end."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


class EngineProcess:
    """One vLLM process that this process started. Use: start several, then `wait_ready` for each."""

    def __init__(self, process: subprocess.Popen[bytes], ready: int, folder: Path, log: Path, authkey: bytes) -> None:
        self.authkey = authkey
        self.log = log
        self._process = process
        self._ready = os.fdopen(ready, "rb", buffering=0)
        self._folder = folder
        self._killed = False
        self._segments: set[Segment] = set()
        """Shared memory, once it is ready: who finds it dead can no longer ask its workers."""

    @classmethod
    def start(cls, spec: EngineSpec, log: Path, host: str | None = None) -> "EngineProcess":
        """Start a process; it builds the engine while the caller goes on.

        log: file for its output. host: listen on a free TCP port of that interface (none: on a unix socket, for this
        machine only). Call it from the main thread: the kernel ends the process with the thread that started it.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("a vLLM process must be started from the main thread, with which it ends")
        folder = Path(tempfile.mkdtemp(prefix="ra3-vllm-"))
        read, write = os.pipe()
        log.parent.mkdir(parents=True, exist_ok=True)
        authkey = secrets.token_bytes(32)
        address: Address = str(folder / "socket") if host is None else (host, 0)
        try:
            (folder / "start").write_bytes(pickle.dumps(Start(spec, address, authkey, os.getpid())))
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "ra3_megatron.rollout.vllm.server", str(folder / "start"), str(write)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=_environment(spec),
                    pass_fds=(write,),
                    start_new_session=True,
                )
        except BaseException:
            os.close(read)
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            os.close(write)
        return cls(process, read, folder, log, authkey)

    def wait_ready(self, timeout: float) -> Address:
        """Wait until the engine listens; its address. Raises EngineError when it dies or takes longer than `timeout`
        seconds, after which it is gone."""
        with self._ready as pipe:
            if not wait([pipe.fileno()], timeout):  # select() knows 1,024 files
                self.kill()
                raise EngineError(f"the vLLM engine was not ready after {timeout:g} s; {self._log_says()}")
            message = pipe.read()
        if not message:
            raise EngineError(f"the vLLM engine did not start: {self.epitaph()}")
        ready: Ready = pickle.loads(message)
        if ready.address is None:
            self.kill()
            raise EngineError(f"the vLLM engine did not start: {ready.failed}; log {self.log}")
        self._segments = segments_of(self.pid)
        return ready.address

    def fileno(self) -> int:
        """Readable when `wait_ready` would not wait any more. Not to be asked for after that."""
        return self._ready.fileno()

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def epitaph(self) -> str:
        """How the process ended; it is made to end when it still runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        code = self._process.poll()
        self.kill()
        if code is None:
            how = "killed after it had closed its connection"
        elif code < 0:
            how = f"killed by {signal.Signals(-code).name}"
        else:
            how = f"exit code {code}"
        return f"process {self.pid}, {how}; {self._log_says()}"

    def close(self) -> None:
        """Wait for the process, whose connection was closed, to end; kill it if it does not."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End the process and those it started, at once; their shared memory is free then."""
        if self._killed:  # its number may be another's by now
            return
        self._killed = True
        segments = self._segments | segments_of(self.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        remove(segments)
        self._ready.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _log_says(self) -> str:
        return f"log {self.log}: {last_line(self.log)}"


class EngineClient:
    """The owner's connection to a vLLM process."""

    def __init__(self, address: Address, authkey: bytes, call_timeout: float, process: Watched | None = None) -> None:
        """process: the one behind the address, if it is this process's to end: it is ended when it hangs.

        Raises EngineError when it cannot be reached, or does not answer within `call_timeout` seconds.
        """
        self.call_timeout = call_timeout
        self.process = process
        self._name = address if isinstance(address, str) else f"{address[0]}:{address[1]}"
        self._closed = ""
        """Why nothing can be asked any more."""
        self._turn = threading.Lock()
        try:
            self._connection: Connection = connect(address, authkey, call_timeout)
        except (EOFError, OSError, AuthenticationError) as error:
            why = f"the vLLM engine at {self._name} cannot be reached ({type(error).__name__}: {error})"
            if process is not None:
                if isinstance(error, HANGS):
                    process.kill()
                why += f": {process.epitaph()}"
            raise EngineError(why) from error

    def call(self, method: str, *arguments: Any) -> Any:
        """What the server's `method` returned. Raises EngineError when it refused, failed, died or hung. Threads that
        call at once are answered one after another."""
        with self._turn:
            return self._exchange(self.call_timeout, method, *arguments)

    def close(self) -> None:
        """End the engine: in good order if it is not busy, at once if it is."""
        if self._turn.acquire(timeout=CLOSE_SECONDS):
            try:
                if not self._closed:
                    with contextlib.suppress(EngineError):
                        self._exchange(min(CLOSE_SECONDS, self.call_timeout), "close")
                    self._closed = "the vLLM engine was closed"
                    self._connection.close()
            finally:
                self._turn.release()
            if self.process is not None:
                self.process.close()
        elif self.process is not None:
            self.process.kill()

    def _exchange(self, timeout: float, method: str, *arguments: Any) -> Any:
        if self._closed:
            raise EngineError(self._closed)
        try:
            limit(self._connection, timeout)
            self._connection.send(Call(method, arguments))
            if not self._connection.poll(timeout):
                raise BlockingIOError
            reply: Reply = self._connection.recv()
        except BlockingIOError:
            self._end(f"the vLLM engine did not answer '{method}' within {timeout:g} s and was given up")
        except (EOFError, OSError) as error:
            self._end(f"the vLLM engine died during '{method}'", error)
        except KeyboardInterrupt:  # the answer to come would be taken for the next call's
            self._closed = f"the vLLM engine was interrupted during '{method}'"
            self._connection.close()
            raise
        if reply.failed:
            self._end(f"the vLLM engine failed in '{method}': {reply.failed}")
        if reply.refused:
            raise EngineError(reply.refused)
        return reply.value

    def _end(self, what: str, cause: Exception | None = None) -> None:
        self._connection.close()
        if self.process is None:
            self._closed = f"{what} (at {self._name})"
        else:
            if cause is None:
                self.process.kill()
            self._closed = f"{what}: {self.process.epitaph()}"
        raise EngineError(self._closed) from cause


def start_engine(spec: EngineSpec, log: Path, start_timeout: float, call_timeout: float) -> EngineClient:
    """A vLLM process on this machine, ready, and the connection to it."""
    return connect_all([EngineProcess.start(spec, log)], start_timeout, call_timeout)[0]


def connect_all(processes: Sequence[Watched], start_timeout: float, call_timeout: float) -> list[EngineClient]:
    """Connections to processes that were started together; all are ended when one does not come up."""
    try:
        return [
            EngineClient(process.wait_ready(start_timeout), process.authkey, call_timeout, process)
            for process in processes
        ]
    except BaseException:
        for process in processes:
            process.kill()
        raise


def last_line(log: Path) -> str:
    """The last line of a log that names an error, or else the last one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if ERROR_LINE.match(line)]
    return (errors or lines or ["(empty)"])[-1]


def _environment(spec: EngineSpec) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not FOREIGN.fullmatch(name)}
    environment |= {**ENVIRONMENT, "OMP_NUM_THREADS": str(spec.threads)}
    if spec.devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(spec.devices)
    return environment
