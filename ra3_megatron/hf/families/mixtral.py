"""Mixtral: a mixture of experts in every layer; each expert is as wide as `intermediate_size`."""

from typing import Any

from ra3_megatron.config.model import ModelConfig
from ra3_megatron.hf.config_json import ConfigJson
from ra3_megatron.hf.families.base import common_json, common_keys, experts_per_token, mixture_links
from ra3_megatron.hf.weights import Link


class _Mixtral:
    name = "mixtral"
    architecture = "MixtralForCausalLM"
    model_type = "mixtral"

    def fits(self, model: ModelConfig) -> bool:
        mixture = model.num_experts is not None and model.normalize_expert_weights
        return mixture and not model.qkv_bias and not model.qk_norm

    def model_keys(self, config: ConfigJson) -> dict[str, Any]:
        config.require("sliding_window", meaning="every layer attends to the whole context")
        config.ignore("router_jitter_noise")  # noise while training; this package adds none
        return {
            **common_keys(config, rope_base=1_000_000.0),
            "num_experts": config.count("num_local_experts"),
            "experts_per_token": experts_per_token(config, normalised=True),
            "expert_ffn_hidden_size": None,
            "normalize_expert_weights": True,
        }

    def config_json(self, model: ModelConfig, vocab_size: int) -> dict[str, Any]:
        return {
            **common_json(self, model, vocab_size),
            "intermediate_size": model.expert_ffn_hidden_size or model.ffn_hidden_size,
            "num_local_experts": model.num_experts,
            "num_experts_per_tok": model.experts_per_token,
            "sliding_window": None,
        }

    def links(self, model: ModelConfig, vocab_size: int) -> list[Link]:
        return mixture_links(model, vocab_size, "block_sparse_moe.gate", "block_sparse_moe.experts", ("w1", "w3", "w2"))


FAMILY = _Mixtral()
