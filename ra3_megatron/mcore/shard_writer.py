"""Writes one process's shards of a checkpoint, here or in a forked process while training goes on.

What is written are the values at the moment of the call. On a GPU they are copied to the host first; on a CPU a forked
process sees the memory as it was when it was forked (pages are copied when either side writes to them). Memory that is
shared between processes is no such memory: tensors in it are copied first.

Megatron's own writer forks a process of its own for each file and cannot be stopped without leaving that behind; here
its function for one file is called directly.
"""

import contextlib
import gc
import multiprocessing
import pickle
import queue
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from ra3_megatron.mcore.checkpoint_files import FileFacts, facts_of

# Megatron hands results over through a manager process. It would cost seconds at the first save and 200 MB, and it
# would outlive a run that is killed. Here a writer returns its results, and `hand_over` puts them where Megatron looks.
filesystem_async._results_queue = queue.Queue()


@dataclass(frozen=True)
class Written:
    """What a writer has done."""

    results: Any
    """Megatron's results, or the exception that ended it; None when this process had nothing to write."""
    files: dict[str, FileFacts]
    """The files it wrote."""

    def hand_over(self) -> None:
        """Let Megatron find the results, which it will when it finishes the checkpoint."""
        while not filesystem_async._results_queue.empty():  # of a save that failed
            filesystem_async._results_queue.get()
        if self.results is not None:
            filesystem_async._results_queue.put(self.results)


class ShardWriter:
    """Writing of one process's shards, begun by `start`."""

    def __init__(self, request: AsyncRequest) -> None:
        self._transforms: Any = []
        self._buckets: list[Any] = []
        if request.async_fn is not None:  # else this process has nothing to write
            assert request.preload_fn is not None
            self._transforms = request.async_fn.args[0]
            self._buckets = request.preload_fn()  # from the GPU to the host; on a CPU the tensors themselves
        self._written: Written | None = None
        self._process: Any = None
        self._pipe: Any = None

    def start(self, background: bool) -> None:
        """Write now, or begin to in a process of its own."""
        if not self._buckets:
            self._written = Written(None, {})
        elif not background:
            self._written = _write(self._transforms, self._buckets)
        else:
            fork = multiprocessing.get_context("fork")
            buckets = _without_shared_memory(self._buckets)
            pipe, end = fork.Pipe(duplex=False)
            process = fork.Process(target=_work, args=(end, self._transforms, buckets))
            try:
                process.start()
            except BaseException:  # no memory for another process: there is none to wait for, or to end
                pipe.close()
                raise
            finally:
                end.close()
            self._process, self._pipe = process, pipe
        self._buckets = []  # a process that is forked holds the values

    def is_done(self) -> bool:
        """Whether `result` would return at once."""
        return self._written is not None or bool(self._pipe.poll())

    def result(self) -> Written:
        """Wait for the end of writing. Errors are in the result."""
        if self._written is None:
            try:
                self._written = pickle.loads(self._pipe.recv_bytes())
                self._process.join()
            except EOFError:
                self._process.join()
                code = self._process.exitcode
                self._written = Written(RuntimeError(f"the writing process died (exit code {code})"), {})
            self._pipe.close()
        return self._written

    def kill(self) -> None:
        """End a background process; what it was writing is not finished."""
        if self._process is not None and self._written is None:
            self._process.kill()
            self._process.join()
            self._pipe.close()


def _write(transforms: Any, buckets: list[Any]) -> Written:
    """Write each bucket to its file."""
    found: dict[int, Any] = {}
    files = {}
    try:
        for number, bucket in enumerate(buckets):
            results: queue.Queue[Any] = queue.Queue()
            count: queue.Queue[int] = queue.Queue()
            count.put(number)
            FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, results, count, use_fsync=True)
            _, found[number] = results.get_nowait()
            if isinstance(found[number], Exception):
                return Written(found[number], {})
            path = Path(bucket[0])
            files[path.name] = facts_of(path)
    except Exception as problem:
        return Written(problem, {})
    return Written(found, files)


def _work(pipe: Any, transforms: Any, buckets: list[Any]) -> None:
    """The forked process: it must not touch CUDA, which a collection of the parent's garbage would."""
    gc.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    written = _write(transforms, buckets)
    try:
        content = pickle.dumps(written)
    except Exception:  # an exception that cannot be pickled
        content = pickle.dumps(Written(RuntimeError(str(written.results)), {}))
    with contextlib.suppress(BrokenPipeError):  # a parent that was killed
        pipe.send_bytes(content)


def _without_shared_memory(buckets: list[Any]) -> list[Any]:
    def own(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if tensor.is_shared() else tensor

    return [
        (path, key, (data, [(item, own(tensor)) for item, tensor in tensors])) for path, key, (data, tensors) in buckets
    ]
