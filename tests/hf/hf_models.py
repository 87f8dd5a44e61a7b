"""Small random Hugging Face models of every family, and what Megatron-Core makes of a checkpoint of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor
from typer.testing import CliRunner

import ra3_megatron.mcore  # noqa: F401
from ra3_megatron.cli import app
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.hf.importing import model_of
from ra3_megatron.mcore import checkpoint
from ra3_megatron.mcore.batch import TokenBatch
from ra3_megatron.mcore.model import build_model, language_model
from ra3_megatron.mcore.startup import Runtime

# isort: split
import torch.distributed as dist
from megatron.core import parallel_state

VOCAB = 300
"""Padded to 384, in two shares of 192."""
CONTEXT = 512
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5_000.0, "factor": 3.0}
TIED = {"tie_word_embeddings": True}
MHA = {"num_key_value_heads": 4}
EXPERTS = {"num_experts_per_tok": 2}
QWEN_EXPERTS = {"head_dim": 32, "num_experts": 4, "moe_intermediate_size": 48, **EXPERTS}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # what the test is called: class of transformers, and how its configuration differs from SIZES
    "llama": ("Llama", {"head_dim": 32, "rope_parameters": LLAMA3}),
    "llama-tied": ("Llama", {"rope_parameters": LINEAR, **TIED, **MHA}),
    "mistral": ("Mistral", {"head_dim": 32, "sliding_window": None}),
    "mistral-tied": ("Mistral", {"sliding_window": None, **TIED, **MHA}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {**TIED, **MHA}),
    "qwen3": ("Qwen3", {"head_dim": 32, "rope_parameters": LINEAR}),
    "qwen3-tied": ("Qwen3", {"head_dim": 8, **TIED, **MHA}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None, **EXPERTS}),
    "mixtral-tied": ("Mixtral", {"num_local_experts": 4, "sliding_window": None, **TIED, **EXPERTS, **MHA}),
    "qwen3-moe": ("Qwen3Moe", {"norm_topk_prob": True, **QWEN_EXPERTS}),
    "qwen3-moe-tied": ("Qwen3Moe", {"norm_topk_prob": True, **TIED, **QWEN_EXPERTS, **MHA}),
    "qwen3-moe-unnormed": ("Qwen3Moe", {"norm_topk_prob": False, "rope_parameters": LLAMA3, **QWEN_EXPERTS}),
}
"""The table of families: each is tested in every way that there is; a new one is one line."""
EXPERT_FAMILIES = [name for name, (_, changes) in FAMILIES.items() if "num_experts_per_tok" in changes]

IDS = torch.randint(0, VOCAB, (2, 300), generator=torch.Generator().manual_seed(7))
"""Sequences that go beyond the original context of `LLAMA3`."""


def make(
    name: str,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "50GB",
    tokenizer: bool = False,
    **changes: Any,
) -> Path:
    """A Hugging Face folder with random weights, none of which is 0 or 1."""
    kind, own = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **own, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    transformers.utils.logging.disable_progress_bar()
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    generation = {"do_sample": True, "eos_token_id": [1, 2], "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges, with files beside it."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<|begin|>", "<|end|>", "<|other|>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>", "<|other|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")


def hf_logits(folder: Path, ids: Tensor = IDS) -> Tensor:
    """Logits of a folder by Hugging Face transformers, in fp32, [b, s, vocab]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(ids).logits


def load(folder: Path, hf: Path, parallel: ParallelConfig, runtime: Runtime, precision: str = "fp32") -> Any:
    """A model that held other numbers, with the weights of the checkpoint `folder`, which was made from `hf`."""
    _, config, vocab_size = model_of(hf)
    model: ModelConfig = config.model_copy(update={"precision": precision})
    sets = torch.ones(1, vocab_size, dtype=torch.bool)
    network = build_model(model, parallel, runtime, vocab_size, sets, None)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(torch.nan)
    checkpoint.load(folder, network, runtime, verify=True)
    return network


def logits(network: Any, runtime: Runtime, ids: Tensor = IDS) -> Tensor | None:
    """Logits of every token on the last pipeline stage, fp32 [b, s, vocab]; None on the others. Collective."""
    chunk = language_model(network).eval()
    positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
    batch = TokenBatch(ids, positions, torch.zeros_like(ids), ids)
    with torch.no_grad():
        if runtime.pipeline_rank > 0:
            hidden = torch.empty(ids.shape[1], ids.shape[0], chunk.config.hidden_size)
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            chunk.set_input_tensor(hidden)
        hidden = chunk(batch, hidden_only=True)
        if not runtime.is_last_stage:
            dist.send(hidden.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            return None
        mine = chunk.logits(hidden.transpose(0, 1)).float().contiguous()
        shares = [torch.empty_like(mine) for _ in range(runtime.tensor_size)]
        if runtime.tensor_size > 1:
            dist.all_gather(shares, mine, group=runtime.tensor_group)
        else:
            shares = [mine]
    return torch.cat(shares, dim=-1)[..., :VOCAB]


def assert_close(found: Tensor, expected: Tensor) -> None:
    """fp32: within 1e-5 of the largest logit of each position, or of 1."""
    tolerance = 1e-5 * expected.abs().amax(-1, keepdim=True).clamp(min=1.0)
    assert found.shape == expected.shape
    assert bool(((found - expected).abs() <= tolerance).all()), float((found - expected).abs().max())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def command(*words: object, code: int = 0) -> str:
    """Run `ra3 convert …`: what it printed, or the one line with which it refused (code 2)."""
    result = CliRunner().invoke(app, ["convert", *map(str, words)])
    assert result.exit_code == code, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("ra3: ")]
    assert len(errors) == (code == 2)
    return errors[0] if code == 2 else result.stdout
