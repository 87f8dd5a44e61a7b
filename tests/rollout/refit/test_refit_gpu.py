"""On a GPU, the same stream through memory of the device, shared with another process by a CUDA IPC handle."""

from __future__ import annotations

import pytest
from collected import EngineProcess, differing, expected_tensors

import ra3_megatron.mcore  # noqa: F401
from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.hf.families import family_for
from ra3_megatron.mcore.startup import initialize
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
    refit.close()
    engine.close()
    return wrong


@pytest.mark.gpu
@pytest.mark.multiprocess
def test_weights_go_through_memory_of_the_device() -> None:
    assert run_processes(1, refit_on_the_device) == [[]]
