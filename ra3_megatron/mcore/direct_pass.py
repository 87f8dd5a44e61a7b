"""A pass without gradients through the layers of a model, as straight calls of torch on its weights.

Sampling is made of many passes of few tokens, in which what Megatron-Core's modules do around the products (hooks,
autograd functions, wrappers that look at every case) takes longer than the products. `DirectPass` computes the same
operations, in the same order, from the same memory of weights, and nothing else; on a CPU the numbers are the same bit
for bit (`tests/rollout/test_direct_pass.py`). Models it does not take (several processes, experts, layers in FP8) go
through their modules.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ra3_megatron.mcore import elementwise
from ra3_megatron.mcore.attention import CachedAttention, CacheView, LayerCache
from ra3_megatron.mcore.model import LanguageModel


@dataclass(frozen=True)
class _Linear:
    """The product with a module's weight, and its bias where there is one."""

    module: Any

    def __call__(self, x: Tensor) -> Tensor:
        out = x @ self.module.weight.t()
        bias = self.module.bias
        return out if bias is None or not bias.numel() else out + bias


@dataclass(frozen=True)
class _Norm:
    """A root-mean-square norm with the weight `name` of a module."""

    owner: Any
    name: str
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], getattr(self.owner, self.name), self.eps)


@dataclass(frozen=True)
class _Layer:
    attention_norm: _Norm
    qkv: _Linear
    query_norm: _Norm | None
    key_norm: _Norm | None
    attention: CachedAttention
    projection: _Linear
    mlp_norm: _Norm
    up: _Linear
    down: _Linear


class DirectPass:
    """Through one chunk that is the whole model."""

    def __init__(self, chunk: LanguageModel) -> None:
        """Raises ValueError for a model that `takes` does not take."""
        if not takes(chunk):
            raise ValueError("the layers of this model have more to them than a direct pass computes")
        config = chunk.config
        eps = config.layernorm_epsilon
        self._chunk = chunk
        self._heads, self._groups = config.num_attention_heads, config.num_query_groups
        self._channels = config.kv_channels
        self._final = _Norm(chunk.decoder.final_layernorm, "weight", eps)
        self._layers = [_layer(layer, eps) for layer in chunk.decoder.layers]
        self._modules = [module for module in chunk.modules() if any(True for _ in module.parameters(recurse=False))]

    @property
    def ready(self) -> bool:
        """Whether the weights can be read as they are: Megatron's DDP gathers some when their module is called."""
        return not any(module._forward_pre_hooks for module in self._modules)

    @torch.no_grad()
    def __call__(self, ids: Tensor, positions: Tensor, caches: Sequence[LayerCache], view: CacheView) -> Tensor:
        """Hidden states behind the last norm, [T, hidden], of tokens `ids` at `positions`, long [T] each. The keys and
        values of the tokens are added to `caches`, one of each layer."""
        chunk = self._chunk
        angles = positions[:, None, None, None].float() * chunk.frequencies
        turn = elementwise.turns(angles, chunk.config.params_dtype)
        x = F.embedding(ids, chunk.embedding.word_embeddings.weight)
        for layer, cache in zip(self._layers, caches, strict=True):
            x = x + self._attended(layer, x, turn, cache, view)
            x = x + layer.down(elementwise.swiglu(layer.up(layer.mlp_norm(x))))
        return self._final(x)

    def _attended(self, layer: _Layer, x: Tensor, turn: Tensor, cache: LayerCache, view: CacheView) -> Tensor:
        channels, share = self._channels, self._heads // self._groups
        mixed = layer.qkv(layer.attention_norm(x)).view(len(x), 1, self._groups, (share + 2) * channels)
        query, key, value = mixed.split([share * channels, channels, channels], dim=-1)
        query = query.reshape(len(x), 1, self._heads, channels)
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = layer.query_norm(query), layer.key_norm(key)
        query, key = elementwise.rotate(query, turn), elementwise.rotate(key, turn)
        return layer.projection(layer.attention.incremental(query, key, value, cache, view)[:, 0])


def takes(chunk: LanguageModel) -> bool:
    """Whether a chunk is the whole model, on one process, of dense layers with plain weights."""
    config = chunk.config
    one_process = config.tensor_model_parallel_size * config.pipeline_model_parallel_size == 1
    dense = config.num_moe_experts is None and config.gated_linear_unit and not config.fp8
    norms = config.normalization == "RMSNorm" and not config.layernorm_zero_centered_gamma
    return one_process and dense and norms and chunk.pre_process and chunk.post_process


def _layer(layer: Any, eps: float) -> _Layer:
    attention, mlp = layer.self_attention, layer.mlp
    norms = attention.q_layernorm, attention.k_layernorm
    query_norm, key_norm = (_Norm(norm, "weight", eps) if hasattr(norm, "weight") else None for norm in norms)
    return _Layer(
        attention_norm=_norm_before(attention.linear_qkv, layer.input_layernorm, eps),
        qkv=_Linear(attention.linear_qkv),
        query_norm=query_norm,
        key_norm=key_norm,
        attention=attention.core_attention,
        projection=_Linear(attention.linear_proj),
        mlp_norm=_norm_before(mlp.linear_fc1, layer.pre_mlp_layernorm, eps),
        up=_Linear(mlp.linear_fc1),
        down=_Linear(mlp.linear_fc2),
    )


def _norm_before(linear: Any, norm: Any, eps: float) -> _Norm:
    """Transformer Engine's modules of a product hold the weight of the norm before it."""
    if hasattr(linear, "layer_norm_weight"):
        return _Norm(linear, "layer_norm_weight", eps)
    return _Norm(norm, "weight", eps)
