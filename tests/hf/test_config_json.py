"""config.json: what is read, in either generation of spellings, and what is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from hf_models import FAMILIES, LINEAR, LLAMA3, SIZES

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ModelConfig
from ra3_megatron.hf.families import read_folder
from ra3_megatron.hf.files import keep_small_files, small_files, write_config
from ra3_megatron.hf.importing import model_of


def write(folder: Path, name: str, **changes: Any) -> Path:
    kind, own = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **own}, architectures=[f"{kind}ForCausalLM"])
    folder.mkdir(exist_ok=True)
    values = {**config.to_dict(), **changes}
    (folder / "config.json").write_text(json.dumps({key: v for key, v in values.items() if v != "absent"}))
    return folder


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"sliding_window": 4096}, "sliding_window=4096 cannot be represented"),
    (
        "mistral",
        {"sliding_window": "absent"},
        "sliding_window is missing, which means 4096 to Hugging Face and cannot be represented: "
        'write "sliding_window": null if every layer attends to the whole context',
    ),
    ("mixtral", {"sliding_window": 4096}, "sliding_window=4096 cannot be represented"),
    ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok=1 cannot be represented: the weights of a token"),
    ("qwen3-moe", {"num_experts_per_tok": 1}, "num_experts_per_tok=1 cannot be represented: the weights of a token"),
    ("llama", {"rope_parameters": "linear"}, 'rope_parameters="linear" must be an object'),
    ("llama", {"rope_scaling": LINEAR}, "say different things"),
    ("llama", {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3}, "say different things"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window=true cannot be represented"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
    ("llama", {"hidden_act": "gelu"}, 'hidden_act="gelu" cannot be represented'),
    ("llama", {"attention_bias": True}, "attention_bias=true cannot be represented"),
    ("llama", {"mlp_bias": True}, "mlp_bias=true cannot be represented"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1 cannot be represented"),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config={"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not understood"),
    ("llama", {"rope_parameters": {**LLAMA3, "rope_type": "yarn"}}, 'rope_type="yarn" cannot be represented'),
    ("llama", {"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 cannot be"),
    ("llama", {"rope_parameters": {**LLAMA3, "attention_factor": 2.0}}, "attention_factor=2.0 is not understood"),
    ("llama", {"rope_parameters": {k: v for k, v in LLAMA3.items() if k != "factor"}}, "factor is missing"),
    (
        "llama",
        {"original_max_position_embeddings": 128},
        "original_max_position_embeddings=128 and 64 in rope_parameters say different things",
    ),
    ("llama", {"rope_theta": 10**400}, "rope_theta=10000"),
    ("llama", {"layer_types": 5}, "layer_types=5 cannot be represented"),
    ("llama", {"rms_norm_eps": 0}, "rms_norm_eps=0 must be a number greater than 0"),
    ("llama", {"num_hidden_layers": "two"}, 'num_hidden_layers="two" must be a number'),
    ("llama", {"hidden_size": 64.5}, "hidden_size=64.5 must be an integer"),
    ("llama", {"max_position_embeddings": "absent"}, "max_position_embeddings is missing"),
    ("llama", {"tie_word_embeddings": "no"}, 'tie_word_embeddings="no" must be true or false'),
    ("llama", {"architectures": ["GemmaForCausalLM"]}, "architecture GemmaForCausalLM is not supported: supported are"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architecture LlamaForSequenceClassification is"),
    ("qwen2", {"head_dim": 32}, "head_dim=32 cannot be represented: Qwen2 has hidden_size / num_attention_heads"),
    ("qwen3-moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 cannot be represented"),
    ("qwen3-moe", {"mlp_only_layers": [0]}, "mlp_only_layers=[0] cannot be represented"),
]


@pytest.mark.parametrize(("name", "change", "line"), REFUSED, ids=[f"{n}-{next(iter(c))}" for n, c, _ in REFUSED])
def test_refused_by_name(name: str, change: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(line)) as caught:
        model_of(write(tmp_path, name, **change))
    assert "\n" not in str(caught.value) and str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(("name", "rope"), [("llama", LLAMA3), ("qwen3", LINEAR), ("mistral", None)])
def test_spellings_of_transformers_4(name: str, rope: dict[str, Any] | None, tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling` instead of `rope_parameters`, `torch_dtype` instead of `dtype`."""
    new = write(tmp_path / "new", name)
    scaling = None if rope is None else {key: value for key, value in rope.items() if key != "rope_theta"}
    base = 10_000.0 if rope is None else rope["rope_theta"]
    changes = {"rope_theta": base, "rope_scaling": scaling, "rope_parameters": "absent", "torch_dtype": "float32"}
    old = write(tmp_path / "old", name, **changes)
    assert read_folder(old) == read_folder(new)
    if scaling is not None:
        assert read_folder(old)[1]["rope_scaling"]["kind"] == scaling["rope_type"]
        scaling["type"] = scaling.pop("rope_type")  # older still
        older = write(tmp_path / "older", name, **{**changes, "rope_scaling": scaling})
        assert read_folder(older) == read_folder(new)


def read_as_transformers_does(values: dict[str, Any], folder: Path) -> Any:
    """Family, keys with all channels a head named, and longest context; None where it is refused."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    try:
        family, keys, longest = read_folder(folder)
    except UserError:
        return None
    return (
        family.name,
        keys | {"head_dim": keys["head_dim"] or keys["hidden_size"] // keys["num_attention_heads"]},
        longest,
    )


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in FAMILIES.values()}))
def test_a_key_that_is_absent_means_what_transformers_takes_it_for(kind: str, tmp_path: Path) -> None:
    """Without any one of its keys, a config.json is refused, or read as the one in which transformers' default of that
    key is written out."""
    config_class = getattr(transformers, f"{kind}Config")
    own = next(changes for name, changes in FAMILIES.values() if name == kind)
    whole = config_class(**{**SIZES, **own}, architectures=[f"{kind}ForCausalLM"]).to_dict()
    assert read_as_transformers_does(whole, tmp_path) is not None
    told_apart = 0
    for key in sorted(whole.keys() - {"architectures", "model_type", "num_local_experts"}):
        less = {name: value for name, value in whole.items() if name != key}
        found = read_as_transformers_does(less, tmp_path)
        if found is not None:
            explicit = config_class(**{name: value for name, value in less.items() if name != "model_type"}).to_dict()
            told_apart += explicit.get(key) != whole[key]
            assert found == read_as_transformers_does(explicit, tmp_path), key
    assert told_apart > 0


def test_either_spelling_of_rotary_positions_counts(tmp_path: Path) -> None:
    """Both may be there when they agree; an empty one says nothing, as transformers has it."""
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    for changes in (
        {"rope_scaling": scaling, "rope_theta": LLAMA3["rope_theta"]},
        {"rope_scaling": LLAMA3, "rope_parameters": {}},
        {"rope_scaling": {}},
    ):
        folder = write(tmp_path, "llama", **changes)
        keys = read_folder(folder)[1]
        theirs = transformers.AutoConfig.from_pretrained(folder).rope_parameters
        assert keys["rope_scaling"]["kind"] == theirs["rope_type"] == "llama3", changes
        assert keys["rope_base"] == theirs["rope_theta"] == LLAMA3["rope_theta"]


def test_a_length_beside_the_rotary_positions_counts_for_transformers(tmp_path: Path) -> None:
    """That of the context before scaling, which transformers 5 takes instead of the one in them: the same one passes,
    and so does any where positions are not scaled by it."""
    inside = LLAMA3["original_max_position_embeddings"]
    folder = write(tmp_path, "llama", original_max_position_embeddings=2 * inside)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder)).config
    assert theirs.rope_parameters["original_max_position_embeddings"] == 2 * inside
    keys = read_folder(write(tmp_path, "llama", original_max_position_embeddings=inside))[1]
    assert keys == read_folder(write(tmp_path, "llama"))[1]
    for name in ("qwen3", "mistral"):
        assert read_folder(write(tmp_path, name, original_max_position_embeddings=7))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2"])
def test_scaling_is_written_for_transformers_4_too(name: str, tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling`, the only ones that it reads, say all that `rope_parameters` says."""
    _, keys, longest = read_folder(write(tmp_path / "theirs", name))
    write_config(tmp_path / "ours", ModelConfig(**keys, context_length=longest), keys["vocab_size"], {})
    values = json.loads((tmp_path / "ours" / "config.json").read_text())
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "ours").rope_parameters
    del values["rope_parameters"]
    assert ("rope_scaling" in values) == (name != "qwen2")
    (tmp_path / "ours" / "config.json").write_text(json.dumps(values))
    assert read_folder(tmp_path / "ours")[1]["rope_scaling"] == keys["rope_scaling"]
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").rope_parameters == theirs


@pytest.mark.parametrize("name", FAMILIES)
def test_written_and_read_again(name: str, tmp_path: Path) -> None:
    """A model's own config.json says of it what the one that it came from does; transformers reads it."""
    family, keys, longest = read_folder(write(tmp_path / "theirs", name))
    model = ModelConfig(**keys, context_length=longest, precision="bf16")
    ids = {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": None}
    write_config(tmp_path / "ours", model, keys["vocab_size"], ids)
    found, read, context = read_folder(tmp_path / "ours")
    assert context == longest and read == keys | {"head_dim": read["head_dim"]}
    # a Mistral is written as the Llama that it is
    assert found is family or (family.name, found.name) == ("mistral", "llama")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (5, 6, None)
    assert str(theirs.dtype) == "torch.bfloat16" and theirs.rope_parameters["rope_theta"] == model.rope_base
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "ours")
    assert (generation.bos_token_id, generation.eos_token_id) == (5, 6)


def test_channels_that_are_no_share_of_the_hidden_size_are_written_as_transformers_reads_them(tmp_path: Path) -> None:
    """transformers 5 refuses a Llama of 3 heads in 64 channels, whatever its head_dim."""
    model = ModelConfig(hidden_size=64, num_attention_heads=3, num_query_groups=1, head_dim=10)
    write_config(tmp_path, model, 128, {})
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (read.num_attention_heads, read.head_dim) == (3, 10)
    _, keys, longest = read_folder(tmp_path)
    assert ModelConfig(**keys, context_length=longest).model_dump() == {**model.model_dump(), "vocab_size": 128}


def test_files_of_the_source_are_kept(tmp_path: Path) -> None:
    """Nothing but the data type changes, under the key that is there; without a change, not a byte does."""
    source = write(tmp_path / "source", "llama", dtype="absent", torch_dtype="bfloat16", eos_token_id=[7, 8])
    (source / "generation_config.json").write_text('{"top_k":  5}')
    (source / "tokenizer.json").write_bytes(b"{}\r\n")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("t")
    (source / "model.safetensors").write_bytes(b"weights")
    (source / "README.md").write_text("readme")
    _, model, vocab_size = model_of(source)
    write_config(tmp_path / "fp32", model, vocab_size, {}, source)
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "fp32"))
    assert new == old | {"torch_dtype": "float32"}
    write_config(tmp_path / "bf16", model.model_copy(update={"precision": "bf16"}), vocab_size, {}, source)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "bf16" / name).read_bytes() == (source / name).read_bytes()
    keep_small_files(source, tmp_path / "kept")
    names = ["config.json", "generation_config.json", "tokenizer.json", "additional_chat_templates/tool.jinja"]
    assert small_files(tmp_path / "kept") == small_files(source) == names
    assert all((tmp_path / "kept" / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert len([path for path in (tmp_path / "kept").rglob("*") if path.is_file()]) == len(names)
