"""Exact counts of an architecture in a layout: parameters of each GPU, FLOPs of a token.

Tested against Megatron models that are built at these layouts (`tests/scaling/test_counts.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ra3_megatron.config.layouts import chunk_layers
from ra3_megatron.config.model import ModelConfig, ParallelConfig

VOCABULARY_MULTIPLE = 128
"""As in `mcore/model.py`: rows of the embedding are a multiple of this."""


def padded(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding."""
    multiple = math.lcm(VOCABULARY_MULTIPLE, tensor)
    return -(-vocab_size // multiple) * multiple


@dataclass(frozen=True)
class Layer:
    """Parameters of one layer, and the widths that FLOPs and activations follow from."""

    hidden: int
    query: int
    """Channels of all query heads."""
    key_value: int
    """Channels of all key heads (and of all value heads)."""
    heads: int
    width: int
    """Of the feed-forward layer, or of one expert."""
    experts: int
    """0: a dense layer."""
    active: int
    """Experts of a token; 1 for a dense layer."""
    small: int
    """Parameters of norms and biases that every tensor-parallel rank holds whole."""
    bias: int
    """Of queries, keys and values."""

    @classmethod
    def of(cls, model: ModelConfig) -> Layer:
        """The layers of this architecture."""
        head = model.head_dim or model.hidden_size // model.num_attention_heads
        query, key_value = model.num_attention_heads * head, model.num_query_groups * head
        moe = model.num_experts is not None
        return cls(
            hidden=model.hidden_size,
            query=query,
            key_value=key_value,
            heads=model.num_attention_heads,
            width=(model.expert_ffn_hidden_size if moe else None) or model.ffn_hidden_size,
            experts=model.num_experts or 0,
            active=model.experts_per_token if moe else 1,
            small=2 * model.hidden_size + (2 * head if model.qk_norm else 0),
            bias=query + 2 * key_value if model.qkv_bias else 0,
        )

    @property
    def attention(self) -> int:
        """Weights of the projections."""
        return self.hidden * (2 * self.query + 2 * self.key_value)

    @property
    def expert(self) -> int:
        """Weights of one expert, or of the dense feed-forward layer."""
        return 3 * self.hidden * self.width

    @property
    def router(self) -> int:
        """Weights that choose experts."""
        return self.hidden * self.experts

    def dense(self, tensor: int) -> int:
        """Parameters of one rank that are not experts."""
        feed_forward = self.router if self.experts else self.expert // tensor
        return self.attention // tensor + feed_forward + self.small + self.bias // tensor

    def sparse(self, expert_tensor: int, expert: int) -> int:
        """Parameters of one rank that are experts."""
        return self.experts // expert * (self.expert // expert_tensor)


@dataclass(frozen=True)
class Stage:
    """What one GPU of a pipeline stage holds."""

    chunks: tuple[int, ...]
    """Layers of each of its model chunks."""
    dense: int
    """Parameters outside of experts, embeddings included."""
    sparse: int
    """Parameters of experts."""
    output: bool
    """It computes the output layer."""

    @property
    def layers(self) -> int:
        """All of them."""
        return sum(self.chunks)

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.dense + self.sparse


def stages(model: ModelConfig, vocab_size: int, parallel: ParallelConfig) -> list[Stage]:
    """Each pipeline stage's share, of one of its GPUs."""
    layer, rows = Layer.of(model), padded(vocab_size, parallel.tensor)
    table = rows * model.hidden_size // parallel.tensor
    expert_tensor = parallel.expert_tensor or parallel.tensor
    found = []
    held = chunk_layers(model.num_layers, parallel)
    for number, chunks in enumerate(held):
        layers = sum(chunks)
        first, last = number == 0, number == len(held) - 1
        dense = layers * layer.dense(parallel.tensor)
        if first:
            dense += table
        if last:
            dense += model.hidden_size  # the last norm
            if not (first and model.tied_embeddings):  # with tied embeddings the last stage has a copy
                dense += table
        sparse = layers * layer.sparse(expert_tensor, parallel.expert) if layer.experts else 0
        found.append(Stage(tuple(chunks), dense, sparse, last))
    return found


def recomputed_layers(parallel: ParallelConfig, chunks: Sequence[int]) -> float:
    """Share of a stage's layers that `recompute=full` computes again. chunks: layers of each of its model chunks."""
    if parallel.recompute != "full":
        return 0.0
    if parallel.recompute_method == "uniform":
        return 1.0
    return sum(min(parallel.recompute_layers, layers) for layers in chunks) / sum(chunks)


def total_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of the model, without padding of the vocabulary."""
    layer = Layer.of(model)
    each = layer.attention + layer.small + layer.bias
    each += layer.experts * layer.expert + layer.router if layer.experts else layer.expert
    tables = 1 if model.tied_embeddings else 2
    return model.num_layers * each + model.hidden_size + tables * vocab_size * model.hidden_size


def token_flops(model: ModelConfig, vocab_size: int, sequence: int) -> dict[str, float]:
    """FLOPs of one token's forward pass in a causal sequence: `layers`, `attention` (scores and values), `output`.

    A product with a weight is 2 FLOPs; a token sees (sequence + 1) / 2 tokens on average. Training takes 3 times that
    (backward is twice forward); nothing that is computed again is counted.
    """
    layer = Layer.of(model)
    weights = layer.attention + layer.active * layer.expert + layer.router
    return {
        "layers": 2.0 * model.num_layers * weights,
        "attention": 4.0 * model.num_layers * layer.query * (sequence + 1) / 2,
        "output": 2.0 * model.hidden_size * vocab_size,
    }
