"""An engine with FP8 weights on a CPU: `python fp8_engine.py SPEC RESULT`, both pickles.

vLLM's build for CPUs lacks one kernel, that which rounds to e4m3: it declares `static_scaled_fp8_quant` without
arguments. Here stands its definition in torch instead. All else is vLLM's: online quantisation while weights are
loaded and reloaded, the layers, their products (`torch._scaled_mm`).
"""

import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm import _custom_ops
from weight_sources.file_weights import FileWeights

from ra3_megatron.rollout.vllm.messages import Draw
from ra3_megatron.rollout.vllm.server import EngineServer, Refused


def scaled_fp8_quant(input: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounded to e4m3 in units of a scale."""
    return (input.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def layers(self: Any) -> dict[str, tuple[str, torch.Tensor]]:
    """Data type and dequantised weight [out, in] of the linear layers, in the worker."""
    found = {}
    for name, module in self.model_runner.get_model().named_modules():
        scale = getattr(module, "weight_scale", None)
        if scale is not None:
            found[name] = (str(module.weight.dtype), (module.weight.float() * scale).t().clone())
    return found


def answers(server: EngineServer, requests: Sequence[Draw]) -> list[Any]:
    """One by one: the scale of inputs is that of all tokens which are computed together."""
    return [server.sample([request], 1.0).values[0] for request in requests]


def main(spec_file: str, result: str) -> None:
    _custom_ops.scaled_fp8_quant = scaled_fp8_quant
    spec, updates, requests = pickle.loads(Path(spec_file).read_bytes())
    server = EngineServer(spec)
    found = []
    for version, path in enumerate(updates, start=1):
        try:
            server.update(version, FileWeights(path))
        except Refused as refusal:
            found.append(str(refusal))
            continue
        found.append((answers(server, requests), server._llm.collective_rpc(layers)[0]))
    Path(result).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
