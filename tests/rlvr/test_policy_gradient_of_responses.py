"""The gradient of an update against the exact gradient of the expected reward, by enumeration of all responses."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import Toy

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.config.rlvr import RlvrConfig
from ra3_megatron.config.training import OptimizerConfig
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import Trainer
from ra3_megatron.rlvr.advantages import RECIPES, Recipe, advantages
from ra3_megatron.rlvr.batches import log_probs_of
from ra3_megatron.rlvr.grpo import GRPO
from ra3_megatron.rlvr.responses import Response, pack, unpack
from ra3_megatron.rollout.protocol import Finish

FROZEN = OptimizerConfig(learning_rate=1e-20, schedule="constant", warmup_fraction=0.0, weight_decay=0.0, clip_grad=0.0)
TABLE = [b"a", b"b", b"\n", b"#"]
LONGEST = 2
PROMPT = [0, 2, 3]


@pytest.fixture(scope="module")
def toy(runtime: Runtime) -> Toy:
    return Toy(runtime, "comment", TABLE, max_latent_tokens=1)


def every_response(toy: Toy) -> list[Response]:
    """All of at most LONGEST tokens: those that end before it, and those that are cut."""
    eos, found = toy.tokenizer.eos, []
    for ids in product(range(toy.tokenizer.vocab_size), repeat=LONGEST):
        ended = [n for n, token in enumerate(ids) if token == eos]
        kept = ids[: ended[0] + 1] if ended else ids
        finish = Finish.END if ended else Finish.LENGTH
        if not any(list(r.ids[len(PROMPT) :]) == list(kept) for r in found):
            ids_of = np.array([*PROMPT, *kept], dtype=np.int32)
            found.append(Response(0, ids_of, len(PROMPT), np.zeros(len(ids_of), dtype=np.float32), finish, 0))
    return found


def rewards_of(responses: list[Response]) -> Tensor:
    return torch.tensor([float(np.random.default_rng(r.ids.tolist()).random() < 0.4) for r in responses])


def flat(gradients: Any) -> Tensor:
    return torch.cat([g.detach().flatten().double() for g in gradients])


def exact(toy: Toy, responses: list[Response], rewards: Tensor, temperature: float) -> tuple[Tensor, Tensor, Any]:
    """Probabilities of the responses and the gradient of the expected reward, from plain forward passes."""
    model = toy.model(seed=3)
    logits = toy.full_logits(model, [r.ids for r in responses])
    totals = []
    for response, x in zip(responses, logits, strict=True):
        log_p = (x / temperature).log_softmax(-1)
        places = range(response.prompt_tokens, response.num_tokens)
        totals.append(torch.stack([log_p[j - 1, int(response.ids[j])] for j in places]).sum())
    log_p = torch.stack(totals)
    gradient = flat(torch.autograd.grad((log_p.exp() * rewards).sum(), list(model.parameters())))
    return log_p.detach().exp(), gradient, log_p.detach()


def grpo(toy: Toy, temperature: float = 1.0, **keys: Any) -> tuple[GRPO, Any]:
    settings = RlvrConfig(
        group_size=2, max_response_tokens=LONGEST, micro_batch_size=8, clip_ratio=None, overlong="keep", **keys
    )
    config = toy.config(rollout={"temperature": temperature}).model_copy(update={"rlvr": settings})
    model = toy.model(seed=3)
    return GRPO(config, Trainer(model, FROZEN, ParallelConfig(), toy.runtime, steps=100)), model


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("recipe", "factor"),
    [(RECIPES["rloo"], 1.0), (RECIPES["dr_grpo"], 0.5)],
)
def test_the_mean_of_the_estimate_is_the_exact_gradient(
    toy: Toy, recipe: Recipe, factor: float, temperature: float
) -> None:
    """Over all pairs of responses (G = 2) with their exact probabilities. The mean over the group as the baseline holds
    the response's own reward, which shrinks the gradient by (G - 1) / G."""
    responses = every_response(toy)
    rewards = rewards_of(responses)
    probabilities, gradient, _ = exact(toy, responses, rewards, temperature)
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-5) and float(gradient.norm()) > 0.01
    count = len(responses)
    pairs = torch.stack([rewards[:, None].expand(count, count), rewards[None, :].expand(count, count)], -1)
    earned = advantages(pairs.reshape(-1, 2), recipe).view(count, count, 2)
    weight = probabilities[:, None] * probabilities[None, :] / 2
    expected = (weight * earned[..., 0]).sum(1) + (weight * earned[..., 1]).sum(0)

    step, model = grpo(toy, temperature, baseline="none", normalize_std=False, loss=recipe.loss)
    padded = responses + responses[: len(responses) % 2]
    step.update(padded, [*expected.tolist(), *[0.0] * (len(padded) - count)])
    # the loss divides by the longest response, and by the number of responses
    found = -flat(p.main_grad for p in model.parameters()) * LONGEST * len(padded)
    assert float((found - factor * gradient).norm() / gradient.norm()) < 2e-4


def test_log_probabilities_of_responses(toy: Toy) -> None:
    responses = every_response(toy)
    _, _, log_p = exact(toy, responses, rewards_of(responses), 0.7)
    step, model = grpo(toy)
    found = log_probs_of(model, responses, step.planner.plan(responses), toy.runtime, 0.7)
    assert [float(values.sum()) for values in found] == pytest.approx(log_p.tolist(), abs=1e-5)
    assert all((values[: len(PROMPT)] == 0).all() for values in found)


@pytest.mark.parametrize("loss", ["token", "sequence"])
def test_the_loss_is_a_mean_over_tokens_or_over_responses(toy: Toy, loss: Any) -> None:
    """Without a baseline, all rewards 1: the loss is - mean log p, over tokens or of the responses' means."""
    every = sorted(every_response(toy), key=lambda r: r.response_tokens)
    responses = [*every[:1], *every[-5:]]
    lengths = [r.response_tokens for r in responses]
    assert len(set(lengths)) > 1
    step, model = grpo(toy, loss=loss, baseline="none", normalize_std=False)
    values = log_probs_of(model, responses, step.planner.plan(responses), toy.runtime, 1.0)
    sums = [float(v.sum()) for v in values]
    token = sum(sums) / sum(lengths)
    sequence = sum(s / n for s, n in zip(sums, lengths, strict=True)) / len(sums)
    metrics = step.update(responses, [1.0] * 6)
    assert metrics["loss"] == pytest.approx(-(token if loss == "token" else sequence), abs=1e-5)


def test_clip_higher_stops_the_gradient_above_and_below(toy: Toy) -> None:
    """A response that has become likelier than 1 + e' keeps no gradient with a positive advantage, nor one that has
    become less likely than 1 - e with a negative one; in between both do."""
    base = every_response(toy)[:2]
    step, model = grpo(toy)
    now = log_probs_of(model, base, step.planner.plan(base), toy.runtime, 1.0)

    def gradient(ratios: tuple[float, float], advantages_of: tuple[float, float]) -> float:
        old = [v - np.where(v != 0, np.log(r), 0).astype(np.float32) for v, r in zip(now, ratios, strict=True)]
        aged = [Response(0, r.ids, r.prompt_tokens, o, r.finish, 0) for r, o in zip(base, old, strict=True)]
        clipped, model = grpo(toy, baseline="none", normalize_std=False)
        clipped.loss = type(clipped.loss)(clip_ratio=0.2, clip_ratio_high=0.4)
        clipped.update(aged, list(advantages_of))
        return float(flat(p.main_grad for p in model.parameters()).norm())

    assert gradient((1.5, 1.5), (1.0, 1.0)) == 0 and gradient((0.7, 0.7), (-1.0, -1.0)) == 0
    assert gradient((1.3, 1.3), (1.0, 1.0)) > 0 and gradient((0.9, 0.9), (-1.0, -1.0)) > 0
    assert gradient((0.7, 0.7), (1.0, 1.0)) > 0 and gradient((1.5, 1.5), (-1.0, -1.0)) > 0


@pytest.mark.parametrize("changes", [{}, {"clip_ratio": 0.2, "clip_ratio_high": None, "importance_cap": 2.0}])
def test_stale_responses_are_weighed_once(toy: Toy, changes: dict[str, Any]) -> None:
    """With a cap, two passes over what an engine sampled a little differently: each is weighed by what the trainer
    thought before the first pass over what the engine thought, and the second is clipped about the first."""
    base = every_response(toy)[:2]
    step, model = grpo(toy)
    now = log_probs_of(model, base, step.planner.plan(base), toy.runtime, 1.0)
    sampled = [v - np.where(v != 0, np.log(1.5), 0).astype(np.float32) for v in now]
    stale = [Response(0, r.ids, r.prompt_tokens, v, r.finish, 0) for r, v in zip(base, sampled, strict=True)]

    def gradient(responses: list[Response], **keys: Any) -> Tensor:
        step, model = grpo(toy, baseline="none", normalize_std=False)
        step.config = step.config.model_copy(update=keys)
        step.loss = type(step.loss)(keys.get("clip_ratio"), keys.get("importance_cap"))
        step.update(responses, [1.0, 0.5])
        return flat(p.main_grad for p in model.parameters())

    fresh = [Response(0, r.ids, r.prompt_tokens, v, r.finish, 0) for r, v in zip(base, now, strict=True)]
    wanted = gradient(fresh) * 1.5
    for passes in (1, 2):
        found = gradient(stale, **{"importance_cap": 2.0, **changes}, updates_per_rollout=passes)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5, "1.5 once: the frozen policy does not move"


def test_divergence_from_the_start_is_k3_and_zero_at_the_start(toy: Toy) -> None:
    responses = every_response(toy)[:4]
    step, model = grpo(toy, kl_coefficient=0.5, baseline="none", normalize_std=False)
    step.reference = toy.model(seed=3)
    assert step.update(responses, [1.0, 0.0, 0.0, 0.0])["kl"] == pytest.approx(0, abs=1e-6)
    step.reference = toy.model(seed=9)
    plan = step.planner.plan(responses)
    now = log_probs_of(model, responses, plan, toy.runtime, 1.0)
    there = log_probs_of(step.reference, responses, plan, toy.runtime, 1.0)
    log_ratio = np.concatenate([t - n for t, n in zip(there, now, strict=True)])
    tokens = sum(r.response_tokens for r in responses)
    k3 = float((np.exp(log_ratio) - log_ratio - 1).sum()) / tokens
    metrics = step.update(responses, [0.0] * 4)
    assert metrics["kl"] == pytest.approx(k3, rel=1e-4) and metrics["loss"] == pytest.approx(0.5 * k3, rel=1e-4)


def test_nothing_to_learn_leaves_the_weights_and_counts_the_step(toy: Toy) -> None:
    responses = every_response(toy)[:4]
    step, model = grpo(toy)
    before = [p.detach().clone() for p in model.parameters()]
    metrics = step.update(responses, [1.0, 1.0, 0.0, 0.0])  # two groups of equal rewards
    assert metrics["updates"] == 0 and all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_cut_responses_are_left_out_of_the_loss(toy: Toy) -> None:
    every = every_response(toy)
    cut, whole = [r for r in every if r.cut][:2], [r for r in every if not r.cut][:2]
    mixed = [whole[0], cut[0], whole[1], cut[1]]
    step, _ = grpo(toy, baseline="none", normalize_std=False)
    step.config = step.config.model_copy(update={"overlong": "mask"})
    masked = step.update(mixed, [1.0] * 4)
    alone, _ = grpo(toy, baseline="none", normalize_std=False)
    assert masked["loss"] == pytest.approx(alone.update(whole, [1.0] * 2)["loss"], abs=1e-6)


def test_packed_responses_come_back_exactly(toy: Toy) -> None:
    responses = every_response(toy)[:5]
    for one, other in zip(responses, unpack(pack(responses)), strict=True):
        assert (one.ids == other.ids).all() and (one.log_probs == other.log_probs).all()
        assert (one.problem, one.prompt_tokens, one.finish) == (other.problem, other.prompt_tokens, other.finish)
