"""Micro-batches by a budget of tokens: near the mean in cost, and the same step as micro-batches of rows.

What holds for every plan is in test_row_packing.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from toy import LARGE, Documents, Toy

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.load import load_config
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.training import EStepConfig, MStepConfig, OptimizerConfig
from ra3_megatron.em.distinct import distinct
from ra3_megatron.em.estep import EStep
from ra3_megatron.em.latent_stats import blank_tokens
from ra3_megatron.em.mstep import MStep
from ra3_megatron.em.packing import training_batches
from ra3_megatron.em.policy import latent_policy
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import Trainer
from ra3_megatron.text.latents import raw
from ra3_megatron.text.transcript import Role, Transcript
from ra3_megatron.training.balance import DocumentCost, deal_out, round_up
from ra3_megatron.training.rows import Plan, Planner, plan_rows, plan_tokens

LLAMA_8B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    context_length=8192,
)


def test_the_cost_of_a_document_by_hand() -> None:
    """Llama 3 8B has 6.98e9 weights in its layers, 2 FLOPs each; a pair of tokens costs 4 FLOPs a channel and layer."""
    cost = DocumentCost.of(LLAMA_8B)
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert cost == DocumentCost(2 * weights, 4 * 32 * 4096)
    assert cost(1) == 2 * weights + 4 * 32 * 4096
    assert cost(3) == 3 * 2 * weights + 6 * 4 * 32 * 4096
    mixture = LLAMA_8B.model_copy(update={"num_experts": 8, "experts_per_token": 2, "expert_ffn_hidden_size": 1024})
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 2 * 3 * 4096 * 1024 + 8 * 4096)
    assert DocumentCost.of(mixture).per_token == 2 * weights
    wide = LLAMA_8B.model_copy(update={"head_dim": 256})
    assert DocumentCost.of(wide).per_pair == 2 * cost.per_pair


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("budget", [1, 2, 4])
@pytest.mark.parametrize("model", [ModelConfig(), LLAMA_8B], ids=["4M", "8B"])
def test_costs_are_near_the_mean(model: ModelConfig, budget: int, multiple: int) -> None:
    """256 documents of log-normal lengths (median 1/16 of the context, four of half and two of all of it).

    As few micro-batches as the tokens need, each within 3% of the mean cost; where one document costs more than that,
    no micro-batch costs more than it. Rows as long as the fullest one are 97.5% full, if no one document is a row.
    """
    context, cost = model.context_length, DocumentCost.of(model)
    for seed in range(5):
        draws = np.random.default_rng(seed).lognormal(np.log(context / 16), 1.0, 250)
        lengths = [*np.clip(draws, 4, context).astype(int).tolist(), *[context // 2] * 4, context, context]
        dealt = deal_out(lengths, budget * context, multiple, cost)
        costs = [sum(cost(lengths[i]) for i in batch) for batch in dealt]
        mean = sum(costs) / len(costs)
        assert len(dealt) == round_up(-(-sum(lengths) // (budget * context)), multiple)
        assert max(costs) <= max(1.03 * mean, cost(context))
        assert min(costs) >= 0.95 * mean
        if budget > 1:
            assert max(costs) <= 1.03 * mean
            tokens = [sum(lengths[i] for i in batch) for batch in dealt]
            assert np.mean(tokens) / max(tokens) >= 0.975


def plain(length: int) -> Transcript:
    """Some transcript of this many tokens."""
    roles = np.full(length, Role.EXPERT, np.uint8)
    return Transcript(np.arange(length, dtype=np.int32), roles, np.zeros(length, np.int32), np.ones(1, bool))


def test_a_planner_goes_by_the_configuration() -> None:
    """Budget, architecture and layout reach the plan; each of them changes it."""
    sizes = {"hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "num_query_groups": 2, "head_dim": 64}
    model = ModelConfig(num_layers=1, context_length=64, **sizes)  # narrow, with wide heads: attention costs most
    parallel = ParallelConfig(data=2, context=2, tensor=2, sequence=True)
    config = RunConfig(model=model, parallel=parallel, estep=EStepConfig(micro_batch_tokens=100))
    runtime = Runtime(torch.device("cpu"), 0, 8, data_size=2)
    transcripts = [plain(length) for length in [60, *[9] * 8]]
    lengths = [t.num_tokens for t in transcripts]
    plan = Planner(config, config.estep, runtime).plan(transcripts)
    assert plan == plan_tokens(lengths, 100, DocumentCost.of(model), runtime, 8)
    assert plan.length == 96, "the budget, rounded down"
    assert plan.rows != plan_tokens(lengths, 100, DocumentCost(1, 0), runtime, 8).rows, "short documents cost less"
    rows = Planner(config, config.mstep, runtime).plan(transcripts)
    assert rows == plan_rows(lengths, 64, 4, runtime, sequence_multiple=8)


# -- the same step ------------------------------------------------------------------------------------------------

FROZEN = OptimizerConfig(learning_rate=1e-20, schedule="constant", warmup_fraction=0.0, weight_decay=0.0, clip_grad=0.0)
"""Steps that leave gradients to look at, and weights as they were."""
CODES = ["a = b\n  ab(c):\n   b\n", "b\n", "c\nd(a)\nab\n", "  b\n a\n", "a = b\n" * 7, "c\n", "d = (a)\n"]
CONTEXT = 64
BUDGETS: list[dict[str, Any]] = [
    {"micro_batch_size": 2},
    {"micro_batch_tokens": CONTEXT},
    {"micro_batch_tokens": CONTEXT + 1},
    {"micro_batch_tokens": 3 * CONTEXT},
    {"micro_batch_tokens": 10_000},
]
"""Rows, tight budgets, and one into which everything fits."""


@pytest.fixture(scope="module")
def toy(runtime: Runtime) -> Toy:
    return Toy(runtime, "comment", LARGE, max_latent_tokens=3)


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.main_grad.flatten().clone() for p in model.parameters()])


def same_step(results: Sequence[tuple[dict[str, float], torch.Tensor]], fill_rates: Sequence[float]) -> None:
    """Gradients within 1e-6 of the first, and the same metrics but for the fill rate."""
    first_metrics, first = results[0]
    assert first.abs().max() > 0.01
    for metrics, gradient in results[1:]:
        torch.testing.assert_close(gradient, first, atol=1e-6, rtol=0)
        assert {**metrics, "fill_rate": 0} == pytest.approx({**first_metrics, "fill_rate": 0}, abs=1e-5)
    assert [metrics["fill_rate"] for metrics, _ in results] == pytest.approx(fill_rates)


class Seen:
    """Plans that a step made, by wrapping the planner's method."""

    def __init__(self, step: EStep | MStep, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plans: list[Plan] = []
        original = step.planner.plan

        def plan(*arguments: Any, **named: Any) -> Plan:
            self.plans.append(original(*arguments, **named))
            return self.plans[-1]

        monkeypatch.setattr(step.planner, "plan", plan)


def check_shapes(shapes: Sequence[tuple[int, int, int]]) -> None:
    """(rows, length, rows a micro-batch) of the plans for BUDGETS: they differ, as they are meant to."""
    rows, tight, odd, loose, whole = shapes
    assert rows[2] == 2 and {shape[2] for shape in (tight, odd, loose, whole)} == {1}
    assert tight[1] == CONTEXT and odd[1] <= CONTEXT + 1 and loose[1] <= 3 * CONTEXT
    assert tight[0] > loose[0] > whole[0] == 1


def test_estep_with_any_budget(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [raw(toy.document(code), toy.latents, toy.tokenizer) for code in CODES]
    results, shapes, fill_rates = [], [], []
    for budget in BUDGETS:
        config = toy.config(estep=EStepConfig(group_size=4, entropy_coefficient=0.1, optimizer=FROZEN, **budget))
        model = toy.model(seed=2, lean=1.0)
        policy = latent_policy(model, config, toy.runtime, toy.latents, toy.tokenizer)
        trainer = Trainer(model, FROZEN, ParallelConfig(), toy.runtime, steps=1000)
        step = EStep(config, policy, trainer, toy.model(seed=5), blank_tokens(toy.tokenizer))
        seen = Seen(step, monkeypatch)
        metrics, rollouts = step.step(documents, [(3, d) for d in range(len(documents))])
        assert sum(int(t.think.sum()) for t in rollouts.transcripts) > 10
        plan = seen.plans[-1]
        assert len(seen.plans) == 2 and seen.plans[0] == plan, "rewards and update go by the same plan"
        shapes.append((len(plan.rows), plan.length, plan.micro_batch_size))
        placed = distinct(rollouts.transcripts).transcripts
        fill_rates.append(sum(t.num_tokens for t in placed) / (len(plan.rows) * plan.length))
        results.append((metrics, gradients(model)))
    check_shapes(shapes)
    same_step(results, fill_rates)


def test_mstep_with_any_budget(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = Documents(raw(toy.document(code), toy.latents, toy.tokenizer) for code in CODES * 8)
    results, shapes, fill_rates = [], [], []
    for budget in BUDGETS:
        settings = MStepConfig(global_batch_size=6, optimizer=FROZEN, **budget)
        config = toy.config(mstep=settings)
        model = toy.model(seed=2)
        trainer = Trainer(model, FROZEN, ParallelConfig(), toy.runtime, steps=1000)
        step = MStep(config, settings, trainer, documents, thought_weight=0.5)
        seen = Seen(step, monkeypatch)
        metrics = step.step()
        (plan,) = seen.plans
        assert len(step.last_documents) > 10
        shapes.append((len(plan.rows), plan.length, plan.micro_batch_size))
        tokens = sum(t.num_tokens for t in documents[: len(step.last_documents)])
        fill_rates.append(tokens / (len(plan.rows) * plan.length))
        results.append((metrics, gradients(model)))
    check_shapes(shapes)
    same_step(results, fill_rates)


def test_empty_micro_batches_change_nothing(toy: Toy) -> None:
    """They come where there are fewer documents than data-parallel ranks."""
    documents = [raw(toy.document(code), toy.latents, toy.tokenizer) for code in CODES]
    plan = plan_tokens([t.num_tokens for t in documents], 100, DocumentCost(1, 0), toy.runtime)
    found = []
    for rows in (plan.rows, [[], *plan.rows, []]):
        model = toy.model(seed=2)
        trainer = Trainer(model, FROZEN, ParallelConfig(), toy.runtime, steps=1000)
        result = trainer.step(training_batches(documents, replace(plan, rows=rows), toy.runtime))
        found.append((result.loss, gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=0)


# -- configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["warm_start", "estep", "mstep"])
def test_a_budget_below_the_context_is_refused(phase: str) -> None:
    with pytest.raises(UserError, match=f"^{phase}.micro_batch_tokens=511 .*model.context_length=512"):
        load_config(None, [f"{phase}.micro_batch_tokens=511"])
    assert load_config(None, [f"{phase}.micro_batch_tokens=512"])


def test_a_budget_needs_no_divisible_batch() -> None:
    overrides = ["mstep.global_batch_size=7", "mstep.micro_batch_size=4"]
    with pytest.raises(UserError):
        load_config(None, overrides)
    config = load_config(None, [*overrides, "mstep.micro_batch_tokens=1000", "parallel.data=2"])
    assert config.mstep.micro_batch_tokens == 1000
