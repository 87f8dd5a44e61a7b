"""An update on the distinct transcripts is the update on all of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from toy import FORMATS, LARGE, Toy

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.config.training import EStepConfig, OptimizerConfig
from ra3_megatron.em import estep
from ra3_megatron.em.distinct import Distinct, distinct
from ra3_megatron.em.estep import EStep
from ra3_megatron.em.latent_stats import blank_tokens
from ra3_megatron.em.policy import latent_policy
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import Trainer
from ra3_megatron.text.latents import compose
from ra3_megatron.text.transcript import Transcript

FROZEN = OptimizerConfig(learning_rate=1e-20, schedule="constant", warmup_fraction=0.0, weight_decay=0.0, clip_grad=0.0)
CODES = ("a = b\n  ab(c):\nd\n", "b\nc\n", "b\n")
OFF_POLICY: dict[str, dict[str, Any]] = {
    "on policy": {},
    "clipped": {"clip_ratio": 0.05},
    "truncated": {"importance_cap": 1.02},
    "both": {"clip_ratio": 0.05, "importance_cap": 1.02},
}


def one_each(transcripts: Sequence[Transcript], group_size: int | None = None) -> Distinct:
    return Distinct(list(transcripts), list(range(len(transcripts))))


@pytest.mark.parametrize("keep", [True, False], ids=["all latents", "latent in force"])
@pytest.mark.parametrize("settings", OFF_POLICY.values(), ids=OFF_POLICY)
@pytest.mark.parametrize("name", FORMATS)
def test_the_update_is_that_on_all(
    name: str, settings: dict[str, Any], keep: bool, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = Toy(runtime, name, LARGE, max_latent_tokens=2)
    model, scorer = toy.model(seed=3, lean=-1.0), toy.model(seed=4)
    section = EStepConfig(optimizer=FROZEN, group_size=16, entropy_coefficient=0.3, **settings)
    config = toy.config(estep=section)
    config = config.model_copy(update={"text": config.text.model_copy(update={"keep_latents": keep})})
    policy = latent_policy(model, config, runtime, toy.latents, toy.tokenizer, weight_version=0)
    trainer = Trainer(model, FROZEN, ParallelConfig(), runtime, steps=1000)
    step = EStep(config, policy, trainer, scorer, blank_tokens(toy.tokenizer))
    documents = [compose(toy.document(code, code), {}, toy.latents, toy.tokenizer) for code in (*CODES, CODES[2])]
    transcripts = policy.sample(documents, [(5, n) for n in range(len(documents))], 16)
    share = len(distinct(transcripts, 16 if section.clip_ratio else None).transcripts) / len(transcripts)
    assert 0.1 < share < 0.7
    if settings:  # as if other weights had sampled them
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.02)

    def update() -> tuple[dict[str, float], np.ndarray, list[np.ndarray]]:
        metrics, rollouts = step.update(list(transcripts))
        gradient = torch.cat([p.main_grad.flatten() for p in model.parameters()])  # type: ignore[attr-defined]
        return metrics, gradient.clone().numpy(), rollouts.advantages

    found, gradient, advantages = update()
    assert found["distinct_transcripts"] == pytest.approx(share)
    monkeypatch.setattr(estep, "distinct", one_each)
    expected, all_of_it, plain = update()
    assert expected["distinct_transcripts"] == 1.0 and expected["tokens"] > found["tokens"]
    cap = "importance_cap" in settings
    # the first update on what was sampled has nothing to clip, once a weight corrects for who sampled it
    assert (0 < expected["clip_fraction"] < 1) == ("clip_ratio" in settings and not cap)
    assert (0 < expected["truncated_fraction"] < 1) == cap
    for one, other in zip(advantages, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    scale = np.abs(all_of_it).max()
    np.testing.assert_allclose(gradient, all_of_it, atol=1e-5 * scale)
    skipped = {"tokens", "fill_rate", "distinct_transcripts", "learning_rate"}
    for key in expected.keys() - skipped:
        assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key


def test_copies_are_counted_and_summed(runtime: Runtime) -> None:
    toy = Toy(runtime, "comment", LARGE, max_latent_tokens=2)
    one, other = (compose(toy.document(code), {}, toy.latents, toy.tokenizer) for code in ("a\nb\n", "b\n"))
    found = distinct([one, other, one, one])
    assert found.transcripts == [one, other] and found.which == [0, 1, 0, 0] and found.copies == [3, 1]
    values = [np.array(v, dtype=np.float32) for v in ([1, 2], [7], [10, 20], [100, 200])]
    assert [v.tolist() for v in found.summed(values)] == [[111, 222], [7]]
    apart = distinct([one, one, one, other], group_size=2)
    assert apart.transcripts == [one, one, other] and apart.which == [0, 0, 1, 2]


def test_a_clip_tells_two_groups_of_one_document_apart(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where their advantages differ in sign, the clip holds for one and not for the other."""
    toy = Toy(runtime, "comment", LARGE, max_latent_tokens=2)
    model = toy.model(seed=3, lean=-1.0)
    section = EStepConfig(optimizer=FROZEN, group_size=8, clip_ratio=0.01)
    config = toy.config(estep=section)
    policy = latent_policy(model, config, runtime, toy.latents, toy.tokenizer, weight_version=0)
    trainer = Trainer(model, FROZEN, ParallelConfig(), runtime, steps=1000)
    step = EStep(config, policy, trainer, toy.model(seed=4), blank_tokens(toy.tokenizer))
    document = compose(toy.document(CODES[2], "twice"), {}, toy.latents, toy.tokenizer)
    transcripts = policy.sample([document, document], [(5, 0), (5, 1)], 8)
    with torch.no_grad():  # as if other weights had sampled them
        for parameter in model.parameters():
            parameter.mul_(1.2)

    def gradient() -> np.ndarray:
        signs = iter([1.0, -1.0])
        monkeypatch.setattr(step, "_advantages", lambda rewards, _: torch.full_like(rewards, next(signs)))
        metrics, _ = step.update(list(transcripts))
        assert 0 < metrics["clip_fraction"] < 1
        return torch.cat([p.main_grad.flatten() for p in model.parameters()]).clone().numpy()  # type: ignore[attr-defined]

    found = gradient()
    monkeypatch.setattr(estep, "distinct", one_each)
    expected = gradient()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
