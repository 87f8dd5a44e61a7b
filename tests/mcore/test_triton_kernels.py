"""Our kernels, run by Triton's interpreter on a CPU, against torch's operations; `tests/gpu` runs them on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

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
print("all equal")
"""


def test_by_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[-2] == "all equal"
