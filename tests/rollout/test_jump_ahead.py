"""Jump-ahead and naive sampling draw the same transcripts, whatever the batches, their order and the look-ahead."""

import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from engines import ENGINES, Maker, megatron
from toy import FORMATS, LARGE, Toy

from ra3_megatron.mcore.model import LanguageModel
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rollout import latent_sampler
from ra3_megatron.rollout.latent_sampler import Job, LatentSampler
from ra3_megatron.rollout.megatron_engine import MegatronEngine
from ra3_megatron.rollout.protocol import LatentCompletion, LatentRequest
from ra3_megatron.text.latents import Document
from ra3_megatron.text.transcript import Transcript

LEANS = {"never": -30.0, "seldom": -1.5, "often": 2.0, "always": 30.0}
TEMPERATURE = 0.9
LINES = ("a = b\n", "  ab(c):\n", "   b\n\n", "c\n", "\tdd\n", " d(a)\n  \n", "ab=ab\n", "    b(a):\n")


@pytest.fixture(scope="module", params=FORMATS)
def toy(request: pytest.FixtureRequest, runtime: Runtime) -> Toy:
    return Toy(runtime, request.param, LARGE, max_latent_tokens=4)


@pytest.fixture(params=sorted(ENGINES))
def make(request: pytest.FixtureRequest) -> Maker:
    return ENGINES[request.param]


def documents(toy: Toy, count: int) -> list[Document]:
    generator = random.Random(5)
    return [
        toy.document("".join(["b\n", *generator.choices(LINES, k=generator.randint(0, 7))]), f"document {n}")
        for n in range(count)
    ]


def jobs_of(toy: Toy) -> list[Job]:
    return [Job(document, (11, d, g)) for d, document in enumerate(documents(toy, 5)) for g in range(4)]


def sample(
    toy: Toy, model: LanguageModel, jobs: list[Job], make: Maker = megatron, **settings: object
) -> list[Transcript]:
    engine = make(toy, model, TEMPERATURE).engine
    options = {"max_tokens": 96, "batch_size": 8} | settings
    return LatentSampler(engine, toy.latents, toy.tokenizer, **options).sample(jobs)  # type: ignore[arg-type]


def assert_same(one: list[Transcript], other: list[Transcript]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a == b and a.document == b.document
        assert a.log_probs is not None and b.log_probs is not None
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=2e-5)


@pytest.mark.parametrize("keep", [True, False], ids=["all latents", "latent in force"])
@pytest.mark.parametrize("lean", LEANS.values(), ids=LEANS.keys())
def test_jump_ahead_is_naive(toy: Toy, make: Maker, lean: float, keep: bool) -> None:
    """Every engine draws the transcripts that the first one draws line by line without a cache."""
    model, jobs = toy.model(seed=2, lean=lean), jobs_of(toy)
    expected = sample(toy, model, jobs, method="naive", naive_cache=False, keep_latents=keep)
    think = np.concatenate([t.think for t in expected])
    assert {-30.0: think.mean() == 0, 30.0: think.mean() > 0.4}.get(lean, 0.02 < think.mean() < 0.95)
    assert_same(sample(toy, model, jobs, make, method="naive", keep_latents=keep), expected)
    assert_same(sample(toy, model, jobs, make, keep_latents=keep), expected)


@pytest.mark.parametrize("look_ahead", [0.1, 1.0, 5.0, 1000.0])
def test_look_ahead_changes_nothing(toy: Toy, make: Maker, look_ahead: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, jobs = toy.model(seed=2, lean=1.0), jobs_of(toy)
    expected = sample(toy, model, jobs)
    monkeypatch.setattr(latent_sampler, "LOOK_AHEAD", look_ahead)
    assert_same(sample(toy, model, jobs, make), expected)


def test_sharing_the_first_pass_changes_nothing(toy: Toy) -> None:
    model, jobs = toy.model(seed=2, lean=1.0), jobs_of(toy)
    engine = MegatronEngine(model, toy.runtime, toy.latents, toy.tokenizer.vocab_size, 0.9, share_first_pass=False)
    alone = LatentSampler(engine, toy.latents, toy.tokenizer, max_tokens=96, batch_size=8).sample(jobs)
    assert_same(alone, sample(toy, model, jobs))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_and_their_order_change_nothing(toy: Toy, make: Maker, batch_size: int) -> None:
    model, jobs = toy.model(seed=2, lean=1.0), jobs_of(toy)
    expected = sample(toy, model, jobs)
    order = random.Random(1).sample(range(len(jobs)), len(jobs))
    shuffled = sample(toy, model, [jobs[i] for i in order], make, batch_size=batch_size)
    assert_same([shuffled[order.index(i)] for i in range(len(jobs))], expected)


def test_the_key_decides_the_transcript(toy: Toy, make: Maker) -> None:
    model, document = toy.model(seed=2, lean=2.0), documents(toy, 3)[-1]
    same = sample(toy, model, [Job(document, (3, 1)), Job(document, (3, 1))], make)
    assert same[0] == same[1]
    others = sample(toy, model, [Job(document, (3, n)) for n in range(20)], make)
    assert len({tuple(t.ids.tolist()) for t in others}) > 10


def test_one_engine_serves_one_batch_after_another(toy: Toy, make: Maker) -> None:
    """Caches of a batch, and of weights that are gone, are never taken for the next one's."""
    jobs = jobs_of(toy)
    model, other = toy.model(seed=2, lean=1.0), toy.model(seed=4, lean=1.0)
    expected = sample(toy, model, jobs), sample(toy, other, jobs)
    candidate = make(toy, model, TEMPERATURE)
    sampler = LatentSampler(candidate.engine, toy.latents, toy.tokenizer, max_tokens=96, batch_size=8)
    assert_same(sampler.sample(jobs), expected[0])
    assert_same(sampler.sample(jobs[::-1]), expected[0][::-1])
    candidate.publish(other, version=9)
    after = sampler.sample(jobs)
    assert_same(after, expected[1])
    assert {t.weight_version for t in after} == {9}


@pytest.mark.parametrize("method", ["jump_ahead", "naive"])
def test_what_is_done_makes_place(toy: Toy, make: Maker, method: str) -> None:
    """Rounds are never larger than a batch, the transcripts of a document begin together, and a place is not left
    empty while a whole document could begin."""
    model, jobs = toy.model(seed=2, lean=1.0), jobs_of(toy)
    engine = make(toy, model, TEMPERATURE).engine
    rounds: list[list[int]] = []
    advance = engine.advance

    def recorded(requests: Sequence[LatentRequest]) -> list[LatentCompletion]:
        rounds.append([request.key for request in requests])
        return advance(requests)

    engine.advance = recorded  # type: ignore[method-assign]
    size, group = 9, 4
    LatentSampler(engine, toy.latents, toy.tokenizer, max_tokens=96, batch_size=size, method=method).sample(jobs)  # type: ignore[arg-type]
    begun: dict[int, int] = {}
    for number, keys in enumerate(rounds):
        assert len(keys) <= size
        assert len(keys) > size - group or len(begun.keys() | set(keys)) == len(jobs)
        for key in keys:
            begun.setdefault(key, number)
    assert len(begun) == len(jobs)
    for first in range(0, len(jobs), group):
        times = [begun[key] for key in range(first, first + group)]
        alone = all(begun[key] == min(times) for key in rounds[min(times)])
        assert len(set(times)) == 1 or alone  # where nothing else went on, every place was taken
    assert any(set(before) & set(after) and set(after) - set(before) for before, after in pairwise(rounds))
