"""The model: equal to Hugging Face's Llama, indifferent to packing and chunking, the same weights at any layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.mcore import model as model_module
from ra3_megatron.mcore.batch import Events, TokenBatch
from ra3_megatron.mcore.model import language_model, padded_vocabulary
from ra3_megatron.mcore.startup import Runtime, initialize
from ra3_megatron.mcore.trainer import forward
from tests.mcore.small_models import MODEL, VOCAB, build, make_documents, pack_rows, put_in_rows, weights
from tests.processes import run_processes

SINGLE = ParallelConfig(threads=1)


def plain_batch(ids: Tensor) -> TokenBatch:
    """Next-token prediction of every token of whole rows."""
    rows, length = ids.shape
    weight = torch.ones(rows, length)
    weight[:, -1] = 0
    return TokenBatch(
        ids=ids,
        positions=torch.arange(length).expand(rows, length),
        segments=torch.zeros(rows, length, dtype=torch.long),
        targets=torch.cat([ids[:, 1:], ids.new_zeros(rows, 1)], dim=1),
        ce_weight=weight,
    )


def pack_qkv(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """Megatron's order: for each key/value head its query heads, the key, the value."""
    parts = [x.view(groups, x.shape[0] // groups, x.shape[1]) for x in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, q.shape[1])


def copy_from_llama(state: dict[str, Tensor], model: ModelConfig, target: torch.nn.Module) -> None:
    """Put the weights of a LlamaForCausalLM into a LanguageModel (one process)."""

    def padded(weight: Tensor) -> Tensor:
        return torch.cat([weight, torch.full((padded_vocabulary(VOCAB, 1) - VOCAB, weight.shape[1]), 9.0)])

    named = {
        "embedding.word_embeddings.weight": padded(state["model.embed_tokens.weight"]),
        "decoder.final_layernorm.weight": state["model.norm.weight"],
    }
    if not model.tied_embeddings:
        named["output_layer.weight"] = padded(state["lm_head.weight"])
    for i in range(model.num_layers):
        theirs, ours = f"model.layers.{i}.", f"decoder.layers.{i}."
        q, k, v = (state[f"{theirs}self_attn.{x}_proj.weight"] for x in "qkv")
        gate, up = state[theirs + "mlp.gate_proj.weight"], state[theirs + "mlp.up_proj.weight"]
        named |= {
            ours + "input_layernorm.weight": state[theirs + "input_layernorm.weight"],
            ours + "pre_mlp_layernorm.weight": state[theirs + "post_attention_layernorm.weight"],
            ours + "self_attention.linear_qkv.weight": pack_qkv(q, k, v, model.num_query_groups),
            ours + "self_attention.linear_proj.weight": state[theirs + "self_attn.o_proj.weight"],
            ours + "mlp.linear_fc1.weight": torch.cat([gate, up]),
            ours + "mlp.linear_fc2.weight": state[theirs + "mlp.down_proj.weight"],
        }
    parameters = dict(language_model(target).named_parameters())
    assert parameters.keys() == named.keys()
    with torch.no_grad():
        for name, value in named.items():
            parameters[name].copy_(value)


@pytest.mark.parametrize(
    ("tied", "groups", "head_dim"), [(True, 2, 12), (False, 2, None), (True, 4, None), (False, 4, 12), (False, 1, 16)]
)
def test_log_probs_are_those_of_hugging_face_llama(
    runtime: Runtime, tied: bool, groups: int, head_dim: int | None
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = MODEL.model_copy(
        update={"tied_embeddings": tied, "num_query_groups": groups, "head_dim": head_dim, "rope_base": 500.0}
    )
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=groups,
            head_dim=head_dim or config.hidden_size // config.num_attention_heads,
            max_position_embeddings=config.context_length,
            rope_theta=config.rope_base,
            rms_norm_eps=config.norm_epsilon,
            tie_word_embeddings=tied,
            initializer_range=0.2,
        )
    ).eval()
    with torch.no_grad():
        for parameter in llama.parameters():
            if parameter.dim() == 1:  # norms start as ones, which would hide that they are swapped
                parameter.add_(0.3 * torch.randn_like(parameter))
    ours = build(SINGLE, runtime, config)
    copy_from_llama(llama.state_dict(), config, ours)
    ids = torch.randint(0, VOCAB, (3, 40))
    with torch.no_grad():
        expected = llama(ids).logits.float().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    (found,) = forward(ours, [plain_batch(ids)], runtime)
    torch.testing.assert_close(found[0, :, :-1], expected, rtol=1e-5, atol=1e-5)


def loss_and_gradients(model: torch.nn.Module, batches: list[TokenBatch]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs of each batch, and gradients of a fixed mixture of all of them."""
    model.zero_grad()
    outputs = []
    for batch in batches:
        out = model(batch)
        outputs.append(out.detach())
        assert batch.ce_weight is not None and batch.advantage is not None
        (batch.ce_weight * out[0] + batch.advantage * out[1] + 0.1 * out[2]).sum().backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_packed_rows_equal_documents_one_by_one(runtime: Runtime) -> None:
    model = language_model(build(SINGLE, runtime))
    documents = make_documents(9, seed=2)
    rows = put_in_rows(documents)
    assert max(len(row) for row in rows) > 2
    alone, gradients_alone = loss_and_gradients(model, [pack_rows([[d]], len(d.ids)) for d in documents])
    (packed,), gradients = loss_and_gradients(model, [pack_rows(rows)])
    expected = torch.zeros_like(packed)
    number = 0
    for b, row in enumerate(rows):
        start = 0
        for document in row:
            n = len(document.ids)
            expected[:, b, start : start + n] = alone[number][:, 0]
            start, number = start + n, number + 1
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-5)
    assert_gradients_equal(gradients, gradients_alone, 1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_chunks_of_positions_change_nothing(runtime: Runtime, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    model = language_model(build(SINGLE, runtime, MODEL.model_copy(update={"tied_embeddings": tied})))
    batch = pack_rows(put_in_rows(make_documents(9, seed=3)))
    whole, whole_gradients = loss_and_gradients(model, [batch])
    largest = 0
    plain = model_module.event_log_probs

    def watched(logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        nonlocal largest
        largest = max(largest, len(logits))
        return plain(logits, *args, **kwargs)

    monkeypatch.setattr(model_module, "CHUNK_POSITIONS", 7)
    monkeypatch.setattr(model_module, "event_log_probs", watched)
    chunked, chunked_gradients = loss_and_gradients(model, [batch])
    assert largest == 7
    torch.testing.assert_close(chunked[0], whole[0], rtol=0, atol=3e-6)
    assert_gradients_equal(chunked_gradients, whole_gradients, 1e-6)


def test_only_positions_that_are_asked_for_are_computed(runtime: Runtime) -> None:
    model = language_model(build(SINGLE, runtime))
    batch = pack_rows(put_in_rows(make_documents(9, seed=3)))
    (out,) = forward(model, [batch], runtime)
    assert batch.ce_weight is not None and batch.choices is not None
    assert torch.equal(out[0] != 0, batch.ce_weight != 0)
    assert torch.equal(out[1] != 0, batch.choices.mask)
    nothing = replace(
        batch, ce_weight=None, choices=Events(mask=torch.zeros_like(batch.choices.mask)), advantage=None, decision=None
    )
    (out,) = forward(model, [nothing], runtime)
    assert torch.equal(out, torch.zeros_like(out))


def test_temperature_divides_the_logits_of_events_only(runtime: Runtime) -> None:
    model = language_model(build(SINGLE, runtime))
    batch = plain_batch(torch.randint(0, VOCAB, (1, 12)))
    assert batch.ce_weight is not None
    mask = batch.ce_weight > 0
    (out,) = forward(model, [replace(batch, choices=Events(mask=mask, temperature=2.0))], runtime)
    with torch.no_grad():
        hidden = model(replace(batch, ce_weight=None), hidden_only=True)[:, 0]
        logits = model.logits(hidden)[:-1, :VOCAB]
    target = batch.targets[0, :-1, None]
    torch.testing.assert_close(out[0, 0, :-1], logits.log_softmax(-1).gather(1, target)[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(out[1, 0, :-1], (logits / 2).log_softmax(-1).gather(1, target)[:, 0], rtol=0, atol=1e-5)


def test_bf16_is_close_to_fp32(runtime: Runtime) -> None:
    config = MODEL.model_copy(update={"init_std": 0.05})
    batch = pack_rows(put_in_rows(make_documents(9, seed=3)))
    (exact,) = forward(build(SINGLE, runtime, config), [batch], runtime)
    half = build(SINGLE, runtime, config.model_copy(update={"precision": "bf16"}))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    (rounded,) = forward(half, [batch], runtime)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.05)
    assert not torch.equal(rounded, exact)


def initial_weights() -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    parallel = ParallelConfig(tensor=2, threads=1)
    runtime = initialize(parallel, seed=1)
    shards = build(parallel, runtime)
    tied = build(parallel, runtime, MODEL.model_copy(update={"tied_embeddings": True}))
    local = {name: p.detach().clone() for name, p in language_model(shards).named_parameters()}
    return weights(shards, runtime), weights(tied, runtime), local


@pytest.mark.multiprocess
def test_initial_weights_do_not_depend_on_the_layout(runtime: Runtime) -> None:
    (split, split_tied, local), _ = run_processes(2, initial_weights)
    expected = weights(build(SINGLE, runtime), runtime)
    tied = weights(build(SINGLE, runtime, MODEL.model_copy(update={"tied_embeddings": True})), runtime)
    for found, one in ((split, expected), (split_tied, tied)):
        assert found.keys() == one.keys()
        for name in one:
            assert torch.equal(found[name], one[name]), name
    qkv = "self_attention.linear_qkv.weight"
    first_layer = expected[f"decoder.layers.{qkv}"][0]
    assert local[f"decoder.layers.0.{qkv}"].shape[0] * 2 == first_layer.shape[0]
    assert not torch.equal(*first_layer.chunk(2))


def test_the_seed_decides_the_weights(runtime: Runtime) -> None:
    first, again, other = (weights(build(SINGLE, runtime, seed=s), runtime) for s in (5, 5, 6))
    name = "embedding.word_embeddings.weight"
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first[name], other[name])
