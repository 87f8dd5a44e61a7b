"""A small model, documents with both loss streams filled, and whole tensors put together from any layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.config.training import OptimizerConfig
from ra3_megatron.mcore.batch import Events, Kind, TokenBatch
from ra3_megatron.mcore.model import build_model, chunks_of
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import Trainer
from ra3_megatron.mcore.vocab_parallel import ALL, TARGET

# isort: split
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory

VOCAB = 150
"""No multiple of anything: the vocabulary is padded, at tensor-parallel size 2 mostly in the second share."""

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=12,
    context_length=48,
    init_std=0.2,
    tied_embeddings=False,
)
NO_THOUGHT, STARTS, INSIDE = 1, 2, 3
ROW_LENGTH = 32


def token_sets() -> Tensor:
    """As a latent format has them: everything, what starts no thought, what does, what a thought may hold."""
    sets = torch.ones(4, VOCAB, dtype=torch.bool)
    sets[STARTS] = torch.arange(VOCAB) % 7 == 3
    sets[NO_THOUGHT] = ~sets[STARTS]
    sets[INSIDE] = torch.arange(VOCAB) % 3 != 0
    return sets


def build(parallel: ParallelConfig, runtime: Runtime, model: ModelConfig = MODEL, seed: int = 5) -> torch.nn.Module:
    return build_model(model, parallel, runtime, VOCAB, token_sets(), seed)


@dataclass(frozen=True)
class Document:
    """Ids, and what its tokens weigh in both streams ([tokens] each, at the token that is predicted)."""

    ids: Tensor
    ce_weight: Tensor
    choice: Tensor
    numerator: Tensor
    denominator: Tensor
    merged: Tensor
    decision: Tensor
    advantage: Tensor
    behaviour: Tensor
    proximal: Tensor


def make_documents(count: int, seed: int) -> list[Document]:
    """Documents of 3 to 15 tokens whose every second or third token is a choice."""
    generator = torch.Generator().manual_seed(seed)

    def random(shape: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (shape,), generator=generator)

    sets = token_sets()
    documents = []
    for _ in range(count):
        n = int(random(1, 3, 16))
        ids = random(n, 0, VOCAB)
        choice = random(n, 0, 5) < 2
        decision = choice & (random(n, 0, 2) == 0)
        inner = choice & ~decision
        ids = torch.where(inner & ~sets[INSIDE][ids], (ids // 3 * 3 + 1).clamp(max=VOCAB - 1), ids)
        act = decision & sets[NO_THOUGHT][ids]
        documents.append(
            Document(
                ids=ids,
                ce_weight=random(n, 0, 3).float() / 2,
                choice=choice,
                numerator=torch.where(act, NO_THOUGHT, TARGET),
                denominator=torch.where(inner, INSIDE, ALL),
                merged=torch.where(decision, NO_THOUGHT, TARGET),
                decision=decision,
                advantage=torch.randn(n, generator=generator),
                behaviour=(behaviour := -3 + torch.randn(n, generator=generator)),
                proximal=behaviour + 0.5 * torch.randn(n, generator=generator),
            )
        )
    return documents


def pack_rows(rows: Sequence[Sequence[Document]], length: int = ROW_LENGTH) -> TokenBatch:
    """One micro-batch [len(rows), length]; a row may be empty. Only documents' choices and weights count."""
    shape = (len(rows), length)
    ids, positions, targets = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    segments = torch.full(shape, -1)
    ce, advantage, behaviour, proximal = (torch.zeros(shape) for _ in range(4))
    mask, decision = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
    numerator, merged = (torch.full(shape, TARGET) for _ in range(2))
    denominator = torch.full(shape, ALL)
    for b, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row):
            n = len(document.ids)
            here, before = slice(start, start + n), slice(start, start + n - 1)
            ids[b, here], positions[b, here], segments[b, here] = document.ids, torch.arange(n), number
            targets[b, before] = document.ids[1:]
            for field, values in (
                (ce, document.ce_weight),
                (mask, document.choice),
                (decision, document.decision),
                (numerator, document.numerator),
                (denominator, document.denominator),
                (merged, document.merged),
                (advantage, document.advantage),
                (behaviour, document.behaviour),
                (proximal, document.proximal),
            ):
                field[b, before] = values[1:]
            start += n
        assert start <= length
    return TokenBatch(
        ids=ids,
        positions=positions,
        segments=segments,
        targets=targets,
        ce_weight=ce,
        choices=Events(mask, numerator, denominator, merged),
        advantage=advantage * mask,
        entropy_weight=0.05 * mask,
        behaviour=behaviour,
        proximal=proximal,
        decision=decision,
        kind=(mask & ~decision).to(torch.uint8) * int(Kind.THOUGHT),
    )


def put_in_rows(documents: Sequence[Document], length: int = ROW_LENGTH) -> list[list[Document]]:
    """Documents in order, a new row where one does not fit."""
    rows: list[list[Document]] = [[]]
    for document in documents:
        if sum(len(d.ids) for d in rows[-1]) + len(document.ids) > length:
            rows.append([])
        rows[-1].append(document)
    return rows


def micro_batches(
    rows: Sequence[Sequence[Document]], runtime: Runtime, size: int, uneven: bool = False
) -> list[TokenBatch]:
    """This data-parallel rank's micro-batches of `size` rows; `uneven`: rank 0 has one row, the last rank the rest."""
    ranks = runtime.data_size
    if uneven and ranks > 1:
        share = [list(rows[:1]), *([] for _ in range(ranks - 2)), list(rows[1:])]
    else:
        share = [list(rows[rank::ranks]) for rank in range(ranks)]
    multiple = size * runtime.micro_batch_multiple // ranks
    longest = -(-max(len(part) for part in share) // multiple) * multiple
    mine = share[runtime.data_rank] + [[]] * (longest - len(share[runtime.data_rank]))
    return [pack_rows(mine[start : start + size]) for start in range(0, longest, size)]


def make_trainer(
    parallel: ParallelConfig, runtime: Runtime, steps: int = 4, model: ModelConfig = MODEL, clip_grad: float = 0.5
) -> Trainer:
    optimizer = OptimizerConfig(
        learning_rate=1e-2, schedule="cosine", warmup_fraction=0.25, weight_decay=0.1, clip_grad=clip_grad, epsilon=1e-4
    )
    return Trainer(build(parallel, runtime, model), optimizer, parallel, runtime, steps)


Piece = tuple[str, tuple[int, ...], tuple[Any, ...], Tensor]
"""Name of a tensor of the whole model, its shape, where in it a rank's piece lies, and the piece."""


def pieces(model: torch.nn.Module, value_of: Callable[[torch.nn.Parameter], Tensor]) -> list[Piece]:
    """What this process holds of the whole model, as its sharded state dict says."""
    found: list[Piece] = []
    seen: set[int] = set()
    for chunk in chunks_of(model):
        parameters = {parameter.data_ptr(): parameter for parameter in chunk.parameters()}
        for entry in chunk.sharded_state_dict().values():
            if isinstance(entry, ShardedObject):  # extra state
                continue
            parameter = parameters[entry.data.data_ptr()]
            seen.add(id(parameter))
            value = value_of(parameter).detach()
            assert value.shape == parameter.shape
            if isinstance(entry, ShardedTensorFactory):
                built = entry.build_fn(entry.key, value, entry.replica_id, entry.flattened_range)
                shards = list(nested_values(built))
            else:
                shards = [replace(entry, data=value, dtype=value.dtype)]
            found += [(s.key, s.global_shape, s.global_slice(), s.data.clone()) for s in shards]
        assert seen >= {id(parameter) for parameter in chunk.parameters()}, "every weight is in the state dict"
    return found


def whole(
    model: torch.nn.Module, value_of: Callable[[torch.nn.Parameter], Tensor], runtime: Runtime
) -> dict[str, Tensor]:
    """A value of every parameter, put together over all processes and all layers. Collective.

    value_of: tensor of a parameter's shape. Names and places are those of checkpoints, which know no layout: layers
    (and experts) are stacked. Ranks that hold the same piece (replicas, tied embeddings) must agree bit for bit.
    """
    everybody: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(everybody, pieces(model, value_of))
    return assembled(everybody)


def assembled(everybody: Sequence[Sequence[Piece]]) -> dict[str, Tensor]:
    """Whole tensors from every rank's pieces."""
    result: dict[str, Tensor] = {}
    filled: dict[str, Tensor] = {}
    for key, shape, place, piece in itertools.chain.from_iterable(everybody):
        if key not in result:
            result[key] = torch.zeros(shape, dtype=piece.dtype)
            filled[key] = torch.zeros(shape, dtype=torch.bool)
        assert result[key].shape == shape, f"ranks disagree on the shape of {key}"
        taken = filled[key][place]
        assert bool(taken.all()) or not bool(taken.any()), f"pieces of {key} overlap"
        assert not taken.any() or torch.equal(result[key][place], piece), f"ranks disagree on {key} at {place}"
        result[key][place] = piece
        filled[key][place] = True
    for key, mask in filled.items():
        assert bool(mask.all()), f"no rank holds a part of {key}"
    return result


def weights(model: torch.nn.Module, runtime: Runtime) -> dict[str, Tensor]:
    """The model's weights, whole. Collective."""
    return whole(model, lambda parameter: parameter, runtime)


def gradients(trainer: Trainer, runtime: Runtime) -> dict[str, Tensor]:
    """Gradients of the last step, whole (after clipping). Collective."""
    for network in trainer.model if isinstance(trainer.model, torch.nn.ModuleList) else [trainer.model]:
        for group in [*network.bucket_groups, *network.expert_parallel_bucket_groups]:
            if not group.ddp_config.use_distributed_optimizer:
                continue
            processes = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:  # each rank holds its part of the sum
                part = bucket.grad_data.chunk(processes.size())[processes.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, part, group=processes)
    return whole(trainer.model, lambda parameter: parameter.main_grad, runtime)
