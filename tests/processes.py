"""Run a function in several processes that talk over gloo, as torchrun would start them.

    results = run_processes(2, train, config)      # [train(config) of rank 0, of rank 1]

`function` must be at the top level of an importable module (a test module is one); arguments and results are pickled.
Each process sees RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Starting takes seconds
(torch and Megatron-Core are imported anew), so start processes once for a layout and check many things in them.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
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
        processes = []
        try:
            for rank in range(world_size):
                with (folder / f"output.{rank}").open("wb") as output:
                    process = subprocess.Popen(
                        [sys.executable, __file__, name],
                        env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                processes.append(process)
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


def _wait(processes: list[subprocess.Popen[bytes]], timeout: float) -> bool:
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
    _main(Path(sys.argv[1]))
