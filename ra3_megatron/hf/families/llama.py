"""Llama 2, 3, 3.1, 3.2, 3.3, and everything else that calls itself LlamaForCausalLM."""

from typing import Any

from ra3_megatron.config.model import ModelConfig
from ra3_megatron.hf.config_json import ConfigJson
from ra3_megatron.hf.families.base import common_json, common_keys, dense_links
from ra3_megatron.hf.weights import Link


class _Llama:
    name = "llama"
    architecture = "LlamaForCausalLM"
    model_type = "llama"

    def fits(self, model: ModelConfig) -> bool:
        divides = model.hidden_size % model.num_attention_heads == 0  # transformers 5 refuses others, head_dim or not
        return divides and not model.qkv_bias and not model.qk_norm and model.num_experts is None

    def model_keys(self, config: ConfigJson) -> dict[str, Any]:
        config.require("attention_bias", False, meaning="Llama's attention has no biases here")
        config.require("mlp_bias", False, meaning="the feed-forward layer has no biases")
        return common_keys(config, multi_head=True)

    def config_json(self, model: ModelConfig, vocab_size: int) -> dict[str, Any]:
        return {**common_json(self, model, vocab_size), "attention_bias": False, "mlp_bias": False}

    def links(self, model: ModelConfig, vocab_size: int) -> list[Link]:
        return dense_links(model, vocab_size)


FAMILY = _Llama()
