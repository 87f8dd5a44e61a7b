"""Engines that keep what they receive: in a thread of the sender, or in a process that can be made to fail."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ra3_megatron.hf.weights import Link
from ra3_megatron.rollout.refit.receiver import StreamWeights
from tests.processes import ROOT


class Collector:
    """An engine in this process."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.version: int | None = None
        self.error = ""

    def update(self, version: int, source: StreamWeights) -> None:
        self.weights, self.version, self.error = {}, None, ""
        try:
            for name, tensor in source.tensors():
                assert name not in self.weights
                self.weights[name] = tensor
        except Exception as error:
            self.error = str(error)
            raise
        assert {name: tuple(tensor.shape) for name, tensor in self.weights.items()} == source.manifest()
        self.version = version


class EngineProcess:
    """An engine in a process of its own. kill_after: it kills itself after that many tensors; hang_after: it waits for
    ever then."""

    def __init__(self, kill_after: int | None = None, hang_after: int | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        )
        self._faults = (kill_after, hang_after)
        self.weights: dict[str, Tensor] = {}
        self.seconds = 0.0

    def update(self, version: int, source: StreamWeights) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            pickle.dump((source, self._faults), self._process.stdin)
            self._process.stdin.flush()
        try:
            error, arrays = pickle.load(self._process.stdout)
        except EOFError:
            raise RuntimeError(f"the engine's process died ({self._process.wait()})") from None
        if error:
            raise RuntimeError(error)
        self.weights = {name: torch.from_numpy(array) for name, array in arrays.items()}

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def expected_tensors(wholes: dict[str, Tensor], links: Sequence[Link]) -> dict[str, Tensor]:
    """Hugging Face tensors of whole, stacked, padded ones (small_models.whole); the output layer's in any case."""
    tensors = {}
    for link in links:
        whole = wholes[link.slot.key][link.slot.place][: link.slot.shape[0]]
        tensors |= dict(zip(link.names, link.split(whole), strict=True))
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    return tensors


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same bit for bit."""
    same = {name for name in found.keys() & expected.keys() if torch.equal(found[name], expected[name])}
    return sorted((found.keys() | expected.keys()) - same)


def _serve() -> None:
    while True:
        try:
            source, (kill_after, hang_after) = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        error, arrays = "", dict[str, Any]()
        try:
            for number, (name, tensor) in enumerate(source.tensors()):
                if number == kill_after:
                    os.kill(os.getpid(), signal.SIGKILL)
                if number == hang_after:
                    signal.pause()
                arrays[name] = tensor.cpu().numpy()
        except Exception as failure:
            error, arrays = str(failure), {}
        pickle.dump((error, arrays), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    assert "megatron" not in sys.modules and "vllm" not in sys.modules
    _serve()
