"""What the server does when vLLM itself says no: in a process of its own, because importing vLLM changes torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

SCRIPT = """
import json
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
"""


def test_a_prefix_cache_that_is_not_reset_fails_the_update() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("said "))
    first, failed, refused, last = json.loads(line.removeprefix("said "))
    assert (first, last) == (1, 3)
    assert failed == "the update to weight version 2 failed: the prefix cache could not be reset"
    assert failed in refused and "no usable weights" in refused
