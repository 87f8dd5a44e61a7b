"""Passes that are recorded: the same tokens as without, whatever rows come, go and grow; what drops a graph.

The recorder of these tests runs the recorded function again on the memory that it reads: what it does not do is what
only a GPU can, and `make gpu` checks there.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_kv_session import hidden_of
from torch import Tensor
from toy import LARGE, Toy

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.runtime import RolloutConfig
from ra3_megatron.mcore.model import LanguageModel
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rollout import decode_graphs
from ra3_megatron.rollout.decode_graphs import DecodeGraphs, require_cuda_graphs
from ra3_megatron.rollout.kv_session import KVSession
from ra3_megatron.rollout.latent_sampler import Job, LatentSampler
from ra3_megatron.rollout.megatron_engine import MegatronEngine
from ra3_megatron.rollout.protocol import Completion, GenerateRequest
from ra3_megatron.rollout.stage_pass import StagePass

OVERLAPPED = {"data": 2, "distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
CODE = ("a = b\n  ab(c):\n   b\n\n", "c\nab(a)\n d(a)\n", "a\n")


class Again:
    """Runs a function again into the same memory, and counts."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.recorded += 1
        out = function()

        def again() -> None:
            self.replayed += 1
            out.copy_(function())

        return out, again


@pytest.fixture(scope="module")
def toy(runtime: Runtime) -> Toy:
    return Toy(runtime, "comment", LARGE, 3)


@pytest.fixture
def model(toy: Toy) -> LanguageModel:
    return toy.model(seed=1)


@pytest.mark.parametrize("seed", range(4))
def test_any_history_equals_a_full_pass(
    model: LanguageModel, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Rows that rest, go, come back, and outgrow the buffers."""
    monkeypatch.setattr(decode_graphs, "SLOTS", 16)
    draw = random.Random(seed)
    stage, again = StagePass(model, runtime), Again()
    graphs = DecodeGraphs(stage, record=again)
    session = KVSession(stage)
    rows = [[draw.randrange(25) for _ in range(draw.randint(1, 30))] for _ in range(draw.choice([3, 4, 5]))]
    session.open(len(rows))
    session.feed(rows)
    for _ in range(3):
        decoding = graphs.decoding(session, more=9)
        assert session.rows == 0
        for _ in range(8):
            new = [[draw.randrange(25)] if draw.random() < 0.7 else [] for _ in rows]
            new[0] = [7]
            hidden, begins = decoding.feed(new)
            assert hidden.shape[0] == sum(map(len, new))
            for number, tokens in enumerate(new):
                if tokens:
                    rows[number] = rows[number] + tokens
                    exact = hidden_of(model, rows[number])[-1]
                    torch.testing.assert_close(hidden[begins[number]], exact, atol=2e-5, rtol=1e-5)
            if len(rows) > 2 and draw.random() < 0.3:
                kept = draw.sample(range(len(rows)), len(rows) - 1)
                decoding.select(kept)
                rows = [rows[row] for row in kept]
        decoding.close()
        assert session.lengths == [len(row) for row in rows]
        more = [[draw.randrange(25) for _ in range(3)] for _ in rows]
        hidden, begins = session.feed(more)
        rows = [row + tokens for row, tokens in zip(rows, more, strict=True)]
        for number, row in enumerate(rows):
            torch.testing.assert_close(hidden[begins[number] + 2], hidden_of(model, row)[-1], atol=2e-5, rtol=1e-5)
    assert again.recorded < again.replayed


@pytest.mark.parametrize("draws", [True, False], ids=["choices recorded, too", "passes alone"])
def test_transcripts_and_completions_are_those_without(
    toy: Toy, model: LanguageModel, runtime: Runtime, draws: bool
) -> None:
    """Sampled from several sets of tokens, the most probable ones, and from nuclei, some of which are not recorded."""

    def sampled(recorder: Again | None) -> tuple[list[list[int]], list[Completion]]:
        engine = MegatronEngine(model, runtime, toy.latents, toy.tokenizer.vocab_size, temperature=0.8)
        if recorder is not None:
            engine.graphs = DecodeGraphs(engine.stage, engine.choose if draws else None, recorder)
        sampler = LatentSampler(engine, toy.latents, toy.tokenizer, 128, 16)
        documents = [toy.document(code, f"document {n}") for n, code in enumerate(CODE)]
        jobs = [Job(document, (n, g)) for n, document in enumerate(documents) for g in range(6)]
        transcripts = [transcript.ids.tolist() for transcript in sampler.sample(jobs)]
        draw = np.random.default_rng(2)
        sets = (toy.latents.universe, toy.latents.thought_set)
        requests = [
            GenerateRequest([toy.tokenizer.bos, *range(3, 3 + n)], draw.random(5 + n), allowed=sets[n % 2])
            for n in range(5)
        ]
        found = engine.generate(requests)
        found += engine.generate([replace(request, greedy=n == 1) for n, request in enumerate(requests)])
        found += engine.generate([replace(request, top_p=0.7) for request in requests])
        return transcripts, found

    again = Again()
    plain, recorded = sampled(None), sampled(again)
    assert recorded[0] == plain[0]
    for one, other in zip(recorded[1], plain[1], strict=True):
        assert one.ids == other.ids and one.finish == other.finish
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=2e-5)
    assert again.recorded and again.replayed


def test_what_drops_a_graph(model: LanguageModel, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger buffers, weights at another place; new values at the same place do not. The oldest goes for a new one."""
    monkeypatch.setattr(decode_graphs, "SLOTS", 16)
    stage, again = StagePass(model, runtime), Again()
    graphs = DecodeGraphs(stage, record=again)

    def decode(rows: int, length: int) -> Tensor:
        session = KVSession(stage)
        session.open(rows)
        session.feed([[3] * length for _ in range(rows)])
        decoding = graphs.decoding(session, more=2)
        hidden, _ = decoding.feed([[4]] * rows)
        hidden = hidden.clone()
        decoding.close()
        torch.testing.assert_close(hidden[0], hidden_of(model, [3] * length + [4])[-1], atol=2e-5, rtol=1e-5)
        return hidden

    first = decode(4, 20)
    decode(3, 20)
    assert graphs.recorded == [(4, 32)] and again.recorded == 1
    decode(2, 5)
    assert graphs.recorded == [(4, 32), (2, 16)]
    weight = model.decoder.layers[0].mlp.linear_fc1.weight
    with torch.no_grad():
        weight.mul_(1.5)
    assert not torch.equal(decode(4, 20), first) and again.recorded == 2
    weight.data = weight.data.clone()
    decode(4, 20)
    assert graphs.recorded == [(4, 32)] and again.recorded == 3
    decode(5, 20)
    assert graphs.recorded == [(8, 32)]
    monkeypatch.setattr(decode_graphs, "GRAPHS", 2)
    decode(1, 5)
    decode(2, 5)
    assert graphs.recorded == [(1, 16), (2, 16)]


def test_what_a_diverged_model_left_is_not_attended_to(model: LanguageModel, runtime: Runtime) -> None:
    """NaN in slots behind a row would spoil it, mask or not."""
    stage = StagePass(model, runtime)
    graphs = DecodeGraphs(stage, record=Again())

    def decode(length: int) -> Tensor:
        session = KVSession(stage)
        session.open(2)
        session.feed([[3] * length, [4] * length])
        return graphs.decoding(session, more=2).feed([[5], [6]])[0].clone()

    weight = model.decoder.layers[0].self_attention.linear_qkv.weight
    good = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    assert decode(20).isnan().any()
    with torch.no_grad():
        weight.copy_(good)
    torch.testing.assert_close(decode(8)[0], hidden_of(model, [3] * 8 + [5])[-1], atol=2e-5, rtol=1e-5)
    assert len(graphs.recorded) == 1, "the buffers are the same ones"


def test_what_is_no_decoding(model: LanguageModel, runtime: Runtime) -> None:
    stage = StagePass(model, runtime)
    session = KVSession(stage)
    session.open(2)
    session.feed([[1, 2], [3]])
    decoding = DecodeGraphs(stage, record=Again()).decoding(session, 3)
    with pytest.raises(ValueError, match="one token a pass"):
        decoding.feed([[1, 2], []])
    with pytest.raises(ValueError, match="kept once"):
        decoding.select([0, 0])


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"parallel": {"tensor": 2}}, "rollout.cuda_graphs=true does not go with parallel.tensor=2"),
        ({"parallel": {"pipeline": 2}}, "rollout.cuda_graphs=true does not go with parallel.pipeline=2"),
        ({"model": {"num_experts": 4}}, "rollout.cuda_graphs=true does not go with model.num_experts=4"),
        ({"parallel": OVERLAPPED}, "rollout.cuda_graphs=true does not go with parallel.overlap_param_gather=true"),
        ({"rollout": {"engine": "vllm"}}, "cuda_graphs=true is not read with rollout.engine=vllm"),
    ],
)
def test_refused_by_name(keys: dict[str, dict[str, object]], line: str) -> None:
    given = {**keys, "rollout": {**keys.get("rollout", {}), "cuda_graphs": True}}
    with pytest.raises(ValueError, match=line):
        RunConfig.model_validate(given)


def test_a_cpu_has_none() -> None:
    require_cuda_graphs(RolloutConfig(), torch.device("cpu"))
    require_cuda_graphs(RolloutConfig(cuda_graphs=True), torch.device("cuda"))
    with pytest.raises(UserError, match="cuda_graphs=true: needs an NVIDIA GPU"):
        require_cuda_graphs(RolloutConfig(cuda_graphs=True), torch.device("cpu"))


@pytest.mark.gpu
def test_on_a_gpu_graphs_sample_what_the_plain_path_samples(toy: Toy, model: LanguageModel, runtime: Runtime) -> None:
    draw = np.random.default_rng(2)
    requests = [GenerateRequest([toy.tokenizer.bos, *range(3, 3 + n)], draw.random(20)) for n in range(5)]
    plain = MegatronEngine(model, runtime, toy.latents, toy.tokenizer.vocab_size).generate(requests)
    engine = MegatronEngine(model, runtime, toy.latents, toy.tokenizer.vocab_size, cuda_graphs=True)
    for _ in range(2):
        found = engine.generate(requests)
        assert [each.ids for each in found] == [each.ids for each in plain]
    assert engine.graphs is not None and engine.graphs.recorded
