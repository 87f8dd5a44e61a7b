"""What a family of models is, and the parts that decoders of all families share."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ModelConfig
from ra3_megatron.hf.config_json import ConfigJson, rotary_json
from ra3_megatron.hf.weights import EMBEDDING, OUTPUT, Link, Slot, concatenated, query_key_value, same

LAYERS = "decoder.layers."
ATTENTION = LAYERS + "self_attention."


class Family(Protocol):
    """One family of models: its `config.json` and its tensors, both ways."""

    name: str
    """Name in messages and records."""
    architecture: str
    """Its entry in `architectures` of `config.json`."""
    model_type: str
    """`model_type` of `config.json`."""

    def fits(self, model: ModelConfig) -> bool:
        """Whether a model of this architecture can be written as one of this family."""
        ...

    def model_keys(self, config: ConfigJson) -> dict[str, Any]:
        """The `model.*` keys that a `config.json` decides. Raises UserError for what cannot be represented."""
        ...

    def config_json(self, model: ModelConfig, vocab_size: int) -> dict[str, Any]:
        """A `config.json` of this architecture, without ids of special tokens."""
        ...

    def links(self, model: ModelConfig, vocab_size: int) -> list[Link]:
        """Every tensor of the model, in the order of layers."""
        ...


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder, as the maps need them."""

    model: ModelConfig
    vocab_size: int

    @property
    def head_dim(self) -> int:
        """Channels a head."""
        return self.model.head_dim or self.model.hidden_size // self.model.num_attention_heads

    @property
    def experts(self) -> int:
        """Experts of each layer."""
        return self.model.num_experts or 0

    def ends(self) -> tuple[list[Link], list[Link]]:
        """What stands before the first layer, and behind the last."""
        hidden = self.model.hidden_size
        first = [same(Slot(EMBEDDING, (), (self.vocab_size, hidden)), "model.embed_tokens.weight")]
        last = [same(Slot("decoder.final_layernorm.weight", (), (hidden,)), "model.norm.weight")]
        if not self.model.tied_embeddings:
            last.append(same(Slot(OUTPUT, (), (self.vocab_size, hidden)), "lm_head.weight"))
        return first, last

    def attention(self, layer: int) -> Iterator[Link]:
        """Norm, projections and, as the architecture has them, biases and norms of queries and keys."""
        model, hf, place = self.model, f"model.layers.{layer}.", (layer,)
        hidden, channels = model.hidden_size, self.head_dim
        heads, groups = model.num_attention_heads, model.num_query_groups
        rows = (heads + 2 * groups) * channels
        yield same(Slot(ATTENTION + "linear_qkv.layer_norm_weight", place, (hidden,)), hf + "input_layernorm.weight")
        for kind, shape in (("weight", (rows, hidden)), ("bias", (rows,))):
            if kind == "weight" or model.qkv_bias:
                names = [f"{hf}self_attn.{x}_proj.{kind}" for x in "qkv"]
                yield query_key_value(Slot(ATTENTION + f"linear_qkv.{kind}", place, shape), names, heads, groups)
        if model.qk_norm:
            for x in "qk":
                slot = Slot(ATTENTION + f"{x}_layernorm.weight", place, (channels,))
                yield same(slot, f"{hf}self_attn.{x}_norm.weight")
        slot = Slot(ATTENTION + "linear_proj.weight", place, (hidden, heads * channels))
        yield same(slot, hf + "self_attn.o_proj.weight")

    def dense(self, layer: int) -> Iterator[Link]:
        """Norm and gated feed-forward layer."""
        hf = f"model.layers.{layer}."
        key = LAYERS + "mlp.linear_fc1.layer_norm_weight"
        yield same(Slot(key, (layer,), (self.model.hidden_size,)), hf + "post_attention_layernorm.weight")
        names = tuple(f"{hf}mlp.{x}_proj.weight" for x in ("gate", "up", "down"))
        yield from self._gated(LAYERS + "mlp.", (layer,), self.model.ffn_hidden_size, names)

    def mixture(self, layer: int, router: str, experts: str, parts: tuple[str, str, str]) -> Iterator[Link]:
        """Norm, router and experts. router, experts: names within the layer; parts: gate, up, down of an expert."""
        hf, model = f"model.layers.{layer}.", self.model
        width = model.expert_ffn_hidden_size or model.ffn_hidden_size
        key = LAYERS + "pre_mlp_layernorm.weight"
        yield same(Slot(key, (layer,), (model.hidden_size,)), hf + "post_attention_layernorm.weight")
        yield same(
            Slot(LAYERS + "mlp.router.weight", (layer,), (self.experts, model.hidden_size)), hf + router + ".weight"
        )
        for expert in range(self.experts):
            gate, up, down = (f"{hf}{experts}.{expert}.{part}.weight" for part in parts)
            yield from self._gated(LAYERS + "mlp.experts.experts.", (layer, expert), width, (gate, up, down))

    def _gated(self, key: str, place: tuple[int, ...], width: int, names: tuple[str, ...]) -> Iterator[Link]:
        hidden = self.model.hidden_size
        yield concatenated(Slot(key + "linear_fc1.weight", place, (2 * width, hidden)), names[:2])
        yield same(Slot(key + "linear_fc2.weight", place, (hidden, width)), names[2])


def common_keys(config: ConfigJson, multi_head: bool = False, rope_base: float = 10_000.0) -> dict[str, Any]:
    """The `model.*` keys that decoders of all families read alike; refuses what none of them can represent.

    multi_head: where `num_key_value_heads` is absent, there are as many as query heads. rope_base: where it is absent.
    """
    heads, hidden = config.count("num_attention_heads"), config.count("hidden_size")
    config.require("hidden_act", "silu", "swish", meaning="the feed-forward layer is SwiGLU")
    config.require("attention_dropout", 0, 0.0, meaning="there is no dropout")
    config.check(
        "layer_types",
        lambda kinds: isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds),
        "every layer attends to the whole context",
    )
    return {
        "vocab_size": config.count("vocab_size"),
        "num_layers": config.count("num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": config.count("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": config.count("num_key_value_heads", *([heads] if multi_head else [])),
        "head_dim": config.count("head_dim", None),
        "norm_epsilon": float(config.number("rms_norm_eps")),
        "tied_embeddings": config.flag("tie_word_embeddings", False),
        "qkv_bias": False,
        "qk_norm": False,
        "num_experts": None,
        **config.rotary(rope_base),
    }


def experts_per_token(config: ConfigJson, normalised: bool) -> int:
    """Experts of a token. Refuses one whose weight is normalised, which is 1 whatever the router says."""
    number: int = config.count("num_experts_per_tok")
    if normalised and number == 1:
        raise UserError(
            f"{config.path}: num_experts_per_tok=1 cannot be represented: the weights of a token's experts sum to 1, "
            "so a single one's is always 1 and its router cannot learn"
        )
    return number


def common_json(family: Family, model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The `config.json` keys that decoders of all families share."""
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[model.weight_type]
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim or model.hidden_size // model.num_attention_heads,
        "max_position_embeddings": model.context_length,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tied_embeddings,
        "torch_dtype": dtype,
        **rotary_json(model.rope_base, model.rope_scaling.model_dump()),
    }


def dense_links(model: ModelConfig, vocab_size: int) -> list[Link]:
    """Every tensor of a dense decoder."""
    decoder = Decoder(model, vocab_size)
    first, last = decoder.ends()
    layers = [link for i in range(model.num_layers) for link in (*decoder.attention(i), *decoder.dense(i))]
    return first + layers + last


def mixture_links(
    model: ModelConfig, vocab_size: int, router: str, experts: str, parts: tuple[str, str, str]
) -> list[Link]:
    """Every tensor of a decoder with a mixture of experts in each layer; names as in `Decoder.mixture`."""
    decoder = Decoder(model, vocab_size)
    first, last = decoder.ends()
    layers: list[Link] = []
    for layer in range(model.num_layers):
        layers += [*decoder.attention(layer), *decoder.mixture(layer, router, experts, parts)]
    return first + layers + last
