"""A Megatron GPTModel from an architecture description.

`LanguageModel` is Megatron's GPTModel with two of its hooks replaced: rotary positions are those of each token (so
that packed documents and ragged caches need nothing else), and the output is log-probabilities of events instead of
logits, computed chunk by chunk without ever holding or gathering the whole vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.mcore.attention import CachedAttention
from ra3_megatron.mcore.batch import Events, TokenBatch
from ra3_megatron.mcore.startup import Runtime, seed_everything
from ra3_megatron.mcore.vocab_parallel import VocabularyShard, event_log_probs, shard_sets

VOCABULARY_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this; padding tokens have probability 0."""
CHUNK_POSITIONS = 2048
"""Positions whose logits exist at the same time."""
_SWITCHES = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
"""Attributes by which Megatron's modules and configuration split sequences."""


def transformer_config(model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Megatron's configuration of this architecture in this layout."""
    bf16 = model.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
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
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        attention_softmax_in_fp32=True,
        calculate_per_token_loss=True,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        deallocate_pipeline_outputs=False,
    )


def padded_vocabulary(vocab_size: int, tensor: int) -> int:
    """Rows of the embedding: `vocab_size` rounded up so that every rank holds the same number."""
    multiple = math.lcm(VOCABULARY_MULTIPLE, tensor)
    return -(-vocab_size // multiple) * multiple


class LanguageModel(GPTModel):
    """GPTModel that maps a TokenBatch to log-probabilities.

    forward returns fp32 [3, b, s]: log p(target) where `ce_weight` is not 0, log P(event) and entropy of `choices`;
    0 elsewhere. With `hidden_only`, hidden states [s, b, hidden] after the last norm (the sampler's entrance; without
    gradients under sequence parallelism).
    """

    vocabulary: VocabularyShard
    architecture: dict[str, Any]
    """What weights must agree on to fit: configuration keys and their values."""

    def forward(self, batch: TokenBatch, hidden_only: bool = False) -> Tensor:
        if hidden_only:
            self._batch: TokenBatch | None = None
            with self._whole_sequences():
                return super().forward(batch.ids, batch.positions, None)
        self._batch = batch
        out: Tensor = super().forward(batch.ids, batch.positions, batch.packing)
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
        """Every attribute that turns sequence parallelism on."""
        owners = [*self.modules(), *{id(m.config): m.config for m in self.modules() if hasattr(m, "config")}.values()]
        return [(owner, name) for owner in owners for name in _SWITCHES if getattr(owner, name, None) is True]

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's logits of hidden states, [n, hidden] -> [n, V_local] (no gradient across ranks)."""
        return F.linear(hidden, self._output_weight())

    def _output_weight(self) -> Tensor:
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *_: Any, **__: Any) -> tuple[Any, ...]:
        decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids) if self.pre_process else None
        inverse = self.rotary_pos_emb.inv_freq.to(position_ids.device)
        angles = position_ids.t()[:, :, None, None].float() * inverse  # [s, b, 1, d / 2]
        rotary = torch.cat((angles, angles), dim=-1)
        return decoder_input, rotary, None, None, None, None

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
        out = torch.zeros(3, flat.shape[0], dtype=torch.float32, device=flat.device)
        streams: list[Tensor] = []
        if batch.ce_weight is not None:
            where = torch.nonzero(batch.ce_weight.flatten()).flatten()
            values, _unused = self._events(flat, where, batch.targets, None)
            streams.append(out[0].index_copy(0, where, values))
        else:
            streams.append(out[0])
        if batch.choices is not None:
            where = torch.nonzero(batch.choices.mask.flatten()).flatten()
            values, entropy = self._events(flat, where, batch.targets, batch.choices)
            streams += [out[1].index_copy(0, where, values), out[2].index_copy(0, where, entropy)]
        else:
            streams += [out[1], out[2]]
        return torch.stack(streams).view(3, *batch.ids.shape)

    def _events(self, flat: Tensor, where: Tensor, targets: Tensor, events: Events | None) -> tuple[Tensor, Tensor]:
        """log P and entropy of the events at flat positions `where`, [n] each."""
        weight = self._output_weight()
        hidden, target = flat[where], targets.flatten()[where]

        def rows(field: Tensor | None) -> Tensor | None:
            return None if field is None else field.flatten()[where]

        numerator = rows(events.numerator) if events else None
        denominator = rows(events.denominator) if events else None
        merged = rows(events.merged) if events else None

        temperature = events.temperature if events else 1.0

        def chunk(piece: Tensor, matrix: Tensor, start: int) -> tuple[Tensor, Tensor]:
            part = slice(start, start + piece.shape[0])
            logits = F.linear(piece, matrix)
            return event_log_probs(
                logits if temperature == 1.0 else logits.float() / temperature,
                target[part],
                self.vocabulary,
                None if numerator is None else numerator[part],
                None if denominator is None else denominator[part],
                None if merged is None else merged[part],
                entropy=events is not None,
                overwrite=True,
            )

        starts = range(0, len(where), CHUNK_POSITIONS)
        if torch.is_grad_enabled() and len(starts) > 1:
            parts = [checkpoint(chunk, hidden[i : i + CHUNK_POSITIONS], weight, i, use_reentrant=False) for i in starts]
        else:
            parts = [chunk(hidden[i : i + CHUNK_POSITIONS], weight, i) for i in starts]
        if not parts:
            empty = hidden.sum(-1).float() * 0.0
            return empty, empty
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def build_model(
    model: ModelConfig, parallel: ParallelConfig, runtime: Runtime, vocab_size: int, sets: Any, seed: int
) -> torch.nn.Module:
    """A freshly initialised model on this process's device.

    vocab_size: tokens of the tokenizer; sets: token sets of the latent format, bool [R, vocab_size]; seed: of the
    initial weights, which are the same at any tensor-parallel size. In bf16 the model is wrapped in Float16Module.
    """
    seed_everything(seed)
    config = transformer_config(model, parallel)
    size = padded_vocabulary(vocab_size, parallel.tensor)
    network = LanguageModel(
        config=config,
        transformer_layer_spec=_layer_spec(),
        vocab_size=size,
        max_sequence_length=model.context_length,
        position_embedding_type="rope",
        rotary_base=model.rope_base,
        share_embeddings_and_output_weights=model.tied_embeddings,
        parallel_output=True,
    ).to(runtime.device)
    table = torch.as_tensor(sets, dtype=torch.bool, device=runtime.device)
    group = runtime.tensor_group if runtime.tensor_size > 1 else None
    network.architecture = architecture_of(model, vocab_size)
    network.vocabulary = shard_sets(table, size, runtime.tensor_rank, runtime.tensor_size, group)
    return Float16Module(config, network) if config.bf16 else network


def language_model(module: torch.nn.Module) -> LanguageModel:
    """The LanguageModel inside any wrappers (DDP, Float16Module)."""
    while not isinstance(module, LanguageModel):
        module = module.module  # type: ignore[assignment]
    return module


def architecture_of(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """What weights must agree on to fit: configuration keys and their values."""
    keys = model.model_dump(exclude={"context_length", "init_std", "precision"})
    keys["head_dim"] = model.head_dim or model.hidden_size // model.num_attention_heads
    return {f"model.{key}": value for key, value in keys.items()} | {"vocabulary": vocab_size}


def _layer_spec() -> ModuleSpec:
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = CachedAttention
    return spec
