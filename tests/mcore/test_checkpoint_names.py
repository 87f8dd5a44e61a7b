"""Names in checkpoints are Transformer Engine's, whichever layers wrote them.

The lists of Transformer Engine's names are read off Megatron-Core 0.16.1 (`get_gpt_layer_with_transformer_engine_spec`
and the `sharded_state_dict` methods of its modules). Not covered: that Transformer Engine itself writes these names; it
needs a GPU.
"""

from __future__ import annotations

import pytest

from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.mcore.model import language_model
from ra3_megatron.mcore.names import EXTRA_STATE, keys_map, to_checkpoint, to_local
from ra3_megatron.mcore.startup import Runtime
from tests.mcore.small_models import MODEL, build

# isort: split
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping

EXPERTS = MODEL.model_copy(update={"num_experts": 4, "expert_ffn_hidden_size": 24})

ATTENTION = [
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv._extra_state",
    "self_attention.linear_proj.weight",
    "self_attention.linear_proj._extra_state",
]
DENSE = [
    *ATTENTION,
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc1._extra_state",
    "mlp.linear_fc2.weight",
    "mlp.linear_fc2._extra_state",
]
MIXTURE = [
    *ATTENTION,
    "pre_mlp_layernorm.weight",
    "pre_mlp_layernorm._extra_state",  # norms of Transformer Engine 2 have one, others none
    "mlp.router.weight",
    "mlp.experts.experts.linear_fc1.weight",
    "mlp.experts.experts.linear_fc1._extra_state",
    "mlp.experts.experts.linear_fc2.weight",
    "mlp.experts.experts.linear_fc2._extra_state",
]
LOCAL_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "input_layernorm.bias": "self_attention.linear_qkv.layer_norm_bias",
}
DENSE_NORMS = {
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "pre_mlp_layernorm.bias": "mlp.linear_fc1.layer_norm_bias",
}
MIXTURE_NORMS = {"pre_mlp_layernorm.weight": "pre_mlp_layernorm.weight"}


@pytest.mark.parametrize(
    ("experts", "names", "norms"),
    [(False, DENSE, LOCAL_NORMS | DENSE_NORMS), (True, MIXTURE, LOCAL_NORMS | MIXTURE_NORMS)],
    ids=["dense", "experts"],
)
def test_both_directions(experts: bool, names: list[str], norms: dict[str, str]) -> None:
    for local, name in norms.items():
        assert to_checkpoint(local, experts) == name
        assert to_local(name, experts) == local
    for name in names:  # each has one local name, and goes back to itself
        assert to_checkpoint(to_local(name, experts), experts) == name
        if name not in norms.values():
            assert to_local(name, experts) == to_checkpoint(name, experts) == name, "only norms have another name"
    assert len({to_local(name, experts) for name in names}) == len(names)


@pytest.mark.parametrize(("model", "names"), [(MODEL, DENSE), (EXPERTS, MIXTURE)], ids=["dense", "experts"])
def test_a_model_of_local_layers_has_these_names(runtime: Runtime, model: ModelConfig, names: list[str]) -> None:
    """All of Transformer Engine's weights and no other; extra states are a part of Transformer Engine's."""
    state = language_model(build(ParallelConfig(threads=1), runtime, model)).sharded_state_dict()
    prefix = "decoder.layers."
    found = {entry.key.removeprefix(prefix) for entry in state.values() if entry.key.startswith(prefix)}
    expected = set(names)
    assert {n for n in found if not n.endswith(EXTRA_STATE)} == {n for n in expected if not n.endswith(EXTRA_STATE)}
    assert {n for n in found if n.endswith(EXTRA_STATE)} <= expected
    outside = {entry.key for entry in state.values() if not entry.key.startswith(prefix)}
    assert outside - {"output_layer._extra_state"} == {
        "embedding.word_embeddings.weight",
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    }


@pytest.mark.parametrize("experts", [False, True])
def test_megatron_applies_the_map_alike(runtime: Runtime, experts: bool) -> None:
    model = EXPERTS if experts else MODEL
    state = language_model(build(ParallelConfig(threads=1), runtime, model)).sharded_state_dict()
    layer = {k: v for k, v in state.items() if v.key.startswith("decoder.layers.")}
    names = {k: v.key.removeprefix("decoder.layers.") for k, v in layer.items()}
    for key, entry in layer.items():
        entry.key = to_local(names[key], experts)
    assert "input_layernorm.weight" in {entry.key for entry in layer.values()}
    apply_prefix_mapping(layer, keys_map(experts))
    assert {key: entry.key for key, entry in layer.items()} == names
