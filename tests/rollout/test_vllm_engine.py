"""What VllmEngine adds to the contract: prefix caching, versions that are checked, a router in front."""

import numpy as np
import pytest
from toy import LARGE, Toy
from vllm_processes import client_for, publish

from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rollout.latent_sampler import Job, LatentSampler
from ra3_megatron.rollout.megatron_engine import MegatronEngine
from ra3_megatron.rollout.protocol import GenerateRequest, RolloutEngine
from ra3_megatron.rollout.router import Router
from ra3_megatron.rollout.vllm.engine import VllmEngine
from ra3_megatron.rollout.vllm.process import EngineError
from ra3_megatron.text.transcript import Transcript

LINES = ("a = b\n", "  ab(c):\n", "   b\n\n", "c\n", " d(a)\n  \n", "ab=ab\n", "    b(a):\n")


@pytest.fixture(scope="module")
def toy(runtime: Runtime) -> Toy:
    return Toy(runtime, "comment", LARGE, max_latent_tokens=4)


def jobs_of(toy: Toy) -> list[Job]:
    """Documents of several blocks of the prefix cache."""
    generator = np.random.default_rng(4)
    codes = ["b\n" + "".join(generator.choice(LINES, size=10)) for _ in range(3)]
    documents = [toy.document(code, f"document {n}") for n, code in enumerate(codes)]
    return [Job(document, (2, n, g)) for n, document in enumerate(documents) for g in range(3)]


def sample(toy: Toy, engine: RolloutEngine, jobs: list[Job]) -> list[Transcript]:
    return LatentSampler(engine, toy.latents, toy.tokenizer, max_tokens=128, batch_size=8).sample(jobs)


def assert_same(one: list[Transcript], other: list[Transcript]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a == b and a.weight_version == b.weight_version
        assert a.log_probs is not None and b.log_probs is not None
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=2e-5)


@pytest.mark.extended
def test_prefix_caching_changes_nothing(toy: Toy) -> None:
    jobs = jobs_of(toy)
    cached = VllmEngine(client_for(toy), toy.latents, 0.9)
    plain = VllmEngine(client_for(toy, prefix_caching=False), toy.latents, 0.9)
    for seed in (2, 3):  # the second time, the cache holds what the first weights said
        model = toy.model(seed, lean=0.5)
        reference = MegatronEngine(model, toy.runtime, toy.latents, toy.tokenizer.vocab_size, 0.9)
        reference.weight_version = seed
        publish(cached, model, toy.architecture, seed)
        publish(plain, model, toy.architecture, seed)
        expected = sample(toy, reference, jobs)
        assert min(t.num_tokens for t in expected) > 33
        assert_same(sample(toy, cached, jobs), expected)
        assert_same(sample(toy, plain, jobs), expected)


def test_replicas_behind_a_router_sample_what_one_does(toy: Toy) -> None:
    jobs, model = jobs_of(toy), toy.model(2, lean=0.5)
    reference = MegatronEngine(model, toy.runtime, toy.latents, toy.tokenizer.vocab_size, 0.9)
    replicas = [VllmEngine(client_for(toy, **changes), toy.latents, 0.9) for changes in ({}, {"prefix_caching": False})]
    for replica in replicas:
        publish(replica, model, toy.architecture, 0)
    assert_same(sample(toy, Router(replicas), jobs), sample(toy, reference, jobs))


def test_other_weights_than_the_trainer_expects_are_refused(toy: Toy) -> None:
    engine = VllmEngine(client_for(toy), toy.latents)
    publish(engine, toy.model(), toy.architecture, 4)
    engine.check()
    engine.weight_version = 5
    with pytest.raises(EngineError, match="holds weight version 4, not 5"):
        engine.check()
    with pytest.raises(EngineError, match="holds weight version 4, not 5"):
        engine.generate([GenerateRequest([0], np.zeros(2))])
