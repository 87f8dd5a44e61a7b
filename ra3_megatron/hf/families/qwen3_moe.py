"""Qwen3 with a mixture of experts in every layer."""

from typing import Any

from ra3_megatron.config.model import ModelConfig
from ra3_megatron.hf.config_json import ConfigJson
from ra3_megatron.hf.families.base import common_json, common_keys, experts_per_token, mixture_links
from ra3_megatron.hf.weights import Link


class _Qwen3MoE:
    name = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    model_type = "qwen3_moe"

    def fits(self, model: ModelConfig) -> bool:
        return model.qk_norm and not model.qkv_bias and model.num_experts is not None

    def model_keys(self, config: ConfigJson) -> dict[str, Any]:
        config.require("attention_bias", False, meaning="Qwen3's attention has no biases here")
        config.require("use_sliding_window", False, meaning="every layer attends to the whole context")
        config.require("decoder_sparse_step", 1, meaning="every layer is a mixture of experts")
        config.require("mlp_only_layers", [], meaning="every layer is a mixture of experts")
        config.ignore("sliding_window")  # read with use_sliding_window only
        normalised = config.flag("norm_topk_prob", False)
        return {
            **common_keys(config),
            "qk_norm": True,
            "num_experts": config.count("num_experts", None) or config.count("num_local_experts"),  # of either spelling
            "experts_per_token": experts_per_token(config, normalised),
            "expert_ffn_hidden_size": config.count("moe_intermediate_size"),
            "normalize_expert_weights": normalised,
        }

    def config_json(self, model: ModelConfig, vocab_size: int) -> dict[str, Any]:
        return {
            **common_json(self, model, vocab_size),
            "attention_bias": False,
            "use_sliding_window": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "num_experts": model.num_experts,
            "num_experts_per_tok": model.experts_per_token,
            "moe_intermediate_size": model.expert_ffn_hidden_size or model.ffn_hidden_size,
            "norm_topk_prob": model.normalize_expert_weights,
        }

    def links(self, model: ModelConfig, vocab_size: int) -> list[Link]:
        return mixture_links(model, vocab_size, "mlp.gate", "mlp.experts", ("gate_proj", "up_proj", "down_proj"))


FAMILY = _Qwen3MoE()
