"""Names of a layer's tensors in checkpoints: those of Transformer Engine, whichever implementation wrote them.

Transformer Engine fuses a norm into the linear layer behind it and names its weight after that layer; Megatron's own
("local") layers have modules of their own for norms. Checkpoints hold Transformer Engine's names, so that one written
with either loads into the other:

    local                     checkpoint and Transformer Engine
    input_layernorm.weight    self_attention.linear_qkv.layer_norm_weight
    pre_mlp_layernorm.weight  mlp.linear_fc1.layer_norm_weight       (dense layers)
    pre_mlp_layernorm.weight  pre_mlp_layernorm.weight               (mixtures of experts: the router stands between)

`keys_map` is what the layer specification takes as `sharded_state_dict_keys_map`. Names here are those within a layer,
without the `decoder.layers.` before them.

Beside weights, modules write `_extra_state` entries: Transformer Engine's hold the scales of FP8, local linear layers
write empty ones, and modules of the two differ in whether they have one at all (norms). They are no part of the model:
`mcore.checkpoint` loads those that both sides have and leaves the others as they are.
"""

EXTRA_STATE = "_extra_state"
"""How the names of entries end that hold no weights."""

_ATTENTION = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_DENSE_FFN = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def keys_map(experts: bool) -> dict[str, str]:
    """Beginnings of local names and what stands for them in checkpoints. experts: of a mixture-of-experts layer.

    Megatron's local specification maps `pre_mlp_layernorm.` for mixtures of experts too, where Transformer Engine does
    not.
    """
    return dict(_ATTENTION) if experts else {**_ATTENTION, **_DENSE_FFN}


def to_checkpoint(name: str, experts: bool) -> str:
    """The name in checkpoints (and of Transformer Engine) of a local tensor."""
    return _replace(name, keys_map(experts))


def to_local(name: str, experts: bool) -> str:
    """The local name of a tensor in checkpoints."""
    return _replace(name, {new: old for old, new in keys_map(experts).items()})


def _replace(name: str, beginnings: dict[str, str]) -> str:
    for old, new in beginnings.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name
