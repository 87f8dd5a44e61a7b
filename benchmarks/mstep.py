"""M-step throughput: one optimizer step on packed rows, Megatron-Core against Hugging Face transformers.

Both sides: the same architecture and size, token ids, micro-batches, gradient clipping and Adam, fp32, all threads of
this process. Rows hold several documents; the Hugging Face side gets them as plain sequences, since it has no packing
without flash-attention.
"""

from dataclasses import dataclass

import numpy as np
import torch

import ra3_megatron.mcore  # noqa: F401
from benchmarks.measure import Timing, alternate
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.config.training import OptimizerConfig
from ra3_megatron.mcore.batch import TokenBatch
from ra3_megatron.mcore.model import build_model
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import Trainer

SIZES = {
    "5M": ModelConfig(num_layers=4, hidden_size=256, ffn_hidden_size=704, num_attention_heads=8, num_query_groups=4),
    "28M": ModelConfig(num_layers=8, hidden_size=512, ffn_hidden_size=1408, num_attention_heads=8, num_query_groups=4),
}
VOCABULARY = 4096
DOCUMENT = 128
"""Tokens a document: rows of 512 hold four of them."""


@dataclass(frozen=True)
class MStepResult:
    """Seconds of one step on each side."""

    model: str
    parameters: int
    tokens: int
    timings: dict[str, Timing]
    flops_per_token: float


def measure(name: str, runtime: Runtime, repeats: int, micro_batches: int = 2, rows: int = 4) -> MStepResult:
    """Time one optimizer step of `micro_batches` micro-batches of `rows` rows."""
    config = SIZES[name]
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (micro_batches, rows, config.context_length))
    sides = {}
    trainers = {}
    for label, model in (("mcore fp32", config), ("mcore bf16", config.model_copy(update={"precision": "bf16"}))):
        trainers[label] = build(model, runtime)
        sides[label] = megatron(trainers[label], ids)
    sides["HF fp32"] = hugging_face(config, ids)
    parameters = sum(p.numel() for p in trainers["mcore fp32"].model.parameters())
    head = config.hidden_size // config.num_attention_heads
    # attention scores and values of causal rows, forward and backward, half of them masked
    attention = 6 * config.num_layers * config.context_length * config.num_attention_heads * head
    timings = alternate(sides, repeats)
    return MStepResult(name, parameters, ids.size, timings, 6.0 * parameters + attention)


def matrix_rate(size: int = 1024, repeats: int = 10) -> float:
    """FLOP/s of an fp32 matrix product of this process (best of `repeats`)."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    timing = alternate({"mm": lambda: torch.mm(a, b)}, repeats)["mm"]
    return 2 * size**3 / min(timing.seconds)


def build(model: ModelConfig, runtime: Runtime) -> Trainer:
    """A trainer of a freshly drawn model."""
    sets = np.ones((1, VOCABULARY), dtype=bool)
    network = build_model(model, ParallelConfig(), runtime, VOCABULARY, sets, seed=1)
    return Trainer(network, OptimizerConfig(), ParallelConfig(), runtime, steps=1000)


def megatron(trainer: Trainer, ids: np.ndarray):  # type: ignore[no-untyped-def]
    """One optimizer step on ids [micro-batches, rows, tokens]."""
    batches = packed_batches(torch.from_numpy(ids))
    return lambda: trainer.step(batches)


def packed_batches(ids: torch.Tensor) -> list[TokenBatch]:
    """Micro-batches of rows of several documents, from ids [micro-batches, rows, tokens]."""
    batches = []
    for rows in ids:
        positions = torch.arange(rows.shape[1]).expand_as(rows) % DOCUMENT
        segments = torch.arange(rows.shape[1]).expand_as(rows) // DOCUMENT
        weight = torch.ones(rows.shape, dtype=torch.float32)
        batches.append(TokenBatch(rows, positions, segments, rows.roll(-1, 1), ce_weight=weight))
    return batches


def hugging_face(config: ModelConfig, ids: np.ndarray):  # type: ignore[no-untyped-def]
    """The same of transformers' Llama and torch's AdamW."""
    model = hugging_face_model(config, VOCABULARY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = list(torch.from_numpy(ids))

    def step() -> None:
        optimizer.zero_grad()
        for rows in batches:
            (model(input_ids=rows, labels=rows).loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def hugging_face_model(config: ModelConfig, vocab_size: int) -> torch.nn.Module:
    """transformers' Llama of the same architecture, with random weights in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM  # seconds, and not needed for the constants above

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_query_groups,
            max_position_embeddings=config.context_length,
            tie_word_embeddings=config.tied_embeddings,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
