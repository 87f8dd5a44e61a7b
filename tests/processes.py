"""Run a function in several processes that talk over gloo, as torchrun would start them.

    results = run_processes(2, train, config)      # [train(config) of rank 0, of rank 1]

`function` must be at the top level of an importable module (a test module is one); arguments and results are pickled.
Each process sees RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. They are forked from one
that has imported torch and Megatron-Core, which takes seconds, and nothing else; a process that is given variables of
its own is a new one, as imports may read them.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = ("ra3_megatron.mcore.trainer", "ra3_megatron.mcore.checkpoint", "ra3_megatron.em.estep")
"""Modules that the server has imported before it forks: with them torch and Megatron-Core."""
GRACE_SECONDS = 2.0
"""After the first failure, the others get this long to report theirs."""


class ProcessesFailed(AssertionError):
    """A process raised, died or ran past the time limit; the message holds every rank's story."""


def run_processes(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 180.0,
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """What `function(*args)` returned in each of `world_size` processes, in rank order.

    environment: further variables of the processes. Raises ProcessesFailed; no process is left behind in any case.
    """
    import torch
    from torch.distributed import TCPStore

    # The parent holds the rendezvous, as torchrun does: the port is ours before anybody is told of it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="processes-") as name:
        folder = Path(name)
        (folder / "paths").write_bytes(pickle.dumps([str(ROOT), *sys.path]))
        (folder / "task").write_bytes(pickle.dumps((function.__module__, function.__qualname__, args)))
        shared = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            **(environment or {}),
        }
        # a process that was forked behind the imports cannot use a GPU any more
        forks = environment is None and not torch.cuda.is_available()
        processes: list[subprocess.Popen[bytes] | Forked] = []
        try:
            for rank in range(world_size):
                mine = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(_fork(folder, mine) if forks else _start(folder, mine))
            in_time = _wait(processes, timeout)
            ended = [process.poll() for process in processes]
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if not in_time or any(not (folder / f"result.{rank}").exists() for rank in range(world_size)):
            why = "a process failed" if in_time else f"not finished after {timeout:g} s"
            stories = [_story(folder, rank, code) for rank, code in enumerate(ended)]
            raise ProcessesFailed("\n".join([f"{function.__qualname__} in {world_size} processes: {why}", *stories]))
        return [pickle.loads((folder / f"result.{rank}").read_bytes()) for rank in range(world_size)]


def python_path(*folders: str | Path) -> str:
    """PYTHONPATH of a child: these folders, and those of this process's own, which may be where packages are."""
    return os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")]))


def _start(folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with (folder / f"output.{environment['RANK']}").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


class Forked:
    """A process that the server has forked; as much of Popen as is used here."""

    def __init__(self, pid: int) -> None:
        self.pid, self._handle, self._code = pid, os.pidfd_open(pid), None

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        return self._end(0)

    def wait(self) -> int | None:
        """The same, when it has ended."""
        return self._end(None)

    def _end(self, seconds: float | None) -> int | None:
        if self._code is None and select.select([self._handle], [], [], seconds)[0]:
            self._code = _ask({"reap": self.pid})
            os.close(self._handle)
        return self._code


_server: list[subprocess.Popen[bytes]] = []


def _fork(folder: Path, environment: dict[str, str]) -> Forked:
    return Forked(_ask({"folder": str(folder), "environment": environment, "umask": os.umask(os.umask(0o22))}))


def _ask(request: dict[str, Any]) -> int:
    """The answer of this process's server, started if there is none."""
    if not _server:
        command = [sys.executable, __file__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path(ROOT)}
        _server.append(subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        atexit.register(_server[0].kill)
    server = _server[0]
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(request).encode() + b"\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def _serve() -> None:
    """Fork processes, and say how they have ended, until nobody is left to ask."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        if "reap" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["reap"], 0)[1])
        else:
            answer = os.fork()
            with contextlib.suppress(PermissionError):  # a group of its own, whoever of both is first
                os.setpgid(answer, answer)
            if answer == 0:
                answers.close()
                _become(request)
        answers.write(f"{answer}\n")
        answers.flush()


def _become(request: dict[str, Any]) -> None:
    """In a forked process: what a new one would be."""
    try:
        folder = Path(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        os.umask(request["umask"])
        output = os.open(folder / f"output.{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        _main(folder)
    finally:
        os._exit(1)


def _wait(processes: list[subprocess.Popen[bytes] | Forked], timeout: float) -> bool:
    """Wait until all have ended, or one has failed; False when the time ran out."""
    end = time.monotonic() + timeout
    failing = False
    while any(process.poll() is None for process in processes):
        if time.monotonic() > end:
            return failing
        if not failing and any(process.poll() for process in processes):
            failing, end = True, min(end, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.02)
    return True


def _story(folder: Path, rank: int, code: int | None) -> str:
    output = (folder / f"output.{rank}").read_text(errors="replace").strip()
    if (folder / f"result.{rank}").exists():
        state = "finished"
    else:
        state = "was still running" if code is None else f"exit code {code}"
    return f"---- rank {rank}: {state}\n{output}"


def _main(folder: Path) -> None:
    sys.path[:] = pickle.loads((folder / "paths").read_bytes())
    module, name, args = pickle.loads((folder / "task").read_bytes())
    try:
        result = getattr(importlib.import_module(module), name)(*args)
        content = pickle.dumps(result)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # not through destructors that wait for the other ranks
    partial = folder / f"result.{os.environ['RANK']}.partial"
    partial.write_bytes(content)
    partial.rename(partial.with_suffix(""))
    sys.stdout.flush()
    sys.stderr.flush()
    everybody = [folder / f"result.{rank}" for rank in range(int(os.environ["WORLD_SIZE"]))]
    while folder.exists() and not all(result.exists() for result in everybody):
        time.sleep(0.01)  # others may still read from this one's sockets
    os._exit(0)


if __name__ == "__main__":
    _main(Path(sys.argv[1])) if len(sys.argv) > 1 else _serve()
