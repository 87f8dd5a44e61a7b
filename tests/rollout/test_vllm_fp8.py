"""Engines that round the weights they get to FP8: at every update, from the bf16 weights that arrive."""

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from vllm_processes import need_vllm, save

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import load_config
from ra3_megatron.rollout.vllm.messages import Draw, EngineSpec
from ra3_megatron.rollout.vllm.process import EngineError, _environment, start_engine
from tests.processes import python_path

VOCAB, LONGEST = 131, 128
PROMPTS = ([3], [5, 9, 2, 77, 130], [(7 * n) % VOCAB for n in range(75)])
FP8 = torch.float8_e4m3fn
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""vLLM's layers, and those that they are made of."""


def model(folder: Path, seed: int) -> dict[str, Tensor]:
    """A random Llama in bf16, saved to the folder; its tensors, with the output weights in any case."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=LONGEST, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    network = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_((1.0 if "norm" in name else 0.0) + 0.1 * torch.randn(parameter.shape))
    network.to(torch.bfloat16).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def spec_of(folder: Path) -> EngineSpec:
    sets = np.ones((1, VOCAB), dtype=bool)
    return EngineSpec(str(folder), sets, LONGEST, dtype="bfloat16", quantization="fp8", kv_cache_gib=0.05)


def reference(folder: Path, tensors: dict[str, Tensor]) -> list[float]:
    """Greedy log-probabilities of one token behind each prompt by Hugging Face, in fp32, with the linear layers'
    weights (as vLLM fuses them) and inputs rounded as vLLM documents it, each with one scale for the whole tensor."""
    network = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})

    def rounded(tensor: Tensor, most: Tensor) -> Tensor:
        scale = most / 448
        return (tensor / scale).clamp(-448, 448).to(FP8).float() * scale

    for layer in network.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for group in (
            (attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,),
            (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,),
        ):  # fmt: skip
            most = torch.stack([part.weight.abs().amax() for part in group]).amax()
            for part in group:
                part.weight.data = rounded(part.weight.data, most)
                part.register_forward_pre_hook(lambda _, args: (rounded(args[0], args[0].abs().amax()),))
    with torch.no_grad():
        return [float(network(torch.tensor([p])).logits[0, -1].log_softmax(-1).max()) for p in PROMPTS]


def run(tmp_path: Path, spec: EngineSpec, updates: list[str]) -> list[Any]:
    need_vllm()
    requests = [Draw(list(prompt), [0.5], (0, 0), (0, 0), greedy=True) for prompt in PROMPTS]
    (tmp_path / "spec").write_bytes(pickle.dumps((spec, updates, requests)))
    script = Path(__file__).with_name("fp8_engine.py")
    folders = [str(Path(__file__).parents[2]), str(script.parent)]
    environment = {**_environment(spec), "PYTHONPATH": python_path(*folders)}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "spec"), str(tmp_path / "result")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return pickle.loads((tmp_path / "result").read_bytes())


def test_every_update_is_quantised(tmp_path: Path) -> None:
    """The engine holds e4m3 numbers of the very weights that came, after the first update and after later ones, also
    after one that failed; its log-probabilities are those of the rounded model, as far as bf16 allows to say."""
    folder = tmp_path / "model"
    first, second = model(tmp_path / "other", 1), model(folder, 2)
    broken = {name: tensor for name, tensor in second.items() if name != "model.layers.1.self_attn.k_proj.weight"}
    files = [save(t, f"fp8-{n}") for n, t in enumerate((first, second, broken, first))]
    found = run(tmp_path, spec_of(folder), files)
    assert "k_proj.weight" in found[2] and "missing" in found[2]
    for index, tensors in ((0, first), (1, second), (3, first)):
        drawn, layers = found[index]
        assert len(layers) == 8 and {dtype for dtype, _ in layers.values()} == {"torch.float8_e4m3fn"}
        for name, (_, weight) in layers.items():
            parent, last = name.rsplit(".", 1)
            whole = torch.cat([tensors[f"{parent}.{part}.weight"] for part in FUSED.get(last, (last,))]).float()
            scale = whole.abs().amax() / 448
            expected = (whole / scale).clamp(-448, 448).to(FP8).float() * scale
            torch.testing.assert_close(weight, expected, rtol=1e-6, atol=0)
        values = np.array([d.log_probs[0] for d in drawn])
        assert np.abs(values - reference(folder, tensors)).max() < 0.2  # vLLM computes in bf16; 0.10 was measured
    assert [d.log_probs for d in found[0][0]] == [d.log_probs for d in found[3][0]]
    assert [d.log_probs for d in found[0][0]] != [d.log_probs for d in found[1][0]]


@pytest.mark.extended
def test_vllm_for_cpus_cannot_and_says_so(tmp_path: Path) -> None:
    """Without the kernel that the test above replaces, the engine does not start."""
    need_vllm()
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: its vLLM has the kernel")
    model(tmp_path / "model", 1)
    with pytest.raises(EngineError, match="static_scaled_fp8_quant"):
        start_engine(spec_of(tmp_path / "model"), tmp_path / "log", 180, 60)
    client = None
    with pytest.raises(EngineError, match="float32"):
        client = start_engine(replace(spec_of(tmp_path / "model"), dtype="float32"), tmp_path / "log", 180, 60)
    assert client is None


def test_a_run_is_refused_on_cpus(tmp_path: Path, runtime: Any) -> None:
    from ra3_megatron.rollout.engine_pool import EnginePool

    need_vllm()
    overrides = ("rollout.engine=vllm", "rollout.vllm.quantization=fp8", "model.precision=bf16")
    config = load_config(None, [*overrides, "estep.importance_cap=2", "model.head_dim=32"])
    none: Any = None
    with pytest.raises(UserError, match=r"rollout\.vllm\.quantization=fp8 needs GPUs"):
        EnginePool(config, runtime, none, none, tmp_path)
