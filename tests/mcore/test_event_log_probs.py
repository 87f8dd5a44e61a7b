"""log P(A | B) and entropies over a split vocabulary, against float64 by the definition, values and gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.mcore.startup import initialize
from ra3_megatron.mcore.vocab_parallel import ALL, TARGET, event_log_probs, shard_sets
from tests.processes import run_processes

VOCAB, PADDED, POSITIONS = 150, 256, 60


@dataclass(frozen=True)
class Case:
    """Events at random positions; logits are [n, PADDED], those of the padding too large to be overlooked."""

    logits: Tensor
    targets: Tensor
    sets: Tensor
    numerator: Tensor | None
    denominator: Tensor | None
    merged: Tensor | None
    grads: Tensor
    """Gradient of a loss with respect to both results, [2, n]."""


def make_case(seed: int, scale: float = 3.0, plain: bool = False, dtype: torch.dtype = torch.float32) -> Case:
    generator = torch.Generator().manual_seed(seed)
    # rows: 0 everything; 1, 2 a set and its complement; 3 half of 2; 4 one token; 5 tokens of the first half only
    sets = torch.zeros(6, VOCAB, dtype=torch.bool)
    sets[0] = True
    sets[1] = torch.rand(VOCAB, generator=generator) < 0.2
    sets[2] = ~sets[1]
    sets[3] = sets[2] & (torch.rand(VOCAB, generator=generator) < 0.5)
    sets[4, int(torch.randint(0, VOCAB, (), generator=generator))] = True
    sets[5, :60] = True
    inside = {
        0: (TARGET, 1, 2, 3, 4, 5),
        1: (TARGET, 1),
        2: (TARGET, 2, 3),
        3: (TARGET, 3),
        4: (TARGET, 4),
        5: (TARGET, 5),
    }

    def pick(choices: tuple[int, ...]) -> int:
        return choices[int(torch.randint(0, len(choices), (), generator=generator))]

    denominator = torch.tensor([pick((0, 0, 1, 2, 3, 4, 5)) for _ in range(POSITIONS)])
    numerator = torch.tensor([pick(inside[int(row)]) for row in denominator])
    merged = torch.tensor([pick((TARGET, *inside[int(row)])) for row in denominator])
    targets = torch.tensor([pick(tuple(torch.nonzero(sets[row]).flatten().tolist())) for row in denominator])
    logits = scale * torch.randn(POSITIONS, PADDED, generator=generator)
    logits[:, VOCAB:] = 1000.0
    return Case(
        logits=logits.to(dtype),
        targets=targets,
        sets=sets,
        numerator=None if plain else numerator,
        denominator=None if plain else denominator,
        merged=None if plain else merged,
        grads=torch.randn(2, POSITIONS, generator=generator),
    )


def computed(case: Case, rank: int = 0, world: int = 1, group: object = None) -> tuple[Tensor, Tensor, Tensor]:
    """log P, entropy, and the gradient of this share of the logits."""
    return all_computed(case, rank, world, group)[:3]


def all_computed(
    case: Case, rank: int = 0, world: int = 1, group: object = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, and the margin of the target."""
    shard = shard_sets(case.sets, PADDED, rank, world, group)  # type: ignore[arg-type]
    logits = case.logits.chunk(world, dim=1)[rank].clone().requires_grad_()
    log_prob, entropy, margin = event_log_probs(
        logits, case.targets, shard, case.numerator, case.denominator, case.merged
    )
    (case.grads[0] * log_prob + case.grads[1] * entropy).sum().backward()
    assert logits.grad is not None and not margin.requires_grad
    return log_prob.detach(), entropy.detach(), logits.grad, margin


def brute_force(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the definition, in float64, one position at a time."""
    logits = case.logits.double().requires_grad_()
    log_probs, entropies = [], []
    for i in range(len(logits)):
        x = logits[i, :VOCAB]
        b = case.sets[ALL if case.denominator is None else int(case.denominator[i])]
        a_row = TARGET if case.numerator is None else int(case.numerator[i])
        m_row = TARGET if case.merged is None else int(case.merged[i])
        log_z = x[b].logsumexp(0)
        log_probs.append((x[case.targets[i]] if a_row == TARGET else x[case.sets[a_row]].logsumexp(0)) - log_z)
        outcomes = [x[b & case.sets[m_row]].logsumexp(0)[None]] if m_row != TARGET else []
        alone = b if m_row == TARGET else b & ~case.sets[m_row]
        log_p = torch.cat([*outcomes, x[alone]]) - log_z
        entropies.append(-(log_p.exp() * log_p).sum())
    log_prob, entropy = torch.stack(log_probs), torch.stack(entropies)
    (case.grads[0] * log_prob + case.grads[1] * entropy).sum().backward()
    assert logits.grad is not None
    return log_prob.detach(), entropy.detach(), logits.grad


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for name, x, y in zip(("log_prob", "entropy", "gradient"), found, expected, strict=True):
        torch.testing.assert_close(
            x.double(), y.double(), rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_values_and_gradients_are_those_of_the_definition(seed: int, plain: bool) -> None:
    case = make_case(seed, plain=plain)
    assert_equal(computed(case), brute_force(case), 2e-6)


@pytest.mark.parametrize("plain", [False, True])
def test_the_margin_is_0_where_the_target_is_the_likeliest_token(plain: bool) -> None:
    case = make_case(6, plain=plain)
    case.targets[::2] = case.logits[::2, :VOCAB].argmax(-1)
    margin = all_computed(case)[3]
    for i in range(POSITIONS):
        allowed = case.sets[ALL if case.denominator is None else int(case.denominator[i])]
        logits = case.logits[i, :VOCAB].masked_fill(~allowed, -torch.inf)
        assert float(margin[i]) == pytest.approx(float(logits[case.targets[i]] - logits.max()), abs=1e-5)
    assert plain is False or bool((margin[::2] == 0).all() and (margin < 0).any())


@pytest.mark.parametrize("seed", range(3))
def test_extreme_logits(seed: int) -> None:
    """Logits of +-80: most sets' probabilities underflow fp32, their log-probabilities do not."""
    case = make_case(seed, scale=1.0)
    case.logits[:, :VOCAB] = case.logits[:, :VOCAB].sign() * 80
    case.logits[0, :VOCAB], case.logits[0, case.targets[0]] = 80, -80
    expected = brute_force(case)
    found = computed(case)
    assert all(bool(x.isfinite().all()) for x in found)
    assert float(found[0].min()) < -150
    assert_equal(found, expected, 1e-5)


def test_a_set_of_tiny_probability() -> None:
    """log P of a set that holds 1e-30 of the mass, and the entropy in which it is one outcome."""
    case = make_case(3)
    assert case.numerator is not None and case.denominator is not None and case.merged is not None
    case.logits[:, :VOCAB] = torch.where(case.sets[1], case.logits[:, :VOCAB] - 69, case.logits[:, :VOCAB])
    case.numerator[:], case.denominator[:], case.merged[:] = 1, ALL, torch.tensor([1, 2]).repeat(POSITIONS // 2)
    expected = brute_force(case)
    assert 1e-33 < float(expected[0].exp().median()) < 1e-27
    assert_equal(computed(case), expected, 1e-5)


def test_bf16_logits_are_computed_in_fp32() -> None:
    case = make_case(4, dtype=torch.bfloat16)
    log_prob, entropy, gradient = computed(case)
    expected = brute_force(case)
    assert log_prob.dtype == entropy.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    for x, y in zip((log_prob, entropy), expected[:2], strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), expected[2], rtol=1e-2, atol=1e-6)


def test_padding_has_no_probability_and_no_gradient() -> None:
    case = make_case(5)
    _, _, gradient = computed(case)
    assert torch.equal(gradient[:, VOCAB:], torch.zeros(POSITIONS, PADDED - VOCAB))
    without = Case(**{**vars(case), "logits": torch.cat([case.logits[:, :VOCAB], -case.logits[:, VOCAB:]], 1)})
    for x, y in zip(computed(case), computed(without), strict=True):
        assert torch.equal(x, y)


def test_inputs_are_left_alone() -> None:
    case = make_case(6)
    before = case.logits.clone()
    event_log_probs(
        case.logits, case.targets, shard_sets(case.sets, PADDED, 0, 1, None), case.numerator, case.denominator
    )
    assert torch.equal(case.logits, before)


def split_vocabulary() -> list[tuple[Tensor, ...]]:
    import torch.distributed as dist

    runtime = initialize(ParallelConfig(tensor=2, threads=1), seed=1)
    sizes: list[int] = []
    plain = dist.all_reduce

    def counted(tensor: Tensor, *args: object, **kwargs: object) -> object:
        sizes.append(tensor.numel())
        return plain(tensor, *args, **kwargs)

    dist.all_reduce = counted
    results = []
    for number, case in enumerate(split_cases()):
        sizes.clear()
        results.append(computed(case, runtime.tensor_rank, 2, runtime.tensor_group))
        assert len(sizes) == 2, f"case {number}: one MAX and one SUM all-reduce"
        assert max(sizes) <= 6 * POSITIONS, f"case {number}: a few numbers a position, not the vocabulary: {sizes}"
    return results


def split_cases() -> list[Case]:
    return [*(make_case(seed) for seed in range(4)), make_case(7, plain=True), make_case(8, scale=60.0)]


@pytest.mark.multiprocess
def test_a_split_vocabulary_gives_the_same() -> None:
    first, second = run_processes(2, split_vocabulary)
    for case, a, b in zip(split_cases(), first, second, strict=True):
        whole = computed(case)
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        assert_equal((a[0], a[1], torch.cat([a[2], b[2]], dim=1)), whole, 1e-6)
