"""Transcripts for one update after another: of which weights they are, and that a checkpoint keeps what was sampled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from toy import LARGE, Toy

from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.runtime import RolloutConfig
from ra3_megatron.config.training import EStepConfig
from ra3_megatron.corpus.sampler import DocumentSampler
from ra3_megatron.em.policy import LatentPolicy, latent_policy
from ra3_megatron.em.rollouts import RolloutQueue, pack, unpack
from ra3_megatron.mcore.model import LanguageModel
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rollout.latent_sampler import Job
from ra3_megatron.rollout.sampling import LiveSampling, Wait
from ra3_megatron.text.latents import raw
from ra3_megatron.text.transcript import Transcript

STEPS = 4
CODES = ("a = b\nab(c)\n", "c = d\n  ab(d)\n", "b = a\n", "d = ab\n  c\n", "ab(b)\nc = a\n")
KEY = (5, 7)


class AtOnce(LiveSampling):
    """What is asked for in the background is sampled with the weights of that moment."""

    def start(self, jobs: Mapping[int, list[Job]], background: bool = False) -> Wait:
        return super().start(jobs)


@pytest.fixture(scope="module")
def toy(runtime: Runtime) -> Toy:
    return Toy(runtime, "comment", LARGE, max_latent_tokens=3)


class Phase:
    """An E-step's rollouts with a model whose weights become others at every step."""

    def __init__(self, toy: Toy, staleness: int) -> None:
        rollout = RolloutConfig(engine="vllm", max_staleness=staleness)
        settings = EStepConfig(steps=STEPS, documents_per_step=2, group_size=3, importance_cap=2.0)
        self.toy = toy
        self.config: RunConfig = toy.config(estep=settings, rollout=rollout)
        self.model: LanguageModel = toy.model(seed=0, lean=1.0)
        self.documents = [raw(toy.document(code), toy.latents, toy.tokenizer) for code in CODES]
        sampling = AtOnce(self.model, toy.runtime, toy.latents, toy.tokenizer, rollout, 64)
        self.policy = LatentPolicy(sampling, toy.runtime, self.config, toy.latents, toy.tokenizer)
        sampler = DocumentSampler(len(self.documents), seed=3)
        self.queue = RolloutQueue(self.policy, self.documents, sampler, KEY, self.config)

    def learn(self, step: int) -> None:
        """The weights that update `step` starts from."""
        self.model.load_state_dict(self.toy.model(seed=step, lean=1.0).state_dict())

    def steps(self, first: int, last: int) -> list[tuple[list[Transcript], dict[str, float]]]:
        taken = []
        for step in range(first, last):
            self.learn(step)
            taken.append(self.queue.next(step))
        return taken

    def expected(self, step: int, weights: int) -> list[Transcript]:
        """What a policy with the weights of another step samples for this one."""
        self.learn(weights)
        sampler = DocumentSampler(len(self.documents), seed=3)
        numbers = [sampler.next(2) for _ in range(step + 1)][-1]
        keys = [(*KEY, step, place) for place in range(2)]
        return self.policy.sample([self.documents[n] for n in numbers], keys, 3)


def same(one: list[Transcript], other: list[Transcript]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a == b and np.array_equal(a.log_probs, b.log_probs) for a, b in pairs)  # type: ignore[arg-type]


@pytest.mark.parametrize("staleness", [0, 1])
def test_transcripts_are_of_these_weights_or_of_those_one_update_ago(toy: Toy, staleness: int) -> None:
    taken = Phase(toy, staleness).steps(0, STEPS)
    again = Phase(toy, staleness)
    for step, (transcripts, metrics) in enumerate(taken):
        version = max(step - staleness, 0)
        assert {t.weight_version for t in transcripts} == {version}
        assert metrics["staleness"] == step - version
        assert same(transcripts, again.expected(step, version))
        others = [again.expected(step, weights) for weights in range(STEPS) if weights != version]
        assert not any(same(transcripts, other) for other in others), "the weights matter"


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("done", [1, 3])
def test_a_resumed_phase_trains_on_the_same_transcripts(toy: Toy, staleness: int, done: int) -> None:
    whole = Phase(toy, staleness).steps(0, STEPS)
    begun = Phase(toy, staleness)
    begun.steps(0, done)
    state: dict[str, Any] = json.loads(json.dumps(begun.queue.state_dict()))
    assert (state["pending"] is not None) == (staleness == 1)
    rest = begun.steps(done, STEPS)  # asking for the state changes nothing
    resumed = Phase(toy, staleness)
    resumed.queue.load_state_dict(state)
    for continued in (rest, resumed.steps(done, STEPS)):
        for (one, metrics), (other, wanted) in zip(continued, whole[done:], strict=True):
            assert same(one, other) and metrics["staleness"] == wanted["staleness"]


def test_what_is_packed_comes_back_whole(toy: Toy) -> None:
    transcripts = Phase(toy, 0).expected(0, 2)
    back = unpack(json.loads(json.dumps(pack(transcripts))))
    assert same(back, transcripts) and any(t.think.any() for t in transcripts)
    for one, other in zip(back, transcripts, strict=True):
        assert (one.document, one.weight_version) == (other.document, other.weight_version)
        for name in ("ids", "roles", "lines", "offered", "log_probs"):
            assert getattr(one, name).dtype == getattr(other, name).dtype


def test_nothing_is_sampled_behind_the_last_update(toy: Toy) -> None:
    phase = Phase(toy, 1)
    phase.steps(0, STEPS)
    assert phase.queue.state_dict()["pending"] is None


def test_the_live_model_is_never_sampled_in_the_background(toy: Toy) -> None:
    sampling = LiveSampling(toy.model(seed=0), toy.runtime, toy.latents, toy.tokenizer, RolloutConfig(), 64)
    with pytest.raises(ValueError, match="at the same time"):
        sampling.start({}, background=True)


class Recorded:
    """Engines that only note which versions they were given."""

    def __init__(self) -> None:
        self.published: list[int] = []
        self.weight_version = 0

    def sampling(self, model: Any) -> Recorded:
        return self

    def publish(self, version: int) -> dict[str, float]:
        self.published.append(version)
        return {}


def test_a_model_that_is_still_to_be_loaded_is_not_published(toy: Toy) -> None:
    for version, published in ((None, []), (3, [3])):
        engines: Any = Recorded()
        latent_policy(toy.model(), toy.config(), toy.runtime, toy.latents, toy.tokenizer, version, engines)
        assert engines.published == published
