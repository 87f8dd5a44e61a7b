"""Mistral: Llama's tensors; versions with a sliding window are refused."""

from typing import Any

from ra3_megatron.config.model import ModelConfig
from ra3_megatron.hf.config_json import ConfigJson
from ra3_megatron.hf.families.base import common_json, common_keys, dense_links
from ra3_megatron.hf.weights import Link


class _Mistral:
    name = "mistral"
    architecture = "MistralForCausalLM"
    model_type = "mistral"

    def fits(self, model: ModelConfig) -> bool:
        return not model.qkv_bias and not model.qk_norm and model.num_experts is None

    def model_keys(self, config: ConfigJson) -> dict[str, Any]:
        config.require_null("sliding_window", 4096, "every layer attends to the whole context")
        return common_keys(config)

    def config_json(self, model: ModelConfig, vocab_size: int) -> dict[str, Any]:
        return {**common_json(self, model, vocab_size), "sliding_window": None}

    def links(self, model: ModelConfig, vocab_size: int) -> list[Link]:
        return dense_links(model, vocab_size)


FAMILY = _Mistral()
