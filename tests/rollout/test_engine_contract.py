"""What protocol.py promises of every engine, against plain forward passes over whole sequences."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engines import ENGINES, Candidate, Maker
from toy import FORMATS, LARGE, Toy

from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rollout.pieces import complete
from ra3_megatron.rollout.protocol import Finish, GenerateRequest, LatentCompletion, LatentRequest, PlannedLine
from ra3_megatron.text.latents import Document

TEMPERATURE = 0.7
PROMPTS = ([0], [0, 7, 9, 2], [0, 3, 3, 8, 16, 2, 4, 9, 9, 12], [0, 5])


@pytest.fixture(scope="module", params=FORMATS)
def toy(request: pytest.FixtureRequest, runtime: Runtime) -> Toy:
    return Toy(runtime, request.param, LARGE, max_latent_tokens=3)


@pytest.fixture(params=sorted(ENGINES))
def make(request: pytest.FixtureRequest) -> Maker:
    return ENGINES[request.param]


@pytest.fixture
def candidate(make: Maker, toy: Toy) -> Candidate:
    return make(toy, toy.model(seed=6, lean=1.0), TEMPERATURE)


def log_probs(toy: Toy, candidate: Candidate, ids: list[int], allowed: int = 0) -> torch.Tensor:
    """log q(v | ids[:j + 1], v allowed), fp64 [len(ids), vocab]."""
    with torch.no_grad():
        logits = toy.full_logits(candidate.model, [ids])[0] / TEMPERATURE
    return logits.masked_fill(~torch.as_tensor(toy.latents.sets[allowed]), -torch.inf).log_softmax(-1)


def requests(length: int = 12, **changes: Any) -> list[GenerateRequest]:
    generator = np.random.default_rng(3)
    return [GenerateRequest(prompt, generator.random(length), **changes) for prompt in PROMPTS]


# -- generate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [0, 1])
@pytest.mark.parametrize("greedy", [True, False])
def test_generate_is_what_full_passes_say(toy: Toy, candidate: Candidate, allowed: int, greedy: bool) -> None:
    asked = requests(allowed=allowed, greedy=greedy)
    for request, completion in zip(asked, candidate.engine.generate(asked), strict=True):
        assert len(completion.ids) == len(completion.log_probs) == len(request.uniforms)
        assert completion.finish is Finish.LENGTH
        prompt = list(request.prompt)
        exact = log_probs(toy, candidate, prompt + completion.ids, allowed)[len(prompt) - 1 : -1]
        for log_p, token, value, uniform in zip(
            exact, completion.ids, completion.log_probs, request.uniforms, strict=True
        ):
            cumulative = log_p.exp().cumsum(0)
            by_hand = int(log_p.argmax()) if greedy else int((cumulative > uniform).nonzero()[0])
            assert token == by_hand
            assert value == pytest.approx(float(log_p[token]), abs=1e-5)
            assert toy.latents.sets[allowed, token]


def test_generate_stops_at_the_first_stop_token(candidate: Candidate) -> None:
    free = candidate.engine.generate(requests(40))
    stop = frozenset({2, 9, 14})
    stopped = candidate.engine.generate(requests(40, stop=stop))
    assert any(c.finish is Finish.END for c in stopped)
    for before, after in zip(free, stopped, strict=True):
        ends = [n for n, token in enumerate(before.ids) if token in stop]
        length = ends[0] + 1 if ends else 40
        assert after.ids == before.ids[:length]
        assert after.finish is (Finish.END if ends else Finish.LENGTH)


@pytest.mark.parametrize("batch_size", [2, 100])
def test_a_continuation_in_pieces_is_that_of_one_request(candidate: Candidate, batch_size: int) -> None:
    """With ends of their own, at different lengths, and with ends that the caller sees in what was sampled."""
    asked = [
        *requests(70, stop=frozenset({2})),
        *requests(33),
        *requests(65, allowed=1),
        GenerateRequest([0], np.zeros(0)),
    ]
    whole = candidate.engine.generate(asked)
    candidate.engine.forget()

    def until(number: int, ids: list[int], seen: int) -> int | None:
        return ids.index(9, seen) + 1 if 9 in ids[seen:] else None

    for end in (lambda number, ids, seen: None, until):
        found = dict(complete(candidate.engine, asked, batch_size, end))
        assert sorted(found) == list(range(len(asked)))
        for number, one in enumerate(whole):
            kept = end(number, one.ids, 0)
            assert found[number].ids == one.ids[:kept]
            assert found[number].finish is (one.finish if kept is None else Finish.END)
            np.testing.assert_allclose(found[number].log_probs, one.log_probs[:kept], atol=1e-5)
    assert any(9 in one.ids for one in whole) and any(one.finish is Finish.END for one in whole)


@pytest.mark.parametrize("allowed", [0, 1])
def test_top_p_samples_the_most_probable_tokens_alone(toy: Toy, candidate: Candidate, allowed: int) -> None:
    asked = [replace(request, top_p=0.3 + 0.2 * n) for n, request in enumerate(requests(40, allowed=allowed))]
    fewer = 0
    for request, completion in zip(asked, candidate.engine.generate(asked), strict=True):
        prompt = list(request.prompt)
        exact = log_probs(toy, candidate, prompt + completion.ids, allowed)[len(prompt) - 1 : -1]
        for log_p, token, value, uniform in zip(
            exact, completion.ids, completion.log_probs, request.uniforms, strict=True
        ):
            left, mass = set(), 0.0
            for index in log_p.argsort(descending=True).tolist():
                if mass >= request.top_p:
                    break
                left.add(index)
                mass += float(log_p[index].exp())
            cumulative = torch.where(torch.tensor([i in left for i in range(len(log_p))]), log_p.exp(), 0.0).cumsum(0)
            assert token == int((cumulative > uniform * cumulative[-1]).nonzero()[0])
            assert value == pytest.approx(float(log_p[token]), abs=1e-5)
            fewer += token != int((log_p.exp().cumsum(0) > uniform).nonzero()[0])
    assert fewer > 20


def test_generate_gives_nothing_when_nothing_is_asked_for(candidate: Candidate) -> None:
    asked = [*requests(3), GenerateRequest([0, 7], np.zeros(0)), *requests(5)]
    completions = candidate.engine.generate(asked)
    assert [len(c.ids) for c in completions] == [3] * 4 + [0] + [5] * 4
    assert candidate.engine.generate([]) == []


@pytest.mark.parametrize("uniform", [0.0, np.nextafter(1.0, 0.0)])
def test_extreme_uniforms_give_allowed_tokens(toy: Toy, candidate: Candidate, uniform: float) -> None:
    members = np.flatnonzero(toy.latents.sets[1])
    asked = [GenerateRequest([0, a, b], np.full(4, uniform), allowed=1) for a in range(2, 20) for b in range(2, 20)]
    expected = int(members[0] if uniform == 0 else members[-1])
    for completion in candidate.engine.generate(asked):
        assert completion.ids == [expected] * 4


def test_a_result_depends_on_its_request_alone(candidate: Candidate) -> None:
    asked = requests()
    together = candidate.engine.generate(asked)
    backwards = candidate.engine.generate(asked[::-1])[::-1]
    alone = [candidate.engine.generate([request])[0] for request in asked]
    for one, other, third in zip(together, backwards, alone, strict=True):
        assert one.ids == other.ids == third.ids
        np.testing.assert_allclose(one.log_probs, third.log_probs, atol=1e-5)
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


def test_new_weights_give_new_samples_and_a_new_version(toy: Toy, make: Maker, candidate: Candidate) -> None:
    candidate.publish(candidate.model, version=3)
    before = candidate.engine.generate(requests())
    candidate.publish(toy.model(seed=8), version=4)
    after = candidate.engine.generate(requests())
    assert {c.weight_version for c in before} == {3} and {c.weight_version for c in after} == {4}
    assert [c.ids for c in before] != [c.ids for c in after]
    fresh = make(toy, toy.model(seed=8), TEMPERATURE).engine.generate(requests())
    assert [c.ids for c in after] == [c.ids for c in fresh]


# -- advance ------------------------------------------------------------------------------------------------------

CODE = "a = b\n  ab(c):\n   b\n\nc\n"


def planned(toy: Toy, document: Document, offered: bool = True) -> list[PlannedLine]:
    latents = toy.latents
    return [
        PlannedLine(
            latents.before_decision(line)[0],
            latents.act(line)[0] + latents.action(line)[0],
            line.think_set,
            offered and line.may_think,
        )
        for line in document.lines
    ]


def think_probabilities(toy: Toy, candidate: Candidate, lines: list[PlannedLine]) -> list[float]:
    """P(think) of each line when none before it thought."""
    ids, found = [toy.tokenizer.bos], []
    places = []
    for line in lines:
        places.append(len(ids) + len(line.before))
        ids += [*line.before, *line.act]
    exact = log_probs(toy, candidate, ids, toy.latents.universe)
    for line, place in zip(lines, places, strict=True):
        start = torch.as_tensor(toy.latents.sets[line.think_set])
        found.append(float(exact[place - 1].exp()[start].sum()))
    return found


def advance(candidate: Candidate, lines: list[PlannedLine], uniforms: np.ndarray) -> LatentCompletion:
    candidate.engine.forget()
    return candidate.engine.advance([LatentRequest(1, [0], lines, uniforms)])[0]


def draws(toy: Toy, decisions: list[float]) -> np.ndarray:
    uniforms = np.full((len(decisions), 1 + toy.latents.max_thought_ids), 0.5)
    uniforms[:, 0] = decisions
    return uniforms


def test_advance_takes_the_first_line_whose_uniform_falls_below_its_probability(toy: Toy, candidate: Candidate) -> None:
    lines = planned(toy, toy.document(CODE))
    think = think_probabilities(toy, candidate, lines)
    assert all(0.001 < p < 0.999 for p in think)
    none = advance(candidate, lines, draws(toy, [p + 1e-4 for p in think]))
    assert none.thought_line is None and none.thought == [] and none.finish is Finish.ACT
    np.testing.assert_allclose(none.decision_log_probs, np.log1p(-np.array(think)), atol=1e-5)
    for first in range(len(lines)):
        decisions = [p + 1e-4 if t < first else p - 1e-4 for t, p in enumerate(think)]
        completion = advance(candidate, lines, draws(toy, decisions))
        assert completion.thought_line == first
        np.testing.assert_allclose(completion.decision_log_probs, np.log1p(-np.array(think[:first])), atol=1e-5)
        assert toy.latents.sets[lines[first].think_set, completion.thought[0]]


def test_a_thought_is_what_full_passes_say(toy: Toy, candidate: Candidate) -> None:
    lines = planned(toy, toy.document(CODE))
    generator = np.random.default_rng(2)
    finishes = set()
    for last in [None] * 30 + [0.9999] * 4:
        uniforms = generator.random((len(lines), 1 + toy.latents.max_thought_ids))
        if last is not None:
            uniforms[2, -1] = last  # the last token of the vocabulary that may come, which ends a thought
        uniforms[:, 0] = [0.999, 0.999, 0.0, 0.0]
        completion = advance(candidate, lines, uniforms)
        assert completion.thought_line == 2
        before = [0, *lines[0].before, *lines[0].act, *lines[1].before, *lines[1].act, *lines[2].before]
        for n, (token, value) in enumerate(zip(completion.thought, completion.thought_log_probs, strict=True)):
            among = toy.latents.thought_set if n else toy.latents.universe
            log_p = log_probs(toy, candidate, before, among)[-1]
            assert value == pytest.approx(float(log_p[token]), abs=1e-5)
            chosen = log_p if n else log_p.masked_fill(~torch.as_tensor(toy.latents.sets[lines[2].think_set]), -np.inf)
            cumulative = chosen.softmax(0).cumsum(0)
            assert token == int((cumulative > uniforms[2, 1 + n]).nonzero()[0])
            before.append(token)
        ended = bool(toy.latents.ends[completion.thought[-1]])
        assert completion.finish is (Finish.END if ended else Finish.LENGTH)
        assert ended or len(completion.thought) == toy.latents.max_thought_ids
        assert not toy.latents.ends[completion.thought[:-1]].any()
        finishes.add(completion.finish)
    assert finishes == {Finish.END, Finish.LENGTH}


def test_no_thought_where_none_is_offered(toy: Toy, candidate: Candidate) -> None:
    lines = planned(toy, toy.document(CODE), offered=False)
    completion = advance(candidate, lines, draws(toy, [0.0] * len(lines)))
    assert completion.thought_line is None
    assert completion.decision_log_probs == [0.0] * len(lines)


def test_decisions_that_are_taken_already_hold_however_improbable(toy: Toy, make: Maker) -> None:
    """log P(<act>) rounds to 0 in fp32 long before <think> becomes impossible."""
    sure = make(toy, toy.model(seed=8, lean=-60.0), TEMPERATURE)
    lines = planned(toy, toy.document(CODE))
    asked = [replace(line, think=number == 2) for number, line in enumerate(lines)]
    completion = advance(sure, asked, draws(toy, [0.5] * len(lines)))
    assert completion.decision_log_probs[0] > -1e-6 and completion.thought_line == 2
    assert toy.latents.sets[lines[2].think_set, completion.thought[0]] and completion.thought_log_probs[0] < -15
    none = advance(sure, [replace(line, think=False) for line in lines], draws(toy, [0.0] * len(lines)))
    assert none.thought_line is None
    unoffered = [replace(line, offered=False, think=True) for line in lines]
    assert advance(sure, unoffered, draws(toy, [0.0] * len(lines))).thought_line is None


def test_an_engine_may_be_asked_line_by_line(toy: Toy, candidate: Candidate) -> None:
    """Transcripts of one key, cached between calls, give what one call gives."""
    lines = planned(toy, toy.document(CODE))
    uniforms = draws(toy, [1.0] * len(lines))
    whole = advance(candidate, lines, uniforms).decision_log_probs
    candidate.engine.forget()
    context, found = [0], []
    for number, line in enumerate(lines):
        request = LatentRequest(5, list(context), [line], uniforms[number : number + 1])
        found += candidate.engine.advance([request])[0].decision_log_probs
        context += [*line.before, *line.act]
    np.testing.assert_allclose(found, whole, atol=1e-5)


def test_advance_stamps_its_version(toy: Toy, candidate: Candidate) -> None:
    lines = planned(toy, toy.document(CODE))
    candidate.publish(candidate.model, version=12)
    assert advance(candidate, lines, draws(toy, [1.0] * len(lines))).weight_version == 12
