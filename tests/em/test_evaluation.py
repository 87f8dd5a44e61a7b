"""Held-out figures recomputed from plain forward passes, and transcripts as records to read."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import FORMATS, LARGE, Toy

from ra3_megatron.config.training import EStepConfig
from ra3_megatron.em.evaluation import Evaluation, evaluate
from ra3_megatron.em.latent_stats import blank_tokens
from ra3_megatron.em.policy import latent_policy
from ra3_megatron.em.readable import transcript_records
from ra3_megatron.em.scoring import malformed_thoughts
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.text.latents import compose, raw
from ra3_megatron.text.transcript import Role, Transcript

CODES = ("a = b\n  ab(c):\n   b\n\nc\n", "b\n", "  a\nb = d\nc\n")


@pytest.fixture(scope="module", params=FORMATS)
def toy(request: pytest.FixtureRequest, runtime: Runtime) -> Toy:
    return Toy(runtime, request.param, LARGE, max_latent_tokens=2)


def documents(toy: Toy) -> list[Transcript]:
    return [raw(toy.document(code, f"held out {d}"), toy.latents, toy.tokenizer) for d, code in enumerate(CODES)]


def greedy(toy: Toy, transcript: Transcript, logits: Tensor) -> np.ndarray:
    """Whether each token is the likeliest one, among those that start no thought where it carries the decision."""
    found = np.zeros(transcript.num_tokens, dtype=bool)
    for position in range(1, transcript.num_tokens):
        token, x = int(transcript.ids[position]), logits[position - 1].clone()
        if toy.latents.name == "comment" and position in transcript.first_expert:
            starts = toy.rules(token)[0]
            if token not in starts:
                x[starts] = -torch.inf
        found[position] = token == int(x.argmax())
    return found


def test_figures_by_line_add_up_to_those_of_the_documents(toy: Toy) -> None:
    model = toy.model(seed=14, lean=1.0)
    config = toy.config(evaluation={"samples": 2})
    policy = latent_policy(model, config, toy.runtime, toy.latents, toy.tokenizer)
    found = evaluate(model, policy, documents(toy), [(0,), (1,), (2,)], config, blank_tokens(toy.tokenizer))
    rows = found.by_line(toy.tokenizer)
    assert [(row.document, row.sample) for row in rows] == [(f"held out {d}", s) for d in range(3) for s in range(2)]
    for row, transcript in zip(rows, found.transcripts, strict=True):
        assert "".join(line.text for line in row.lines) == CODES[int(row.document.split()[-1])]
        assert [line.thought is not None for line in row.lines] == transcript.think.tolist()
        visible = transcript.roles == Role.EXPERT
        assert [line.tokens for line in row.lines] == np.bincount(transcript.lines[visible]).tolist()
    code = sum(t.is_code.sum() for t in found.transcripts)
    nll = sum(line.nll + line.layout_nll for row in rows for line in row.lines)
    raw_nll = sum(line.raw_nll + line.raw_layout_nll for row in rows for line in row.lines)
    thought_nll = sum(line.thought_nll for row in rows for line in row.lines)
    thoughts = sum((t.roles == Role.THOUGHT).sum() for t in found.transcripts)
    assert nll / code == pytest.approx(found.figures["code_ce"], abs=1e-5)
    assert raw_nll / code == pytest.approx(found.figures["raw_code_ce"], abs=1e-5)
    assert thought_nll / thoughts == pytest.approx(found.figures["thought_ce"], abs=1e-5)
    for row, transcript, scores in zip(rows, found.transcripts, found.scores, strict=True):
        visible = transcript.roles == Role.EXPERT
        expected = [bool((scores.margins[visible & (transcript.lines == n)] == 0).all()) for n in range(len(row.lines))]
        assert [line.greedy for line in row.lines] == expected


@pytest.mark.parametrize("likelihood", ["mean", "sum"])
def test_figures_by_hand(toy: Toy, likelihood: Any) -> None:
    model = toy.model(seed=14, lean=1.0)
    estep = EStepConfig(latent_price=0.3, format_penalty=0.7, likelihood=likelihood)
    config = toy.config(estep=estep, evaluation={"samples": 5})
    policy = latent_policy(model, config, toy.runtime, toy.latents, toy.tokenizer)
    blank = blank_tokens(toy.tokenizer)
    keys = [(4, d) for d in range(len(CODES))]
    found = evaluate(model, policy, documents(toy), keys, config, blank)
    assert [t.document for t in found.transcripts] == [f"held out {d}" for d in range(3) for _ in range(5)]

    sums: dict[str, list[float]] = {"code": [], "thought": [], "raw": [], "reward": [], "bound": []}
    right: dict[str, list[bool]] = {"code": [], "raw": []}
    with torch.no_grad():
        for transcript in found.transcripts:
            (logits,) = toy.full_logits(model, [transcript.ids])
            log_p = toy.token_log_probs(transcript, logits).numpy()
            bad = malformed_thoughts(transcript, blank.empty)
            right["code"] += greedy(toy, transcript, logits)[transcript.is_code].tolist()
            for position, role in enumerate(transcript.roles):
                if role in (Role.EXPERT, Role.LAYOUT):
                    sums["code"].append(-log_p[position])
                elif role == Role.THOUGHT:
                    sums["thought"].append(-log_p[position])
            for line in range(transcript.num_lines):
                scored = log_p[(transcript.lines == line) & (transcript.roles == Role.EXPERT)]
                price = 0.3 * transcript.think[line]
                value = scored.mean() if likelihood == "mean" else scored.sum()
                sums["reward"].append(value - price - 0.7 * bad[line])
                sums["bound"].append(scored.sum() - price)
        for document in documents(toy):
            (logits,) = toy.full_logits(model, [document.ids])
            sums["raw"] += (-toy.token_log_probs(document, logits).numpy()[document.is_code]).tolist()
            right["raw"] += greedy(toy, document, logits)[document.is_code].tolist()
    think = np.concatenate([t.think for t in found.transcripts])
    assert (
        0.05 < think.mean() < 0.95
        and np.concatenate([malformed_thoughts(t, blank.empty) for t in found.transcripts]).any()
    )
    expected = {
        "code_ce": np.mean(sums["code"]),
        "raw_code_ce": np.mean(sums["raw"]),
        "code_accuracy": np.mean(right["code"]),
        "raw_code_accuracy": np.mean(right["raw"]),
        "thought_ce": np.mean(sums["thought"]),
        "think_rate": think.mean(),
        "reward": np.mean(sums["reward"]),
        "elbo": np.mean(sums["bound"]),
    }
    assert {k: v for k, v in found.figures.items() if k != "mean_thought_tokens"} == pytest.approx(expected, abs=1e-5)
    again = evaluate(model, policy, documents(toy), keys, config, blank)
    assert again.figures == found.figures, "the same keys measure the same"


def test_comments_of_held_out_documents_are_not_read(toy: Toy) -> None:
    """As observed thoughts they would help figures that are called "without thoughts"."""
    model = toy.model(seed=14, lean=1.0)
    code = "# a\na = b\n# b\nab(c):\n"
    document = toy.document(code, human_comments="as_thoughts")
    stored, plain = (compose(document, t, toy.latents, toy.tokenizer) for t in (document.observed, {}))
    assert stored.think.tolist() == [True, True] and not plain.think.any()

    def measure(transcript: Transcript, **evaluation: Any) -> Evaluation:
        corpus = {"human_comments": "as_thoughts"}
        config = toy.config(corpus=corpus, evaluation={"samples": 4, **evaluation})
        policy = latent_policy(model, config, toy.runtime, toy.latents, toy.tokenizer)
        return evaluate(model, policy, [transcript], [(0,)], config, blank_tokens(toy.tokenizer))

    found, expected = measure(stored), measure(plain)
    assert found.figures == expected.figures and found.by_line(toy.tokenizer) == expected.by_line(toy.tokenizer)
    assert any(not t.think.all() for t in found.transcripts)
    given = measure(stored, observed_thoughts=True)
    assert all(t.think.all() and not t.offered.any() for t in given.transcripts)
    assert given.figures["raw_code_ce"] == expected.figures["raw_code_ce"]
    assert given.figures["code_ce"] != pytest.approx(given.figures["raw_code_ce"], abs=1e-4)


def test_a_model_that_never_thinks_has_no_thought_to_measure(toy: Toy) -> None:
    model = toy.model(seed=14, lean=-40.0)
    config = toy.config(evaluation={"samples": 2})
    policy = latent_policy(model, config, toy.runtime, toy.latents, toy.tokenizer)
    found = evaluate(model, policy, documents(toy), [(0,), (1,), (2,)], config, blank_tokens(toy.tokenizer)).figures
    assert found["thought_ce"] is None and found["mean_thought_tokens"] is None
    assert found["think_rate"] == 0.0
    assert found["code_ce"] == pytest.approx(found["raw_code_ce"], abs=1e-6), "there is nothing but the documents"


def test_records_say_what_was_sampled(toy: Toy) -> None:
    model = toy.model(seed=14, lean=1.0)
    policy = latent_policy(model, toy.config(), toy.runtime, toy.latents, toy.tokenizer)
    policy.publish(6)
    transcripts = policy.sample(documents(toy), [(0,), (1,), (2,)], 4)
    values = [np.arange(t.num_lines, dtype=np.float32) for t in transcripts]
    infinite = [v.copy() for v in values]
    infinite[0][1] = -np.inf
    corpus: Any = SimpleNamespace(tokenizer=toy.tokenizer)
    records = transcript_records(transcripts, corpus, 2, 20, 4, values, infinite, None)
    assert [(r.document, r.rollout) for r in records] == [(f"held out {d}", g) for d in range(3) for g in range(4)]
    assert {(r.iteration, r.step, r.weight_version) for r in records} == {(2, 20, 6)}
    with torch.no_grad():
        for number, (record, transcript) in enumerate(zip(records, transcripts, strict=True)):
            assert "".join(line.text for line in record.lines) == CODES[number // 4]
            (logits,) = toy.full_logits(model, [transcript.ids])
            for index, (line, log_q) in enumerate(
                zip(record.lines, toy.latent_log_probs(transcript, logits), strict=True)
            ):
                assert line.log_prob == pytest.approx(float(log_q), abs=1e-5)
                assert line.offered and line.advantage is None and line.log_likelihood == index
                assert (line.thought is not None) == transcript.think[index]
                if line.thought is not None:
                    ids = transcript.ids[transcript.thought_slice(index)].tolist()
                    assert line.thought == toy.tokenizer.decode(ids).strip()
    assert any(line.thought for record in records for line in record.lines)
    assert records[0].lines[1].reward is None and records[0].lines[0].reward == 0.0
    json.dumps([asdict(record) for record in records], allow_nan=False)

    plain = transcript_records([replace(transcripts[0], log_probs=None)], corpus, 1, 0, 1, None, None, None)
    assert all(line.log_prob == 0.0 and line.reward is None for line in plain[0].lines)
