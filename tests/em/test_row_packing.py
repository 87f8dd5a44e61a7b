"""Transcripts in packed rows: every value at the position that predicts its token, nothing lost, nothing mixed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import FORMATS, LARGE, Toy

from ra3_megatron.em.packing import choices_of, policy_batches, scoring_batches, scoring_denominators, training_batches
from ra3_megatron.mcore.batch import Kind
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import forward, global_counts
from ra3_megatron.mcore.vocab_parallel import ALL, TARGET
from ra3_megatron.rollout.latent_sampler import Job, LatentSampler
from ra3_megatron.rollout.megatron_engine import MegatronEngine
from ra3_megatron.text.latents import compose, raw
from ra3_megatron.text.transcript import Role, Transcript
from ra3_megatron.training.balance import DocumentCost, deal_out
from ra3_megatron.training.rows import ROW_MULTIPLE, Plan, RowWriter, plan_rows, plan_tokens

CODES = ("a = b\n  ab(c):\n   b\n\nc\n\tdd\n", "b\n", "  a\nb = d\nc\n", "d(a)\n" * 5)


def layout(data_size: int, data_rank: int = 0, **more: int) -> Runtime:
    return Runtime(torch.device("cpu"), data_rank, data_size, data_rank=data_rank, data_size=data_size, **more)


def plain(length: int) -> Transcript:
    """Some transcript of this many tokens."""
    roles = np.full(length, Role.EXPERT, np.uint8)
    roles[0] = Role.CONTEXT
    lines = np.zeros(length, np.int32)
    lines[0] = -1
    return Transcript(np.arange(length, dtype=np.int32), roles, lines, np.ones(1, bool))


LENGTHS = st.lists(st.integers(2, 70), max_size=20)


SEQUENCE_MULTIPLES = st.sampled_from([1, 4, 6])
"""Context parallelism 2 or 3 asks for 4 or 6 pieces; 6 divides neither 64 nor the length of rows below."""


def check_plan(plan_of: Callable[[Runtime], Plan], lengths: list[int], data_size: int, stages: int) -> Plan:
    """What holds for every plan: all of the transcripts, whole, in rows of one length, alike on every rank."""
    interleaved = {"pipeline_size": stages, "virtual_size": 2 if stages > 1 else 1}
    runtimes = [layout(data_size, rank, **interleaved) for rank in range(data_size)]
    plans = [plan_of(runtime) for runtime in runtimes]
    assert all(plan == plans[0] for plan in plans), "every process makes the same plan"
    plan = plans[0]
    assert sorted(i for row in plan.rows for i, _ in row) == list(range(len(lengths)))
    for row in plan.rows:
        end = 0
        for i, offset in row:
            assert offset == end
            end += lengths[i]
        assert end <= plan.length
    shares = [plan.mine(runtime) for runtime in runtimes]
    assert len({len(share) for share in shares}) == 1, "as many micro-batches on every process"
    assert len(shares[0]) % stages == 0, "the interleaved schedule takes them by the number of stages"
    taken = [row for share in shares for batch in share for row in batch]
    assert sorted(taken) == list(range(len(plan.rows)))
    assert all(len(batch) == plan.micro_batch_size for share in shares for batch in share)
    positions = len(plan.rows) * plan.length
    assert plan.fill_rate == pytest.approx(sum(lengths) / positions if positions else 0)
    return plan


@given(LENGTHS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), SEQUENCE_MULTIPLES)
def test_a_plan_holds_every_transcript_once(
    lengths: list[int], micro_batch_size: int, data_size: int, stages: int, sequence_multiple: int
) -> None:
    def plan_of(runtime: Runtime) -> Plan:
        return plan_rows(lengths, 70, micro_batch_size, runtime, sequence_multiple=sequence_multiple)

    plan = check_plan(plan_of, lengths, data_size, stages)
    assert plan.micro_batch_size == micro_batch_size
    assert plan.length % sequence_multiple == 0 and plan.length < 70 + sequence_multiple


def test_a_plan_takes_rows_that_were_chosen_before() -> None:
    plan = plan_rows([5, 9, 4], 100, 2, layout(1), rows=[[2, 0], [], [1]])
    assert plan == Plan([[(2, 0), (0, 4)], [], [(1, 0)], []], 64, 2, 18)
    assert plan.fill_rate == 18 / (4 * 64)


COSTS = st.builds(DocumentCost, st.integers(1, 1000), st.integers(0, 100))


@given(LENGTHS, st.integers(70, 400), COSTS, st.integers(1, 3), st.integers(1, 3), SEQUENCE_MULTIPLES)
def test_a_plan_by_tokens_keeps_its_budget(
    lengths: list[int], budget: int, cost: DocumentCost, data_size: int, stages: int, sequence_multiple: int
) -> None:
    budget += 2 * sequence_multiple  # the longest document fits into whole multiples

    def plan_of(runtime: Runtime) -> Plan:
        return plan_tokens(lengths, budget, cost, runtime, sequence_multiple)

    plan = check_plan(plan_of, lengths, data_size, stages)
    assert plan.micro_batch_size == 1
    assert plan.length <= budget and plan.length % sequence_multiple == 0
    longest = max((sum(lengths[i] for i, _ in row) for row in plan.rows), default=0)
    assert plan.length < longest + ROW_MULTIPLE + sequence_multiple, "no longer than the fullest row needs"
    if lengths:
        usable = budget - budget % sequence_multiple
        assert len(plan.rows) < 2 * sum(lengths) / usable + data_size * stages
    reordered = plan_tokens(lengths[::-1], budget, cost, layout(data_size), sequence_multiple)
    assert reordered.length == plan_tokens(lengths, budget, cost, layout(data_size), sequence_multiple).length


@given(LENGTHS.filter(bool), st.integers(70, 400), COSTS, st.integers(1, 5))
def test_costs_are_balanced_as_far_as_the_budget_allows(
    lengths: list[int], budget: int, cost: DocumentCost, multiple: int
) -> None:
    """A micro-batch without its shortest document costs no more than any other with room for that document."""
    dealt = deal_out(lengths, budget, multiple, cost)
    totals = [sum(cost(lengths[i]) for i in batch) for batch in dealt]
    room = [budget - sum(lengths[i] for i in batch) for batch in dealt]
    assert len(dealt) % multiple == 0 and min(room) >= 0
    for batch, total in zip(dealt, totals, strict=True):
        if not batch:
            continue
        shortest = min(lengths[i] for i in batch)
        for other, free in zip(totals, room, strict=True):
            assert total - cost(shortest) <= other or free < shortest


def test_fewer_documents_than_ranks_leave_empty_micro_batches() -> None:
    plan = plan_tokens([7, 30], 100, DocumentCost(1, 1), layout(4))
    assert plan.rows == [[(1, 0)], [(0, 0)], [], []]
    assert plan.length == 64


def test_documents_that_do_not_fit_together_take_more_micro_batches() -> None:
    cost = DocumentCost(1, 0)
    assert deal_out([7, 1, 7, 7], 12, 1, cost) == [[0, 1], [2], [3]], "22 tokens, but no two of 7 fit into 12"
    assert deal_out([4, 4, 4, 4, 4], 10, 1, cost) == [[0, 3], [1, 4], [2]], "20 tokens, but two of 10 hold only four"
    assert deal_out([4, 4, 4, 4, 4], 10, 2, cost) == [[0, 4], [1], [2], [3]]
    # two would do for these (6 + 6 and 4 + 4 + 4): balance comes before fullness
    assert deal_out([6, 6, 4, 4, 4], 12, 1, cost) == [[0, 4], [1], [2, 3]]


def test_a_document_longer_than_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="document 1 has 65 tokens: a micro-batch holds 1 to 64"):
        plan_tokens([3, 65], 66, DocumentCost(1, 1), layout(1), sequence_multiple=4)


@given(LENGTHS.filter(bool), st.integers(1, 4))
def test_collect_is_the_inverse_of_spread(lengths: list[int], micro_batch_size: int) -> None:
    transcripts = [plain(n) for n in lengths]
    plan = plan_rows(lengths, 70, micro_batch_size, layout(1))
    values = [np.arange(n, dtype=np.float32) + 100 * i for i, n in enumerate(lengths)]
    found: dict[int, Any] = {}
    for rows in plan.mine(layout(1)):
        writer = RowWriter(plan, rows, transcripts)
        out = writer.spread(values, fill=-7)
        base = writer.base()
        # the value of token j stands where the target is token j, in the same document
        used = base.segments >= 0
        assert (out[~used] == -7).all()
        for b, i, offset in writer.places:
            assert (out[b, offset : offset + lengths[i] - 1] - 100 * i).tolist() == list(range(1, lengths[i]))
            assert base.targets[b, offset : offset + lengths[i] - 1].tolist() == list(range(1, lengths[i]))
            assert base.positions[b, offset : offset + lengths[i]].tolist() == list(range(lengths[i]))
            assert out[b, offset + lengths[i] - 1] == -7, "nothing is predicted behind the last token"
        assert not found.keys() & writer.collect(out).keys()
        found |= writer.collect(out)
    for i, value in enumerate(values):
        assert found[i].tolist() == [0, *value[1:].tolist()]


# -- batches ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FORMATS)
def toy(request: pytest.FixtureRequest, runtime: Runtime) -> Toy:
    return Toy(runtime, request.param, LARGE, max_latent_tokens=3)


@pytest.fixture(scope="module")
def sampled(toy: Toy) -> list[Transcript]:
    model = toy.model(seed=4, lean=1.0)
    engine = MegatronEngine(model, toy.runtime, toy.latents, toy.tokenizer.vocab_size)
    jobs = [Job(toy.document(code, str(d)), (d, g)) for d, code in enumerate(CODES) for g in range(4)]
    return LatentSampler(engine, toy.latents, toy.tokenizer, 48, 16).sample(jobs)


def collected(toy: Toy, transcripts: list[Transcript], plan: Plan, name: str, batches: list[Any]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for rows, batch in zip(plan.mine(toy.runtime), batches, strict=True):
        found |= RowWriter(plan, rows, transcripts).collect(getattr(batch, name))
    return found


@pytest.mark.parametrize("thought_weight", [1.0, 0.25, 0.0])
def test_training_weights(toy: Toy, sampled: list[Transcript], thought_weight: float) -> None:
    """Every token but the first of a document is predicted once: code and decision markers at weight 1, thoughts and
    what the format writes around them at `thought_weight`."""
    plan = plan_rows([t.num_tokens for t in sampled], 60, 2, toy.runtime)
    batches = training_batches(sampled, plan, toy.runtime, thought_weight)
    weights, kinds = (collected(toy, sampled, plan, name, batches) for name in ("ce_weight", "kind"))
    kind_of = {Role.DECISION: Kind.DECISION, Role.THOUGHT: Kind.THOUGHT, Role.FORCED: Kind.FORCED}
    code = latent = 0
    for i, transcript in enumerate(sampled):
        is_latent = np.isin(transcript.roles, (Role.THOUGHT, Role.FORCED))
        assert weights[i][1:].tolist() == np.where(is_latent, thought_weight, 1.0)[1:].tolist()
        assert kinds[i][1:].tolist() == [kind_of.get(Role(role), Kind.CODE) for role in transcript.roles[1:]]
        code, latent = code + int((~is_latent[1:]).sum()), latent + int(is_latent.sum())
    assert latent > 20
    assert global_counts(batches, toy.runtime).ce == pytest.approx(code + thought_weight * latent)


def test_documents_of_a_row_do_not_see_each_other(toy: Toy, sampled: list[Transcript]) -> None:
    model = toy.model(seed=4)
    together = plan_rows([t.num_tokens for t in sampled], 200, 3, toy.runtime)
    assert max(len(row) for row in together.rows) > 3
    batches = training_batches(sampled, together, toy.runtime)
    found: dict[int, Any] = {}
    for rows, out in zip(together.mine(toy.runtime), forward(model, batches, toy.runtime), strict=True):
        found |= RowWriter(together, rows, sampled).collect(out[0])
    with torch.no_grad():
        for i, logits in enumerate(toy.full_logits(model, [t.ids for t in sampled])):
            ids = torch.as_tensor(sampled[i].ids.astype(np.int64))
            expected = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            np.testing.assert_allclose(found[i][1:], expected.numpy(), atol=1e-5)


def test_advantages_stand_at_the_choices_of_their_line(toy: Toy, sampled: list[Transcript]) -> None:
    plan = plan_rows([t.num_tokens for t in sampled], 60, 2, toy.runtime)
    advantages = [np.arange(1, t.num_lines + 1, dtype=np.float32) + 10 * i for i, t in enumerate(sampled)]
    batches = policy_batches(sampled, advantages, plan, toy.runtime, toy.latents, 0.5, 0.9)
    found = {
        name: collected(toy, sampled, plan, name, batches)
        for name in ("advantage", "entropy_weight", "behaviour", "decision")
    }
    for i, transcript in enumerate(sampled):
        chosen = choices_of(transcript, toy.latents).mask
        by_line = advantages[i][np.maximum(transcript.lines, 0)]
        assert found["advantage"][i].tolist() == np.where(chosen, by_line, 0).tolist()
        assert found["entropy_weight"][i].tolist() == np.where(chosen, 0.5, 0).tolist()
        assert transcript.log_probs is not None
        assert found["behaviour"][i].tolist() == transcript.log_probs.tolist()
        assert np.flatnonzero(found["decision"][i]).tolist() == (
            transcript.decision_positions[transcript.offered].tolist()
        )
    assert all(batch.choices is not None and batch.choices.temperature == 0.9 for batch in batches)
    assert global_counts(batches, toy.runtime).decisions == sum(int(t.offered.sum()) for t in sampled)


def test_documents_that_nobody_sampled_have_no_behaviour(toy: Toy, sampled: list[Transcript]) -> None:
    plan = plan_rows([t.num_tokens for t in sampled], 60, 2, toy.runtime)
    advantages = [np.ones(t.num_lines, np.float32) for t in sampled]
    mixed = [t.without_log_probs() for t in sampled]
    batches = policy_batches(mixed, advantages, plan, toy.runtime, toy.latents, 0.0, 1.0)
    assert all(batch.behaviour is None for batch in batches)


def test_choices(toy: Toy) -> None:
    """Numerators, denominators and merged outcomes, by the names that the format gives its token sets."""
    document = toy.document("a = b\n   b\nc\n")
    latents, thought = toy.latents, toy.thoughts_of(toy.document("a = b\n   b\nc\n"), 1)[-1]
    assert thought is not None and len(thought) == latents.max_thought_ids
    transcript = compose(document, {1: thought}, latents, toy.tokenizer)
    transcript = replace(transcript, offered=np.array([True, True, False]))
    choices = choices_of(transcript, latents)
    act = [latents.act_set(line.think_set) for line in document.lines]
    decisions = transcript.decision_positions
    inner = list(range(decisions[1] + 1, decisions[1] + len(thought)))
    assert np.flatnonzero(choices.mask).tolist() == [decisions[0], decisions[1], *inner]
    assert np.flatnonzero(choices.decision).tolist() == decisions[:2].tolist()
    assert choices.numerator[decisions[:2]].tolist() == [act[0], TARGET]
    assert choices.denominator[decisions[:2]].tolist() == [latents.universe] * 2
    assert choices.merged[decisions[:2]].tolist() == act[:2]
    for positions, wanted in ((choices.numerator, TARGET), (choices.denominator, latents.thought_set)):
        assert set(positions[inner].tolist()) == {wanted}
    assert set(choices.merged[inner].tolist()) == {TARGET}


def test_scoring_masks(toy: Toy, sampled: list[Transcript]) -> None:
    plan = plan_rows([t.num_tokens for t in sampled], 60, 2, toy.runtime)
    for everything in (False, True):
        batches = scoring_batches(sampled, plan, toy.runtime, toy.latents, everything)
        counted = sum(int(b.choices.mask.sum()) for b in batches if b.choices is not None)
        expected = sum(t.num_tokens - 1 if everything else int((t.roles == Role.EXPERT).sum()) for t in sampled)
        assert counted == expected


def test_only_first_visible_tokens_are_renormalised(toy: Toy) -> None:
    document = toy.document("a = b\n   b\n\tdd\n# a\n", human_comments="keep")
    transcript = raw(document, toy.latents, toy.tokenizer)
    rows = scoring_denominators(transcript, toy.latents)
    first = transcript.first_expert
    assert not np.delete(rows, first).any()
    if toy.latents.name == "tokens":
        assert (rows == ALL).all()
        return
    for line, row in enumerate(rows[first]):
        starts = toy.rules(int(transcript.ids[first[line]]))[0]
        missing = np.flatnonzero(~toy.latents.sets[row]).tolist()
        assert missing == (starts if line < 2 else [])  # behind a tab, and for a human comment, there is no decision
