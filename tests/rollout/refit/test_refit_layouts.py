"""What engines receive from a trainer in any layout is what one process would send, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from collected import Collector, differing, expected_tensors
from torch import Tensor

import ra3_megatron.mcore  # noqa: F401
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.hf.families import family_for
from ra3_megatron.mcore.startup import initialize
from ra3_megatron.rollout.refit.refit import Refit, RefitStats
from tests.mcore.small_models import (
    MODEL,
    VOCAB,
    build,
    make_documents,
    make_trainer,
    micro_batches,
    put_in_rows,
    weights,
)
from tests.processes import run_processes

BUCKET = 4096
"""Bytes; the embedding alone has 19,200."""
TIMEOUT = 60.0
TIED = {"tied_embeddings": True}
DEEP = {"num_layers": 4}
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "expert_ffn_hidden_size": 24}
BIASES = {"qkv_bias": True, "head_dim": None}
OVERLAP = {
    "distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "grad_bucket_size": 2000,
}


@dataclass(frozen=True)
class Case:
    """A layout, a model and where its engines are."""

    parallel: ParallelConfig
    model: ModelConfig
    placement: Any
    transport: Any
    dtype: torch.dtype | None
    engines: int


def case(
    model: dict[str, Any] | None = None,
    placement: str = "colocated",
    transport: str = "shared",
    dtype: torch.dtype | None = None,
    engines: int = 1,
    **parallel: Any,
) -> Case:
    changed = MODEL.model_copy(update=model or {})
    return Case(ParallelConfig(threads=1, **parallel), changed, placement, transport, dtype, engines)


CASES = {
    "single": case(),
    "single_broadcast_two_engines": case(TIED, transport="broadcast", engines=2),
    "single_bf16": case(EXPERTS, dtype=torch.bfloat16),
    "tp2": case(tensor=2),
    "tp2_sp_tied_broadcast": case(TIED, tensor=2, sequence=True, transport="broadcast"),
    "tp2_biases": case(BIASES, tensor=2),
    "tp2_bf16": case(TIED, tensor=2, dtype=torch.bfloat16),
    "tp2_experts": case(EXPERTS, tensor=2, sequence=True),
    "pp2": case(pipeline=2, engines=2),
    "pp2_tied": case(TIED, pipeline=2),
    "pp2_vpp2": case(DEEP, pipeline=2, virtual_pipeline=2),
    "dp2": case(data=2),
    "dp2_overlap_server": case(TIED, data=2, placement="server", **OVERLAP),
    "cp2": case(context=2),
    "ep2": case(EXPERTS, data=2, expert=2),
    "ep2_server": case(EXPERTS | TIED, data=2, expert=2, placement="server"),
    "tp2_pp2_tied": case(TIED, tensor=2, pipeline=2),
    "tp2_pp2_vpp2": case(DEEP, tensor=2, pipeline=2, virtual_pipeline=2, sequence=True),
    "dp2_pp2_server": case(data=2, pipeline=2, placement="server", engines=2),
    "ep2_tp2": case(EXPERTS, data=2, tensor=2, expert=2, sequence=True),
    "ep2_tp2_expert_tensor1": case(EXPERTS, data=2, tensor=2, expert=2, expert_tensor=1, sequence=True),
    "ep2_pp2": case(EXPERTS | TIED, data=2, pipeline=2, expert=2),
}
SIZES = sorted({each.parallel.world_size for each in CASES.values()})


@dataclass
class Seen:
    """What one process saw of a case."""

    rank: int
    is_sender: bool
    initial: list[dict[str, Tensor]]
    """What its engines got, of the initial weights."""
    trained: list[dict[str, Tensor]]
    """And after a training step."""
    live: dict[str, Tensor]
    """What they should have got then."""
    stats: list[RefitStats]
    versions: list[int | None]


def observe(case: Case) -> Seen:
    runtime = initialize(case.parallel, seed=1)
    links = family_for(case.model).links(case.model, VOCAB)
    trainer = make_trainer(case.parallel, runtime, model=case.model)
    refit = Refit(
        trainer.model,
        runtime,
        links,
        placement=case.placement,
        receivers=case.engines,
        transport=case.transport,
        dtype=case.dtype,
        bucket_bytes=BUCKET,
        timeout=TIMEOUT,
        host="127.0.0.1",
    )
    engines = [Collector() for _ in range(case.engines)] if refit.is_sender else []
    updates = [engine.update for engine in engines]
    first = refit.send(updates, 0)
    initial = [engine.weights for engine in engines]
    rows = put_in_rows(make_documents(20, seed=3))
    trainer.step(micro_batches(rows, runtime, size=2))
    trainer.synchronize()
    second = refit.send(updates, 7)
    refit.close()
    live = expected_tensors(weights(trainer.model, runtime), links)
    dtype = case.dtype or torch.float32
    return Seen(
        rank=runtime.rank,
        is_sender=refit.is_sender,
        initial=initial,
        trained=[engine.weights for engine in engines],
        live={name: tensor.to(dtype) for name, tensor in live.items()},
        stats=[first, second],
        versions=[engine.version for engine in engines],
    )


def observe_all(names: list[str]) -> list[Seen]:
    return [observe(CASES[name]) for name in names]


@pytest.fixture(scope="module")
def seen() -> dict[str, list[Seen]]:
    """What every process saw, by case; processes are started once for each number of them."""
    found: dict[str, list[Seen]] = {}
    for size in SIZES:
        names = [name for name, each in CASES.items() if each.parallel.world_size == size]
        ranks = run_processes(size, observe_all, names, timeout=300)
        for number, name in enumerate(names):
            found[name] = [rank[number] for rank in ranks]
    return found


def initial_weights(case: Case) -> dict[str, Tensor]:
    """Of one process."""
    parallel = ParallelConfig(threads=1)
    runtime = initialize(parallel, seed=1)
    wholes = weights(build(parallel, runtime, case.model), runtime)
    tensors = expected_tensors(wholes, family_for(case.model).links(case.model, VOCAB))
    return {name: tensor.to(case.dtype or torch.float32) for name, tensor in tensors.items()}


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_engine_gets_the_weights_of_one_process(seen: dict[str, list[Seen]], name: str) -> None:
    expected = initial_weights(CASES[name])
    engines = [engine for process in seen[name] for engine in process.initial]
    assert engines
    for engine in engines:
        assert differing(engine, expected) == []
        assert engine["lm_head.weight"].shape[0] == VOCAB


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_training_step_later_they_get_the_new_ones(seen: dict[str, list[Seen]], name: str) -> None:
    for process in seen[name]:
        for before, after in zip(process.initial, process.trained, strict=True):
            assert differing(after, process.live) == []
            unchanged = before.keys() - differing(before, after)
            assert unchanged == set()


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_senders_versions_and_stats(seen: dict[str, list[Seen]], name: str) -> None:
    case, processes = CASES[name], seen[name]
    senders = [process.rank for process in processes if process.is_sender]
    replicas = case.parallel.data * case.parallel.context
    assert len(senders) == (replicas if case.placement == "colocated" else 1) and senders[0] == 0
    assert [len(process.initial) for process in processes if process.is_sender] == [case.engines] * len(senders)
    assert all(version == 7 for process in processes for version in process.versions)
    tensors = processes[0].trained[0]
    for process in processes:
        assert process.stats == processes[0].stats
        for stats in process.stats:
            assert stats.tensors == len(tensors)
            assert stats.nbytes == sum(tensor.nbytes for tensor in tensors.values())
