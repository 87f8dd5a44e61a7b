"""On a GPU, the same stream through memory of the device, shared with another process by a CUDA IPC handle."""

from __future__ import annotations

import pytest
import torch
from collected import EngineProcess, differing, expected_tensors

import ra3_megatron.mcore  # noqa: F401
from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.hf.families import family_for
from ra3_megatron.hf.finite import FiniteStream, first_not_finite
from ra3_megatron.mcore.model import language_model
from ra3_megatron.mcore.startup import initialize
from ra3_megatron.rollout.refit.errors import RefitError
from ra3_megatron.rollout.refit.refit import Refit
from tests.mcore.small_models import MODEL, VOCAB, build, weights
from tests.processes import run_processes


def refit_on_the_device() -> list[str]:
    """Names of tensors that another process got wrong."""
    parallel = ParallelConfig(threads=1)
    runtime = initialize(parallel, seed=1)
    assert runtime.device.type == "cuda"
    model = build(parallel, runtime)
    links = family_for(MODEL).links(MODEL, VOCAB)
    refit = Refit(model, runtime, links, "colocated", receivers=1, bucket_bytes=8192, timeout=60.0)
    engine = EngineProcess()
    wrong = []
    expected = {n: t.cpu() for n, t in expected_tensors(weights(model, runtime), links).items()}
    for version in range(2):
        refit.send([engine.update], version)
        wrong += differing(engine.weights, expected)
    weight = language_model(model).decoder.final_layernorm.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[3] = float("nan")
    try:
        refit.send([engine.update], 2)
        wrong.append("a weight that is not finite was sent")
    except RefitError as error:
        if "tensor model.norm.weight holds values that are not finite" not in str(error):
            wrong.append(str(error))
    with torch.no_grad():
        weight.copy_(before)
    refit.send([engine.update], 3)
    wrong += differing(engine.weights, expected)
    refit.close()
    engine.close()
    return wrong


@pytest.mark.gpu
@pytest.mark.multiprocess
def test_weights_go_through_memory_of_the_device() -> None:
    assert run_processes(1, refit_on_the_device) == [[]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_found_on_the_device(value: float, dtype: torch.dtype) -> None:
    """By one verdict for many tensors: in the kernels' first and last block, and beside the largest finite numbers."""
    for place in (0, 66_666, 300_000):
        good = torch.full((300_001,), torch.finfo(dtype).max, dtype=dtype, device="cuda")
        bad = good.clone()
        bad[place] = value
        assert first_not_finite(["a", "b", "c"], [good, good[1:], bad]) == "c"
        stream = FiniteStream()
        assert stream.add("a", good) is None and stream.finish() is None
        assert stream.add("b", bad) is None and stream.finish() == "b"
