"""The E-step by hand: rewards and advantages, the loss and its gradient (method.md, invariants 3 and 6)."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from toy import FORMATS, LARGE, SMALL, Toy, choice_positions

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.config.training import EStepConfig, OptimizerConfig
from ra3_megatron.em import estep
from ra3_megatron.em.distinct import distinct
from ra3_megatron.em.estep import EStep, Rollouts
from ra3_megatron.em.latent_stats import blank_tokens
from ra3_megatron.em.packing import policy_batches
from ra3_megatron.em.policy import latent_policy
from ra3_megatron.mcore.loss import Counts, PolicyLoss, Stat, stream_loss
from ra3_megatron.mcore.model import LanguageModel
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import Trainer
from ra3_megatron.rollout.latent_sampler import Job, LatentSampler
from ra3_megatron.rollout.megatron_engine import MegatronEngine
from ra3_megatron.text.latents import compose, raw
from ra3_megatron.text.transcript import Role, Transcript
from ra3_megatron.training.rows import plan_rows

FROZEN = OptimizerConfig(learning_rate=1e-20, schedule="constant", warmup_fraction=0.0, weight_decay=0.0, clip_grad=0.0)
"""Steps that leave gradients to look at, and weights as they were."""


def make_estep(toy: Toy, model: LanguageModel, scorer: LanguageModel, **settings: Any) -> EStep:
    config = toy.config(estep=EStepConfig(optimizer=FROZEN, **settings))
    policy = latent_policy(model, config, toy.runtime, toy.latents, toy.tokenizer)
    trainer = Trainer(model, FROZEN, ParallelConfig(), toy.runtime, steps=1000)
    return EStep(config, policy, trainer, scorer, blank_tokens(toy.tokenizer))


def sample(toy: Toy, model: LanguageModel, codes: Sequence[str], group: int) -> list[Transcript]:
    engine = MegatronEngine(model, toy.runtime, toy.latents, toy.tokenizer.vocab_size)
    jobs = [Job(toy.document(code), (d, g)) for d, code in enumerate(codes) for g in range(group)]
    return LatentSampler(engine, toy.latents, toy.tokenizer, 64, 64).sample(jobs)


# -- rewards and advantages ---------------------------------------------------------------------------------------

ACT = {0: [-1.0, -3.0], 1: [-2.0], 2: [-4.0, -2.0]}
THINK = {0: [-1.0, -3.0], 1: [-0.5], 2: [-1.0, -1.0]}
"""log pi of the scored tokens of each line, without thoughts and with two."""


@pytest.fixture
def pair(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rollouts]:
    """Rewards of two transcripts of one document whose token log-probabilities are known."""
    toy = Toy(runtime, "comment", SMALL, max_latent_tokens=2)
    document = toy.document("a):\n   b\nba\n\n")
    spaced, sharp, end, a = (toy.tokenizer.token_bytes.index(t) for t in (b" #", b"#", b"\n", b"a"))
    transcripts = [
        raw(document, toy.latents, toy.tokenizer),
        # line 1: a comment without words; line 2: one that was cut
        compose(document, {1: [spaced, end], 2: [sharp, a]}, toy.latents, toy.tokenizer),
    ]

    def known(_: Any, scored: Sequence[Transcript], *__: Any, **___: Any) -> list[np.ndarray]:
        scores = []
        for transcript in scored:
            values = THINK if transcript.think.any() else ACT
            score = np.full(transcript.num_tokens, 99.0, dtype=np.float32)
            score[transcript.roles == Role.EXPERT] = [v for line in values.values() for v in line]
            scores.append(score)
        return scores

    monkeypatch.setattr(estep, "token_log_probs", known)

    def reward(**settings: Any) -> Rollouts:
        config = toy.config(estep=EStepConfig(group_size=2, **settings))
        trainer: Any = SimpleNamespace(runtime=runtime)
        policy: Any = SimpleNamespace(latents=toy.latents, tokenizer=toy.tokenizer)
        model: Any = None
        return EStep(config, policy, trainer, model, blank_tokens(toy.tokenizer)).reward(transcripts)

    return reward


def test_rewards_and_advantages_by_hand(pair: Callable[..., Rollouts]) -> None:
    found = pair(latent_price=0.25, format_penalty=0.5, horizon=2, discount=0.5)
    assert np.array(found.log_likelihoods).tolist() == [[-2.0, -2.0, -3.0], [-2.0, -0.5, -1.0]]
    assert np.array(found.rewards).tolist() == [[-2.0, -2.0, -3.0], [-2.0, -1.25, -1.75]]
    # returns: [-3, -3.5, -3] and [-2.625, -2.125, -1.75]; the baseline is half way
    assert np.array(found.advantages).tolist() == [[-0.1875, -0.6875, -0.625], [0.1875, 0.6875, 0.625]]


def test_the_summed_likelihood_by_hand(pair: Callable[..., Rollouts]) -> None:
    found = pair(latent_price=0.25, horizon=2, discount=0.5, likelihood="sum")
    assert np.array(found.log_likelihoods).tolist() == [[-4.0, -2.0, -6.0], [-4.0, -0.5, -2.0]]
    assert np.array(found.rewards).tolist() == [[-4.0, -2.0, -6.0], [-4.0, -0.75, -2.25]]
    # returns: [-5, -5, -6] and [-4.375, -1.875, -2.25]
    assert np.array(found.advantages).tolist() == [[-0.3125, -1.5625, -1.875], [0.3125, 1.5625, 1.875]]


def test_other_baselines_by_hand(pair: Callable[..., Rollouts]) -> None:
    settings: dict[str, Any] = {"latent_price": 0.25, "format_penalty": 0.5, "horizon": 2, "discount": 0.5}
    apart = pair(baseline="leave_one_out", **settings)
    assert np.array(apart.advantages).tolist() == [[-0.375, -1.375, -1.25], [0.375, 1.375, 1.25]]
    none = pair(baseline="none", **settings)
    assert np.array(none.advantages).tolist() == [[-3.0, -3.5, -3.0], [-2.625, -2.125, -1.75]]
    scaled = pair(normalize_advantages=True, **settings)
    flat = np.array([0.1875, 0.6875, 0.625])
    expected = flat / np.sqrt((flat**2).mean())
    np.testing.assert_allclose(scaled.advantages, [-expected, expected], rtol=1e-4)


def test_the_baseline_of_no_thought_by_hand(pair: Callable[..., Rollouts]) -> None:
    """Returns [-3, -3.5, -3] and [-2.625, -2.125, -1.75], less those without thoughts, which are the first ones."""
    found = pair(latent_price=0.25, format_penalty=0.5, horizon=2, discount=0.5, baseline="no_thought")
    assert np.array(found.advantages).tolist() == [[0.0, 0.0, 0.0], [0.375, 1.375, 1.25]]


def test_rejection_sampling_imitates_the_best_of_the_group(
    pair: Callable[..., Rollouts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("ra3_megatron.em.estep.EStep._without_thoughts")  # it has no baseline to score documents for
    found = pair(latent_price=0.25, horizon=1, estimator="rejection_sampling", baseline="no_thought")
    # rewards [-2, -2, -3] and [-2, -0.75, -1.25]: equal at the first line
    assert np.array(found.advantages).tolist() == [[0.5, 0.0, 0.0], [0.5, 1.0, 1.0]]


def test_at_an_infinite_price_thinking_is_infinitely_bad(pair: Callable[..., Rollouts]) -> None:
    found = pair(latent_price=float("inf"), horizon=1, baseline="none")
    assert np.array(found.rewards).tolist() == [[-2.0, -2.0, -3.0], [-2.0, -np.inf, -np.inf]]


# -- the loss and its gradient ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_the_loss_is_minus_advantage_times_log_q_minus_the_entropy_bonus(runtime: Runtime, name: str) -> None:
    toy = Toy(runtime, name, SMALL, max_latent_tokens=2)
    model = toy.model(seed=2, lean=1.0)
    transcripts = sample(toy, model, ["a):\n   b\nba\n\n", "b\n"], 4)
    generator = np.random.default_rng(0)
    advantages = [generator.normal(size=t.num_lines).astype(np.float32) for t in transcripts]
    plan = plan_rows([t.num_tokens for t in transcripts], 64, 2, runtime)
    batches = policy_batches(transcripts, advantages, plan, runtime, toy.latents, 0.3, temperature=0.8)
    found = Trainer(model, FROZEN, ParallelConfig(), runtime, 10).step(batches, PolicyLoss())

    total = decision_entropy = 0.0
    decisions = sum(t.num_lines for t in transcripts)
    with torch.no_grad():
        rows = toy.full_logits(model, [t.ids for t in transcripts])
    for transcript, advantage, logits in zip(transcripts, advantages, rows, strict=True):
        log_q = toy.latent_log_probs(transcript, logits, 0.8)
        total -= sum(float(a * p) for a, p in zip(advantage, log_q, strict=True))
        for position in choice_positions(transcript):
            log_p = (logits[position - 1] / 0.8).log_softmax(-1)
            line = int(transcript.lines[position])
            body = transcript.ids[(transcript.lines == line) & (transcript.roles == Role.EXPERT)]
            starts, inner, _ = toy.rules(int(body[0]))
            if position != transcript.decision_positions[line]:
                outcomes = log_p[inner].log_softmax(-1).exp()
            elif name == "tokens":
                outcomes = log_p[[*starts, toy.tokenizer.special["<act>"]]].log_softmax(-1).exp()
            else:  # each way to start a thought, and <act> as one outcome
                outcomes = torch.cat([log_p[starts].exp(), 1 - log_p[starts].exp().sum()[None]])
            entropy = float(-(outcomes * outcomes.log()).sum())
            total -= 0.3 * entropy
            decision_entropy += entropy * (position == transcript.decision_positions[line])
    assert found.loss == pytest.approx(total / decisions, abs=1e-5)
    assert found.mean(Stat.DECISION_ENTROPY, Stat.DECISIONS) == pytest.approx(decision_entropy / decisions, abs=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_expert_tokens_carry_exactly_no_gradient(runtime: Runtime, name: str) -> None:
    """The loss does not depend on the output at any position but those that predict a choice; and at an <act> of the
    comment format, where the expert's token stands, it does not depend on which token that is."""
    toy = Toy(runtime, name, SMALL, max_latent_tokens=2)
    model = toy.model(seed=2, lean=1.0)
    transcripts = sample(toy, model, ["a):\n   b\nba\n\n", "b\n"], 6)
    plan = plan_rows([t.num_tokens for t in transcripts], 64, 8, runtime)
    advantages = [np.ones(t.num_lines, np.float32) for t in transcripts]
    (batch,) = policy_batches(transcripts, advantages, plan, runtime, toy.latents, 0.1, 1.0)
    kept: list[torch.Tensor] = []
    hook = model.decoder.final_layernorm.register_forward_hook(
        lambda module, inputs, output: (output.retain_grad(), kept.append(output))[0]
    )

    def gradient(targets: torch.Tensor) -> torch.Tensor:
        kept.clear()
        changed = type(batch)(**{**batch.__dict__, "targets": targets})
        loss, _ = stream_loss(model(changed), changed, Counts(1, 1), PolicyLoss())
        loss.backward()
        assert kept[-1].grad is not None
        return kept[-1].grad.transpose(0, 1)  # [b, s, hidden]

    found = gradient(batch.targets)
    predicts = torch.zeros(batch.ids.shape, dtype=torch.bool)
    acts = torch.zeros_like(predicts)
    for row, placed in enumerate(plan.rows):
        for number, offset in placed:
            transcript = transcripts[number]
            positions = choice_positions(transcript)
            predicts[row, offset + positions - 1] = True
            acts[row, offset + positions[transcript.roles[positions] == Role.EXPERT] - 1] = True
    assert not found[~predicts].any(), "exactly 0"
    assert found[predicts].any(-1).all()
    assert bool(acts.any()) == (name == "comment")

    other = batch.targets.clone()
    other[acts] = toy.tokenizer.bos  # some token that starts no thought
    other[~predicts] = 5
    assert torch.equal(gradient(other), found)
    hook.remove()


# -- invariance to the split --------------------------------------------------------------------------------------


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.main_grad.flatten().clone() for p in model.parameters()])


@pytest.mark.parametrize("name", FORMATS)
def test_micro_batches_and_rows_change_nothing(runtime: Runtime, name: str) -> None:
    toy = Toy(runtime, name, LARGE, max_latent_tokens=3)
    codes = ["a = b\n  ab(c):\n   b\n", "b\n", "c\nd(a)\nab\n", "  b\n a\n"]
    documents = [raw(toy.document(code), toy.latents, toy.tokenizer) for code in codes]
    results = []
    for micro_batch_size, context in ((1, 64), (2, 64), (16, 64), (3, 200)):
        toy.architecture = toy.architecture.model_copy(update={"context_length": context})
        model, scorer = toy.model(seed=2, lean=1.0), toy.model(seed=5)
        step = make_estep(toy, model, scorer, group_size=4, micro_batch_size=micro_batch_size, entropy_coefficient=0.1)
        metrics, rollouts = step.step(documents, [(3, d) for d in range(len(documents))])
        assert 0 < metrics.pop("fill_rate") < 1, "the one figure that is about the packing"
        results.append((metrics, rollouts, gradients(model)))
    first_metrics, first, first_gradient = results[0]
    assert first_gradient.norm() > 0.01
    for metrics, rollouts, gradient in results[1:]:
        assert rollouts.transcripts == first.transcripts
        for one, other in zip(rollouts.rewards, first.rewards, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
        assert metrics == pytest.approx(first_metrics, abs=1e-5)
        torch.testing.assert_close(gradient, first_gradient, atol=2e-6, rtol=1e-4)


def test_metrics_of_a_step(runtime: Runtime) -> None:
    toy = Toy(runtime, "comment", LARGE, max_latent_tokens=3)
    documents = [raw(toy.document(code), toy.latents, toy.tokenizer) for code in ("a = b\n  ab(c):\n", "b\n")]
    step = make_estep(toy, toy.model(seed=2, lean=1.0), toy.model(seed=5), group_size=4, latent_price=0.1)
    metrics, rollouts = step.step(documents, [(3, 0), (3, 1)])
    think = np.concatenate([t.think for t in rollouts.transcripts])
    assert [t.document for t in rollouts.transcripts] == ["toy"] * 8
    assert metrics["think_rate"] == pytest.approx(think.mean())
    assert metrics["reward"] == pytest.approx(metrics["log_likelihood"] - 0.1 * think.mean(), abs=1e-5)
    assert metrics["tokens"] == sum(t.num_tokens for t in distinct(rollouts.transcripts).transcripts)
    assert metrics["log_prob_mismatch"] < 1e-5
    assert metrics["advantage_std"] == pytest.approx(np.concatenate(rollouts.advantages).std(), abs=1e-6)
