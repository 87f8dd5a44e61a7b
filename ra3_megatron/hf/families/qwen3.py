"""Qwen3, dense: a norm over each query and key head, no biases."""

from typing import Any

from ra3_megatron.config.model import ModelConfig
from ra3_megatron.hf.config_json import ConfigJson
from ra3_megatron.hf.families.base import common_json, common_keys, dense_links
from ra3_megatron.hf.weights import Link

DEFAULT_HEAD_DIM = 128
"""Channels a head where `config.json` names none."""


class _Qwen3:
    name = "qwen3"
    architecture = "Qwen3ForCausalLM"
    model_type = "qwen3"

    def fits(self, model: ModelConfig) -> bool:
        return model.qk_norm and not model.qkv_bias and model.num_experts is None

    def model_keys(self, config: ConfigJson) -> dict[str, Any]:
        config.require("attention_bias", False, meaning="Qwen3's attention has no biases here")
        config.require("use_sliding_window", False, meaning="every layer attends to the whole context")
        config.ignore("sliding_window")  # read with use_sliding_window only
        keys = common_keys(config)
        return {**keys, "head_dim": keys["head_dim"] or DEFAULT_HEAD_DIM, "qk_norm": True}

    def config_json(self, model: ModelConfig, vocab_size: int) -> dict[str, Any]:
        return {**common_json(self, model, vocab_size), "attention_bias": False, "use_sliding_window": False}

    def links(self, model: ModelConfig, vocab_size: int) -> list[Link]:
        return dense_links(model, vocab_size)


FAMILY = _Qwen3()
