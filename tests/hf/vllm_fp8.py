"""An FP8 folder in vLLM: `python vllm_fp8.py FOLDER RESULT` writes what vLLM holds and computes, as JSON."""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "OMP_WAIT_POLICY": "passive",
}  # fmt: skip

from vllm import LLM, SamplingParams
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fusion import fused_act_quant
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym
from vllm.platforms import current_platform

PROMPTS = [[3], [5, 9, 2, 77, 130], [(7 * n) % 250 for n in range(40)]]


def held(self: Any) -> dict[str, Any]:
    """FP8 layers, and the sums of the numbers of queries, keys and values as they are stored, in the worker."""
    layers, sums = 0, {}
    for name, module in self.model_runner.get_model().named_modules():
        if str(getattr(getattr(module, "weight", None), "dtype", "")) == "torch.float8_e4m3fn":
            layers += 1
            if name.endswith("qkv_proj"):
                parts = module.weight.float().t().double().split(module.logical_widths)
                sums[name.removesuffix(".qkv_proj")] = [float(part.sum()) for part in parts]
    return {"layers": layers, "qkv": sums}


def main(folder: str, result: str) -> None:
    if current_platform.is_cpu():
        del fused_act_quant._FUSED_ACT_QUANT[SiluAndMul, kFp8StaticTensorSym]
    llm = LLM(
        folder, skip_tokenizer_init=True, dtype="float16", enforce_eager=True, block_size=32, max_model_len=128,
        logprobs_mode="processed_logprobs", max_logprobs=-1,
    )  # fmt: skip
    found = llm.collective_rpc(held)[0]
    parameters = SamplingParams(temperature=1.0, max_tokens=1, logprobs=-1, detokenize=False, seed=1)
    values = []
    for prompt in PROMPTS:
        output = llm.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)[0].outputs[0]
        values.append({token: value.logprob for token, value in output.logprobs[0].items()})
    content = {"quantization": llm.model_config.quantization, "prompts": PROMPTS, "log_probs": values, **found}
    Path(result).write_text(json.dumps(content))


if __name__ == "__main__":
    main(*sys.argv[1:])
