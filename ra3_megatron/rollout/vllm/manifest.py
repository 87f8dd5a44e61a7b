"""Which Hugging Face tensors a vLLM model is made of, read from the model itself.

vLLM fuses tensors (q, k and v; gate and up; experts), splits them over processes and packs them for the device, and its
loader skips what it misses. So the list is made from the layers' own sizes, and a layer that is not known here is
refused: an update is checked against the whole list before vLLM sees any of it.
"""

from collections.abc import Iterator

from torch import nn
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase, MergedColumnParallelLinear, QKVParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from ra3_megatron.rollout.vllm.messages import Manifest

ATTENTION = ("q_proj", "k_proj", "v_proj")
GATED = ("gate_proj", "up_proj")


def expected_tensors(model: nn.Module) -> Manifest:
    """Name and shape of every tensor, tied output weights included. Raises NotImplementedError for an unknown layer."""
    manifest: Manifest = {}
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            for tensor, shape in _tensors(name, module):
                manifest[tensor] = shape
    return manifest


def _tensors(name: str, module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    parent = name.rpartition(".")[0]
    if isinstance(module, QKVParallelLinear):
        heads, groups = module.total_num_heads, module.total_num_kv_heads
        sizes = (heads * module.head_size, groups * module.head_size, groups * module.v_head_size)
        for part, size in zip(ATTENTION, sizes, strict=True):
            yield from _linear(f"{parent}.{part}", size, module)
    elif isinstance(module, MergedColumnParallelLinear):
        for part, size in zip(GATED, module.output_sizes, strict=True):
            yield from _linear(f"{parent}.{part}", size, module)
    elif isinstance(module, LinearBase):
        yield from _linear(name, module.output_size, module)
    elif isinstance(module, VocabParallelEmbedding):
        yield f"{name}.weight", (module.org_vocab_size, module.embedding_dim)
    elif isinstance(module, RoutedExperts):
        experts = name[: name.rindex("experts.") + len("experts")] if "experts." in name else name
        inner, outer = module.moe_config.intermediate_size, module.moe_config.hidden_dim_unpadded
        gate, up, down = module.ckpt_gate_proj_name, module.ckpt_up_proj_name, module.ckpt_down_proj_name
        for expert in range(module.global_num_experts):
            yield f"{experts}.{expert}.{gate}.weight", (inner, outer)
            yield f"{experts}.{expert}.{up}.weight", (inner, outer)
            yield f"{experts}.{expert}.{down}.weight", (outer, inner)
    elif isinstance(module, RMSNorm):
        yield f"{name}.weight", tuple(module.weight.shape)
    else:
        raise NotImplementedError(f"vLLM's layer {name} ({type(module).__name__}) is not known to the weight update")


def _linear(name: str, size: int, module: LinearBase) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (size, module.input_size)
    if module.bias is not None:
        yield f"{name}.bias", (size,)
