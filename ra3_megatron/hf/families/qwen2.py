"""Qwen2 and Qwen2.5: biases on the query, key and value projections."""

from typing import Any

from ra3_megatron.config.model import ModelConfig
from ra3_megatron.hf.config_json import ConfigJson
from ra3_megatron.hf.families.base import common_json, common_keys, dense_links
from ra3_megatron.hf.weights import Link


class _Qwen2:
    name = "qwen2"
    architecture = "Qwen2ForCausalLM"
    model_type = "qwen2"

    def fits(self, model: ModelConfig) -> bool:
        channels = model.hidden_size / model.num_attention_heads
        return (
            model.qkv_bias
            and not model.qk_norm
            and model.num_experts is None
            and (model.head_dim is None or model.head_dim == channels)
        )

    def model_keys(self, config: ConfigJson) -> dict[str, Any]:
        config.require("use_sliding_window", False, meaning="every layer attends to the whole context")
        config.ignore("sliding_window")  # read with use_sliding_window only
        keys = common_keys(config)
        config.require(
            "head_dim",
            keys["hidden_size"] // keys["num_attention_heads"],
            meaning="Qwen2 has hidden_size / num_attention_heads channels a head, whatever head_dim says",
        )
        return {**keys, "head_dim": None, "qkv_bias": True}

    def config_json(self, model: ModelConfig, vocab_size: int) -> dict[str, Any]:
        values = {**common_json(self, model, vocab_size), "use_sliding_window": False}
        del values["head_dim"]
        return values

    def links(self, model: ModelConfig, vocab_size: int) -> list[Link]:
        return dense_links(model, vocab_size)


FAMILY = _Qwen2()
