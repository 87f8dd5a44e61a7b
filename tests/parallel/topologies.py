"""The table of tested topologies: one line each. See matrix.py for what every one of them runs.

Rows marked `ci` run with every `make test`; the others only with `make test-parallel`. A row is a layout (keys of
`parallel`), the toy model it trains, and settings beside the layout that decide how a batch is dealt out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ra3_megatron.config.model import ParallelConfig

MODELS: dict[str, dict[str, Any]] = {
    "untied": {"num_layers": 2, "tied_embeddings": False},
    "tied": {"num_layers": 2, "tied_embeddings": True},
    "deep": {"num_layers": 4, "tied_embeddings": False},
    "deep_tied": {"num_layers": 4, "tied_embeddings": True},
    "eight_layers": {"num_layers": 8, "tied_embeddings": False},
    "six_layers": {"num_layers": 6, "tied_embeddings": False},
    "three_layers_tied": {"num_layers": 3, "tied_embeddings": True},
    "four_heads": {"num_layers": 2, "tied_embeddings": False, "num_query_groups": 4},
    "three_groups": {
        "num_layers": 2,
        "tied_embeddings": False,
        "num_attention_heads": 6,
        "num_query_groups": 3,
        "head_dim": 4,
        "ffn_hidden_size": 48,
    },
    "experts": {
        "num_layers": 2,
        "tied_embeddings": False,
        "num_experts": 4,
        "experts_per_token": 2,
        "expert_ffn_hidden_size": 24,
    },
    "biases_norms": {  # of queries and keys; and scaled rotary frequencies
        "num_layers": 2,
        "tied_embeddings": False,
        "qkv_bias": True,
        "qk_norm": True,
        "rope_scaling": {"kind": "llama3", "factor": 4.0, "original_context_length": 16},
    },
    "experts_norms": {
        "num_layers": 2,
        "tied_embeddings": True,
        "num_experts": 4,
        "normalize_expert_weights": False,
        "qk_norm": True,
    },
}
"""Toy models: what they change in the architectures of matrix.py."""


@dataclass(frozen=True)
class Topology:
    """A layout and the toy model that it is tested with."""

    parallel: ParallelConfig
    model: str = "untied"
    """Key of MODELS."""
    ci: bool = False
    """Part of the representative subset."""
    splits: bool = False
    """Also test that micro-batches, padding and the place of documents do not matter."""
    micro_batch_tokens: int | None = None
    """Token budget of a micro-batch; none: rows of a fixed number."""


def topology(
    model: str = "untied",
    ci: bool = False,
    splits: bool = False,
    micro_batch_tokens: int | None = None,
    **parallel: Any,
) -> Topology:
    return Topology(ParallelConfig(threads=1, **parallel), model, ci, splits, micro_batch_tokens)


OVERLAP = {
    "distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "grad_bucket_size": 2000,
}
"""Every message of the optimizer overlapped, in several buckets with padding between them."""

TOPOLOGIES: dict[str, Topology] = {
    # one process, against another run of it
    "single": topology(splits=True, ci=True),
    "single_micro_batch_tokens": topology(micro_batch_tokens=80),
    # tensor and sequence parallelism
    "tp2": topology(tensor=2),
    "tp2_tied": topology("tied", tensor=2),
    "tp2_sp": topology(tensor=2, sequence=True, ci=True),
    "tp2_sp_recompute_full": topology(tensor=2, sequence=True, recompute="full"),
    "tp2_sp_recompute_selective": topology(tensor=2, sequence=True, recompute="selective"),
    "tp2_sp_recompute_modules": topology(
        tensor=2, sequence=True, recompute="selective", recompute_modules=["core_attn", "mlp", "layernorm"]
    ),
    "tp3": topology("three_groups", tensor=3),  # the vocabulary is padded to 384, not to 128
    "tp2_biases_norms": topology("biases_norms", tensor=2),
    "tp2_sp_biases_norms": topology("biases_norms", tensor=2, sequence=True, distributed_optimizer=True),
    "tp4_sp": topology("four_heads", tensor=4, sequence=True),
    # pipelines
    "pp2": topology(pipeline=2, splits=True),
    "pp2_tied": topology("tied", pipeline=2),
    "pp2_uneven_first": topology("deep", pipeline=2, first_stage_layers=1),
    "pp2_uneven_last": topology("deep_tied", pipeline=2, last_stage_layers=1),
    "pp2_count_output_tied": topology("three_layers_tied", pipeline=2, count_output=True),
    "pp2_vpp2_count_ends": topology(
        "six_layers", pipeline=2, virtual_pipeline=2, count_embedding=True, count_output=True, ci=True
    ),
    "pp2_recompute_full": topology(pipeline=2, recompute="full"),
    "pp2_recompute_selective": topology(pipeline=2, recompute="selective"),
    "pp2_vpp2": topology("deep", pipeline=2, virtual_pipeline=2),
    "pp2_vpp2_tied": topology("deep_tied", pipeline=2, virtual_pipeline=2),
    "pp2_micro_batch_tokens": topology(pipeline=2, micro_batch_tokens=80),
    "pp4_vpp2_without_overlap_p2p": topology("eight_layers", pipeline=4, virtual_pipeline=2, overlap_p2p=False),
    "pp4": topology("deep_tied", pipeline=4),
    "tp2_pp2": topology(tensor=2, pipeline=2),
    "tp2_pp2_tied": topology("tied", tensor=2, pipeline=2),
    "tp2_pp2_vpp2_sp": topology("deep_tied", tensor=2, pipeline=2, virtual_pipeline=2, sequence=True, ci=True),
    # context parallelism
    "cp2": topology(context=2, splits=True, ci=True),
    "cp2_distributed_optimizer": topology("tied", context=2, distributed_optimizer=True),
    "cp2_tp2_sp": topology(context=2, tensor=2, sequence=True),
    "cp2_tp2": topology("tied", context=2, tensor=2),
    "cp2_biases_norms": topology("biases_norms", context=2),
    "cp2_pp2": topology("tied", context=2, pipeline=2),
    "cp4": topology(context=4),
    "cp2_dp2": topology(context=2, data=2, splits=True, distributed_optimizer=True, ci=True),
    # data parallelism
    "dp2": topology(data=2, splits=True),
    "dp2_tied": topology("tied", data=2),
    "dp2_micro_batch_tokens": topology(data=2, micro_batch_tokens=80, ci=True),
    "dp2_distributed_optimizer": topology(data=2, distributed_optimizer=True),
    "dp2_overlap_grad_reduce": topology(data=2, splits=True, overlap_grad_reduce=True),
    "dp2_distributed_optimizer_overlap": topology(data=2, ci=True, **OVERLAP),
    "dp2_pp2_distributed_optimizer_overlap": topology("tied", data=2, pipeline=2, **OVERLAP),
    "dp2_tp2": topology(data=2, tensor=2),
    "dp2_tp2_sp_distributed_optimizer": topology("tied", data=2, tensor=2, sequence=True, distributed_optimizer=True),
    "dp2_pp2": topology("tied", data=2, pipeline=2, splits=True),
    "dp2_pp2_vpp2_distributed_optimizer_overlap": topology(
        "deep_tied", data=2, pipeline=2, virtual_pipeline=2, **OVERLAP
    ),
    # mixtures of experts
    "ep2": topology("experts", data=2, expert=2),
    "ep2_distributed_optimizer": topology("experts", data=2, expert=2, distributed_optimizer=True),
    "ep2_distributed_optimizer_overlap": topology("experts", data=2, expert=2, **OVERLAP),
    "ep2_cp2": topology("experts", context=2, expert=2),
    "experts_dp2": topology("experts", data=2),
    "experts_pp2": topology("experts", pipeline=2),
    "experts_recompute_moe": topology("experts", data=2, expert=2, recompute="selective", recompute_modules=["moe"]),
    "experts_recompute_full": topology("experts", tensor=2, sequence=True, recompute="full"),
    "experts_tp2_sp": topology("experts", tensor=2, sequence=True),
    "ep2_tp2_sp": topology("experts", data=2, tensor=2, sequence=True, expert=2, ci=True),
    "ep2_tp2_sp_expert_tensor1": topology("experts", data=2, tensor=2, sequence=True, expert=2, expert_tensor=1),
    "ep2_tp2_sp_norms": topology("experts_norms", data=2, tensor=2, sequence=True, expert=2),
    "ep2_pp2": topology("experts", data=2, pipeline=2, expert=2, splits=True),
}
