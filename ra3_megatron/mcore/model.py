"""A Megatron GPTModel from an architecture description.

`LanguageModel` is Megatron's GPTModel with two of its hooks replaced: rotary positions are those of each token (so
that packed documents and ragged caches need nothing else), and the output is log-probabilities of events instead of
logits: logits are never gathered, and never held in fp32 for more than a chunk of positions.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.mcore import elementwise
from ra3_megatron.mcore.attention import CachedAttention
from ra3_megatron.mcore.batch import Events, TokenBatch
from ra3_megatron.mcore.fp8 import fp8_settings, keep_exact, require_fp8, require_fp8_layers
from ra3_megatron.mcore.fp8_attention import Fp8Attention
from ra3_megatron.mcore.hardware import has_compiler, has_transformer_engine, has_triton
from ra3_megatron.mcore.hidden_events import EventRows, hidden_events
from ra3_megatron.mcore.initial_weights import draw_weights
from ra3_megatron.mcore.names import keys_map
from ra3_megatron.mcore.packing import remember
from ra3_megatron.mcore.rotary import inverse_frequencies
from ra3_megatron.mcore.startup import Runtime, seed_everything
from ra3_megatron.mcore.target_log_probs import target_log_probs
from ra3_megatron.mcore.vocab_parallel import VocabularyShard, event_log_probs, shard_sets

elementwise.install()

VOCABULARY_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this; padding tokens have probability 0."""
SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
"""How Megatron describes shards of weights and optimizer state (its own default fails)."""
CHUNK_POSITIONS = 2048
"""Positions whose logits are worked on, and held in fp32, at the same time."""
STREAMS = 4
"""What the model returns at each position: see `LanguageModel.forward`."""
_SWITCHES = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
"""Attributes by which Megatron's modules and configuration split sequences."""


def transformer_config(model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Megatron's configuration of this architecture in this layout."""
    bf16 = model.weight_type == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    cuda = torch.cuda.is_available()
    # what memory happens to hold must not be the first value that the scales of weights in FP8 have seen
    empty = torch.nn.init.zeros_ if model.fp8.parameter_gather else _leave
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        account_for_embedding_in_pipeline_split=parallel.count_embedding,
        account_for_loss_in_pipeline_split=parallel.count_output,
        overlap_p2p_comm=parallel.overlap_p2p and parallel.virtual_pipeline > 1,
        batch_p2p_comm=not (parallel.overlap_p2p and parallel.virtual_pipeline > 1),
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        num_moe_experts=model.num_experts,
        moe_ffn_hidden_size=(model.expert_ffn_hidden_size or model.ffn_hidden_size) if model.num_experts else None,
        moe_router_topk=model.experts_per_token,
        moe_router_pre_softmax=not model.normalize_expert_weights,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32" if model.num_experts else None,
        moe_token_dispatcher_type="alltoall",
        **_recompute(parallel),
        cpu_offloading=parallel.offload_activations > 0,
        cpu_offloading_num_layers=parallel.offload_activations,
        **fp8_settings(model),
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        attention_softmax_in_fp32=True,
        calculate_per_token_loss=True,
        use_cpu_initialization=not cuda,
        # drawn in initial_weights. (perform_initialization=False would leave out the attributes that mark sharded
        # weights, and every gradient norm under tensor parallelism would be wrong.)
        init_method=empty,
        output_layer_init_method=empty,
        embedding_init_method=empty,
        masked_softmax_fusion=False,
        bias_activation_fusion=model.num_experts is None or (cuda and has_compiler()),
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        deallocate_pipeline_outputs=False,
    )


def _leave(weight: Tensor) -> Tensor:
    return weight


def _recompute(parallel: ParallelConfig) -> dict[str, Any]:
    if parallel.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": parallel.recompute_method,
            "recompute_num_layers": parallel.recompute_layers,
        }
    if parallel.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(parallel.recompute_modules)}
    return {}


def padded_vocabulary(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding: `vocab_size` rounded up so that every rank holds the same number."""
    multiple = math.lcm(VOCABULARY_MULTIPLE, tensor)
    return -(-vocab_size // multiple) * multiple


class LanguageModel(GPTModel):
    """GPTModel that maps a TokenBatch to log-probabilities.

    forward returns fp32 [STREAMS, b, s]: log p(target) where `ce_weight` is not 0; log P(event), entropy and margin of
    `choices` (see `event_log_probs`); 0 elsewhere. A chunk that is not the model's last one returns hidden states.
    With `hidden_only`, hidden states [s, b, hidden] after the last norm (the sampler's entrance; without gradients
    under sequence parallelism).
    """

    vocabulary: VocabularyShard
    architecture: dict[str, Any]
    """What weights must agree on to fit: configuration keys and their values."""
    frequencies: Tensor
    """Of rotary positions, fp32 [head_dim / 2]."""
    recompute_logits: bool
    """Whether the backward pass computes logits of next-token prediction again (`parallel.recompute_logits`)."""

    def forward(self, batch: TokenBatch, hidden_only: bool = False) -> Tensor:
        if hidden_only:
            self._batch: TokenBatch | None = None
            with self._whole_sequences():
                return super().forward(batch.ids, batch.positions, None)
        self._batch = batch
        packing = batch.packing
        if packing is not None and batch.documents is not None:
            remember(packing, batch.documents)
        out: Tensor = super().forward(batch.ids, batch.positions, packing)
        self._batch = None
        return out

    @contextmanager
    def _whole_sequences(self) -> Iterator[None]:
        """Within it, sequences are not split over the tensor-parallel group: single tokens cannot be."""
        switches = self._sequence_switches() if self.config.sequence_parallel else []
        for owner, name in switches:
            setattr(owner, name, False)
        try:
            yield
        finally:
            for owner, name in switches:
                setattr(owner, name, True)

    def _sequence_switches(self) -> list[tuple[Any, str]]:
        """Every attribute that turns sequence parallelism on; and what makes experts insist on it."""
        owners = [*self.modules(), *{id(m.config): m.config for m in self.modules() if hasattr(m, "config")}.values()]
        switches = [(owner, name) for owner in owners for name in _SWITCHES if getattr(owner, name, None) is True]
        # in training mode, Megatron's mixture of experts refuses tensor parallelism without sequence parallelism
        return switches + [(m, "training") for m in self.modules() if isinstance(m, MoELayer) and m.training]

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's logits of hidden states, [n, hidden] -> [n, V_local] (no gradient across ranks)."""
        return F.linear(hidden, self._output_weight())

    def _output_weight(self) -> Tensor:
        if self.share_embeddings_and_output_weights and self.pre_process:
            return self.embedding.word_embeddings.weight
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, ())  # Megatron's DDP waits there for weights that are being gathered
        return self.output_layer.weight

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *_: Any, **__: Any) -> tuple[Any, ...]:
        decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids) if self.pre_process else None
        angles = position_ids.t()[:, :, None, None].float() * self.frequencies  # [s, b, 1, d / 2]
        return decoder_input, elementwise.turns(angles, self.config.params_dtype), None, None, None, None

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        if not self.post_process or self._batch is None:
            return hidden_states
        batch = self._batch
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True)
        flat = hidden_states.transpose(0, 1).reshape(-1, hidden_states.shape[-1])  # [b * s, hidden]
        if not self.config.sequence_parallel:
            # behind the transposition: Megatron's backward drops the sum of a gradient that is not contiguous
            flat = copy_to_tensor_model_parallel_region(flat)
        out = torch.zeros(STREAMS, flat.shape[0], dtype=torch.float32, device=flat.device)
        streams: list[Tensor] = []
        if batch.ce_weight is not None:
            where = batch.where_weighted()
            streams.append(out[0].index_copy(0, where, self._targets(flat, where, batch.targets)))
        else:
            streams.append(out[0])
        if batch.choices is not None:
            where = batch.choices.where()
            found = self._events(flat, where, batch.targets, batch.choices)
            streams += [out[1 + n].index_copy(0, where, value) for n, value in enumerate(found)]
        else:
            streams += list(out[1:])
        return torch.stack(streams).view(STREAMS, *batch.ids.shape)

    def _targets(self, flat: Tensor, where: Tensor, targets: Tensor) -> Tensor:
        """log p(target) at flat positions `where`, [n]."""
        weight = self._output_weight()
        if not len(where):
            return _nothing(flat, weight)
        hidden, target = flat.index_select(0, where), targets.flatten().index_select(0, where)
        keep = torch.is_grad_enabled() and not self.recompute_logits
        return target_log_probs(hidden, weight, target, self.vocabulary, keep, CHUNK_POSITIONS)

    def _events(self, flat: Tensor, where: Tensor, targets: Tensor, events: Events) -> tuple[Tensor, ...]:
        """log P, entropy and margin of the events at flat positions `where`, [n] each."""
        weight = self._output_weight()
        if not len(where):
            empty = _nothing(flat, weight)
            return empty, empty, empty
        hidden, target = flat.index_select(0, where), targets.flatten().index_select(0, where)

        def rows(field: Tensor | None) -> Tensor | None:
            return None if field is None else field.flatten().index_select(0, where)

        numerator, denominator, merged = rows(events.numerator), rows(events.denominator), rows(events.merged)
        temperature = events.temperature
        if hidden.is_cuda and has_triton():
            asked = EventRows.of(target, numerator, denominator, merged, temperature)
            keep = torch.is_grad_enabled() and not self.recompute_logits
            return hidden_events(hidden, weight, asked, self.vocabulary, keep, CHUNK_POSITIONS)

        def chunk(piece: Tensor, matrix: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
            part = slice(start, start + piece.shape[0])
            logits = F.linear(piece, matrix)
            return event_log_probs(
                logits if temperature == 1.0 else logits.float() / temperature,
                target[part],
                self.vocabulary,
                None if numerator is None else numerator[part],
                None if denominator is None else denominator[part],
                None if merged is None else merged[part],
                overwrite=True,
            )

        starts = range(0, len(where), CHUNK_POSITIONS)
        if torch.is_grad_enabled() and len(starts) > 1:
            parts = [checkpoint(chunk, hidden[i : i + CHUNK_POSITIONS], weight, i, use_reentrant=False) for i in starts]
        else:
            parts = [chunk(hidden[i : i + CHUNK_POSITIONS], weight, i) for i in starts]
        return tuple(torch.cat(values) for values in zip(*parts, strict=True))


def _nothing(flat: Tensor, weight: Tensor) -> Tensor:
    """No values, with a gradient of 0 all the same: Megatron's DDP waits for every weight's, in the same order on every
    rank."""
    return flat[:0].sum(-1).float() + weight[:1].sum().float() * 0.0


def build_model(
    model: ModelConfig, parallel: ParallelConfig, runtime: Runtime, vocab_size: int, sets: Any, seed: int | None
) -> torch.nn.ModuleList:
    """A freshly initialised model on this process's device: the chunks of this pipeline stage, first to last.

    vocab_size: tokens of the tokenizer; sets: token sets of the latent format, bool [R, vocab_size]; seed: of the
    initial weights, which are the same in every layout; None: weights are left as they happen to be, to be loaded. In
    bf16 each chunk is wrapped in Float16Module. Raises UserError when `model.precision` asks for FP8 that is not there,
    or `parallel.recompute_modules` for norms that are not computed again.
    """
    require_fp8(model, runtime.device)
    require_recompute(model, parallel, runtime.device)
    rounds = model.fp8.parameter_gather and seed is not None
    if rounds:  # weights are drawn before they are rounded
        rounded = model.model_copy(update={"fp8": model.fp8.model_copy(update={"parameter_gather": False})})
        exact = build_model(rounded, parallel, runtime, vocab_size, sets, seed)
    seed_everything(seed or 0)
    config = transformer_config(model, parallel)
    size = padded_vocabulary(vocab_size, parallel.tensor)
    table = torch.as_tensor(sets, dtype=torch.bool, device=runtime.device)
    group = runtime.tensor_group if runtime.tensor_size > 1 else None
    chunks = []
    for number in range(parallel.virtual_pipeline):
        stage = number if parallel.virtual_pipeline > 1 else None
        chunk = LanguageModel(
            config=config,
            transformer_layer_spec=_layer_spec(model, runtime.device),
            vocab_size=size,
            max_sequence_length=model.context_length,
            pre_process=runtime.pipeline_rank == 0 and number == 0,
            post_process=runtime.is_last_stage and number == parallel.virtual_pipeline - 1,
            position_embedding_type="rope",
            rotary_base=model.rope_base,
            share_embeddings_and_output_weights=model.tied_embeddings,
            parallel_output=True,
            vp_stage=stage,
        ).to(runtime.device)
        chunk.architecture = architecture_of(model, vocab_size)
        chunk.frequencies = inverse_frequencies(model).to(runtime.device)
        chunk.recompute_logits = parallel.recompute_logits
        chunk.vocabulary = shard_sets(table, size, runtime.tensor_rank, runtime.tensor_size, group)
        chunks.append(chunk)
        require_fp8_layers(model, chunk)
    if rounds:
        _round(chunks, chunks_of(exact))
    elif seed is not None:
        draw_weights(chunks, seed, model.init_std, model.num_layers, vocab_size, SHARDING)
    return torch.nn.ModuleList(Float16Module(config, chunk) if config.bf16 else chunk for chunk in chunks)


def chunks_of(model: torch.nn.Module) -> list[LanguageModel]:
    """The LanguageModels inside any wrappers (ModuleList, DDP, Float16Module), in the order of their layers."""
    if isinstance(model, LanguageModel):
        return [model]
    if isinstance(model, torch.nn.ModuleList):
        return [chunk for inner in model for chunk in chunks_of(inner)]
    return chunks_of(model.module)  # type: ignore[arg-type]


def language_model(model: torch.nn.Module) -> LanguageModel:
    """The one chunk of a model that has no more of them on this process."""
    (chunk,) = chunks_of(model)
    return chunk


def architecture_of(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """What weights must agree on to fit: configuration keys and their values."""
    keys = model.model_dump(exclude={"hf", "vocab_size", "context_length", "init_std", "precision", "fp8"})
    keys["head_dim"] = model.head_dim or model.hidden_size // model.num_attention_heads
    if model.num_experts is None:
        keys["experts_per_token"] = keys["expert_ffn_hidden_size"] = keys["normalize_expert_weights"] = None
    else:
        dense = keys.pop("ffn_hidden_size")  # which no layer has
        keys["expert_ffn_hidden_size"] = model.expert_ffn_hidden_size or dense
    return {f"model.{key}": value for key, value in keys.items()} | {"vocabulary": vocab_size}


@torch.no_grad()
def _round(chunks: list[LanguageModel], exact: list[LanguageModel]) -> None:
    """Give weights in FP8 the values of the same model in bf16."""
    for chunk, other in zip(chunks, exact, strict=True):
        values = dict(other.named_parameters())
        for name, parameter in chunk.named_parameters():
            parameter.copy_(values[name])
            keep_exact(parameter, values[name])


def has_layers_of_transformer_engine(model: ModelConfig, device: torch.device) -> bool:
    """Whether the layers of this model are Transformer Engine's. In fp32 they are not: it would multiply in TF32."""
    return model.precision != "fp32" and has_transformer_engine(device)


def require_recompute(model: ModelConfig, parallel: ParallelConfig, device: torch.device) -> None:
    """Raise UserError when norms are to be computed again, and there are none by themselves: nothing would be."""
    asked = parallel.recompute == "selective" and "layernorm" in parallel.recompute_modules
    if asked and model.num_experts is None and has_layers_of_transformer_engine(model, device):
        raise UserError(
            "parallel.recompute_modules=[…, layernorm] does nothing here: the layers are Transformer Engine's, whose "
            "norms are part of the products behind them; leave it out (recompute=full computes them again)"
        )


def _layer_spec(model: ModelConfig, device: torch.device) -> ModuleSpec:
    if has_layers_of_transformer_engine(model, device):  # its names are those of checkpoints
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=model.num_experts, moe_grouped_gemm=False, qk_layernorm=model.qk_norm
        )
    else:
        spec = get_gpt_layer_local_spec(
            num_experts=model.num_experts, moe_grouped_gemm=False, qk_layernorm=model.qk_norm, normalization="RMSNorm"
        )
        spec.submodules.sharded_state_dict_keys_map = keys_map(experts=model.num_experts is not None)
    attention = Fp8Attention if model.fp8.attention else CachedAttention
    spec.submodules.self_attention.submodules.core_attention = attention
    return spec
