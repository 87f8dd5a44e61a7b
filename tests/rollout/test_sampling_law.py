"""The law of the jump-ahead sampler is that of method.md: against the enumeration of every transcript of a document."""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import FORMATS, SMALL, Toy, log_probs_of

from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rollout.latent_sampler import Job, LatentSampler
from ra3_megatron.rollout.megatron_engine import MegatronEngine
from ra3_megatron.text.transcript import Transcript

SAMPLES = 6000
CODE = {"comment": "a):\n   b\nba\n\n", "tokens": "a):\n   b\n"}
TABLE = {"comment": SMALL, "tokens": SMALL[:3] + SMALL[5:9]}


@dataclass
class Experiment:
    """Every transcript of a document with its exact log-probability, and transcripts that were sampled of it."""

    toy: Toy
    every: list[Transcript]
    log_law: Tensor
    sampled: list[Transcript]

    @property
    def seen(self) -> Counter[tuple[int, ...]]:
        return Counter(tuple(t.ids.tolist()) for t in self.sampled)


@pytest.fixture(scope="module", params=[(f, t) for f in FORMATS for t in (1.0, 0.6)], ids=lambda p: f"{p[0]}-{p[1]}")
def experiment(request: pytest.FixtureRequest, runtime: Runtime) -> Experiment:
    name, temperature = request.param
    toy = Toy(runtime, name, TABLE[name], max_latent_tokens=2)
    model = toy.model(seed=3, lean=1.5)
    document = toy.document(CODE[name])
    every = list(toy.transcripts(document))
    engine = MegatronEngine(model, runtime, toy.latents, toy.tokenizer.vocab_size, temperature)
    sampler = LatentSampler(engine, toy.latents, toy.tokenizer, max_tokens=64, batch_size=1000)
    sampled = sampler.sample([Job(document, (7, number)) for number in range(SAMPLES)])
    return Experiment(toy, every, log_probs_of(toy, model, every, temperature), sampled)


def test_the_enumeration_is_a_law(experiment: Experiment) -> None:
    assert len({tuple(t.ids.tolist()) for t in experiment.every}) == len(experiment.every) > 1000
    assert float(experiment.log_law.exp().sum()) == pytest.approx(1.0, abs=1e-9)
    toy = experiment.toy
    longest = [
        ids
        for transcript in experiment.every
        for line in np.flatnonzero(transcript.think)
        if len(ids := toy.thought_ids(transcript, int(line))) == toy.latents.max_thought_ids
    ]
    assert {toy.latents.ends_thought(ids[-1]) for ids in longest} == {True, False}, "thoughts that end, and cut ones"


def test_behaviour_log_probabilities_are_those_of_the_law(experiment: Experiment) -> None:
    law = {tuple(t.ids.tolist()): float(p) for t, p in zip(experiment.every, experiment.log_law, strict=True)}
    for transcript in experiment.sampled:
        assert transcript.log_probs is not None
        exact = law[tuple(transcript.ids.tolist())]  # KeyError: a transcript that cannot be
        assert float(transcript.log_probs.sum(dtype=np.float64)) == pytest.approx(exact, abs=1e-5)


def test_transcripts_come_as_often_as_the_law_says(experiment: Experiment) -> None:
    seen = experiment.seen
    observed = torch.tensor([seen[tuple(t.ids.tolist())] for t in experiment.every], dtype=torch.float64)
    assert p_value(observed, experiment.log_law.exp() * SAMPLES) > 1e-3


def test_decisions_come_as_often_as_the_law_says(experiment: Experiment) -> None:
    """Each pattern of decisions over the lines, thoughts summed out."""
    expected: Counter[tuple[bool, ...]] = Counter()
    for transcript, log_p in zip(experiment.every, experiment.log_law, strict=True):
        expected[tuple(transcript.think.tolist())] += float(log_p.exp()) * SAMPLES  # type: ignore[assignment]
    observed = Counter(tuple(t.think.tolist()) for t in experiment.sampled)
    assert len(expected) == 2 ** experiment.every[0].num_lines
    patterns = sorted(expected)
    counts = torch.tensor([observed[p] for p in patterns], dtype=torch.float64)
    assert p_value(counts, torch.tensor([expected[p] for p in patterns], dtype=torch.float64)) > 1e-3
    rates = torch.stack([torch.tensor(t.think) for t in experiment.sampled]).double().mean(0)
    assert bool(((rates > 0.05) & (rates < 0.95)).all()), "the model decides nothing: the test would show nothing"


def test_the_chi_square_sees_a_wrong_law(experiment: Experiment) -> None:
    seen = experiment.seen
    observed = torch.tensor([seen[tuple(t.ids.tolist())] for t in experiment.every], dtype=torch.float64)
    flatter = (experiment.log_law * 0.9).softmax(0)
    assert p_value(observed, flatter * SAMPLES) < 1e-6


def p_value(observed: Tensor, expected: Tensor) -> float:
    """Pearson's test; outcomes expected less than 5 times are counted as one."""
    rare = expected < 5
    if bool(rare.any()):
        observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    assert float(observed.sum()) == SAMPLES and math.isclose(float(expected.sum()), SAMPLES, rel_tol=1e-6)
    statistic = ((observed - expected).square() / expected).sum()
    freedom = torch.tensor((len(observed) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))
