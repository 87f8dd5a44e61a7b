"""What the server does when vLLM itself says no: in a process of its own, because importing vLLM changes torch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from ra3_megatron.rollout.vllm import process
from ra3_megatron.rollout.vllm.messages import EngineSpec

pytest.importorskip("vllm", reason="vllm is not installed")

SCRIPT = """
import json, os, torch
checks = []
is_available = torch.cuda.is_available
def watched():
    checks.append(os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK"))
    return is_available()
torch.cuda.is_available = watched
from ra3_megatron.rollout.vllm.messages import Draw
from ra3_megatron.rollout.vllm.server import EngineServer, Refused

class LLM:
    resets = [True, False, True]
    def collective_rpc(self, method, args=()):
        return [None]
    def reset_prefix_cache(self):
        return self.resets.pop(0)

server = object.__new__(EngineServer)
server._llm, server._version, server._why_empty = LLM(), None, "new"
said = []
for version in (1, 2, 3):
    try:
        server.update(version, None)
        said.append(server._version)
    except Refused as refusal:
        said.append(str(refusal))
        try:
            server.sample([Draw([1], [0.5], (0, 0), (0, 0))], 1.0)
        except Refused as refusal:
            said.append(str(refusal))
print("said", json.dumps(said))

from vllm.utils.system_utils import get_mp_context
torch.cuda._is_compiled = lambda: True
print("workers", json.dumps([checks, get_mp_context().get_start_method()]))
"""


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What the script prints in a server's environment."""
    environment = process._environment(EngineSpec("model", np.ones((1, 4), dtype=bool), 8))
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=environment)
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    return {word: json.loads(rest) for word, _, rest in lines if word in ("said", "workers")}


def test_a_prefix_cache_that_is_not_reset_fails_the_update(told: dict[str, Any]) -> None:
    first, failed, refused, last = told["said"]
    assert (first, last) == (1, 3)
    assert failed == "the update to weight version 2 failed: the prefix cache could not be reset"
    assert failed in refused and "no usable weights" in refused


def test_workers_can_use_gpus_that_the_server_has_asked_for(told: dict[str, Any]) -> None:
    """A process that has asked for them without NVML cannot fork workers that use them."""
    checks, method = told["workers"]
    assert checks and set(checks) == {"1"} and method == "spawn"
