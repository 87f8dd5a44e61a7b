"""log p(target) out of the output layer: values and gradients against float64, whole and split, kept and not."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.mcore import held_logits as module
from ra3_megatron.mcore.startup import initialize
from ra3_megatron.mcore.target_log_probs import target_log_probs
from ra3_megatron.mcore.vocab_parallel import shard_sets
from tests.processes import run_processes

VOCAB, PADDED, POSITIONS, HIDDEN = 150, 256, 60, 24


def make(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weights whose padding would win every softmax, targets, and a gradient."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(PADDED, HIDDEN, generator=generator).to(dtype)
    weight[VOCAB:] = 50.0
    targets = torch.randint(0, VOCAB, (POSITIONS,), generator=generator)
    targets[:2] = torch.tensor([0, VOCAB - 1])
    return hidden, weight, targets, torch.randn(POSITIONS, generator=generator)


def computed(
    dtype: torch.dtype, keep: bool, positions: int, rank: int = 0, world: int = 1, group: object = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Values and both gradients, of this rank's share."""
    hidden, weight, targets, given = make(dtype)
    size = PADDED // world
    share = weight[rank * size : (rank + 1) * size].clone().requires_grad_()
    hidden.requires_grad_()
    everything = torch.ones(1, VOCAB, dtype=torch.bool)
    shard = shard_sets(everything, PADDED, rank, world, group)  # type: ignore[arg-type]
    out = target_log_probs(hidden, share, targets, shard, keep, positions)
    of_hidden, of_weight = torch.autograd.grad(out, (hidden, share), given)
    return out.detach(), of_hidden, of_weight


def expected() -> tuple[Tensor, Tensor, Tensor]:
    """The same by the definition, in float64."""
    hidden, weight, targets, given = make()
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    out = (hidden @ weight[:VOCAB].t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return (out.detach(), *torch.autograd.grad(out, (hidden, weight), given.double()))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("positions", [7, 60, 1000])
def test_values_and_gradients(keep: bool, positions: int) -> None:
    for found, wanted in zip(computed(torch.float32, keep, positions), expected(), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_in_bf16_only_logits_and_their_gradient_are_rounded() -> None:
    hidden, weight, targets, given = make(torch.bfloat16)
    logits = hidden @ weight.t()
    total = logits[:, :VOCAB].float().logsumexp(-1)
    gradient = torch.zeros(POSITIONS, PADDED)
    gradient[:, :VOCAB] = -given[:, None] * (logits[:, :VOCAB].float() - total[:, None]).exp()
    gradient[torch.arange(POSITIONS), targets] += given
    values, of_hidden, of_weight = computed(torch.bfloat16, True, 17)
    torch.testing.assert_close(values, logits.float().gather(1, targets[:, None])[:, 0] - total, rtol=0, atol=2e-6)
    assert torch.equal(of_hidden, gradient.bfloat16() @ weight)
    assert torch.equal(of_weight, gradient.bfloat16().t() @ hidden)


def shares(keep: bool) -> list[list[Tensor]]:
    runtime = initialize(ParallelConfig(tensor=2, threads=1), seed=1)
    whole, of_hidden, of_weight = computed(torch.float32, keep, 9, runtime.tensor_rank, 2, runtime.tensor_group)
    torch.distributed.all_reduce(of_hidden, group=runtime.tensor_group)
    return [[whole, of_hidden, of_weight]]


@pytest.mark.multiprocess
@pytest.mark.parametrize("keep", [True, False])
def test_split_over_two_processes(keep: bool) -> None:
    """The second one's share has 22 tokens, and 106 that are padding."""
    first, second = run_processes(2, shares, keep)
    values, of_hidden, of_weight = expected()
    for found in (first[0], second[0]):
        torch.testing.assert_close(found[0].double(), values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1].double(), of_hidden, rtol=1e-5, atol=1e-5)
    together = torch.cat((first[0][2], second[0][2])).double()
    torch.testing.assert_close(together, of_weight, rtol=1e-5, atol=1e-5)


def test_a_share_that_is_all_padding() -> None:
    hidden, weight, targets, _ = make()
    shard = shard_sets(torch.ones(1, 100, dtype=torch.bool), PADDED, 1, 2, None)
    assert shard.real == 0
    out = target_log_probs(hidden, weight[128:].clone().requires_grad_(), targets, shard, True, 16)
    assert torch.equal(out.detach(), torch.full((POSITIONS,), torch.inf))


def test_it_can_be_differentiated_once() -> None:
    hidden, weight, targets, _ = make()
    shard = shard_sets(torch.ones(1, VOCAB, dtype=torch.bool), PADDED, 0, 1, None)
    out = target_log_probs(hidden.requires_grad_(), weight, targets, shard, True, 16).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        out.backward()


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_kept_and_how_many_products_there_are(keep: bool) -> None:
    """Kept: three products of the whole; else four, of so many positions at once."""
    sizes: list[tuple[int, ...]] = []
    plain = torch.mm

    def watched(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        sizes.append(tuple(out.shape))
        return plain(a, b, out=out)

    with patch.object(module.torch, "mm", watched):
        computed(torch.float32, keep, 30)
    logits, hidden = (30, PADDED), (30, HIDDEN)
    assert sizes == [logits, logits] + ([hidden, hidden] if keep else [logits, hidden, logits, hidden])
