"""The pass that leaves Megatron-Core's modules out computes what they compute, bit for bit."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from ra3_megatron.config.model import ModelConfig, ParallelConfig, RopeScalingConfig
from ra3_megatron.mcore.direct_pass import DirectPass, takes
from ra3_megatron.mcore.model import chunks_of
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rollout.kv_session import KVSession
from ra3_megatron.rollout.stage_pass import StagePass
from tests.mcore.small_models import MODEL, VOCAB, build

MODULES_ARE_OURS = pytest.mark.skipif(
    torch.cuda.is_available(), reason="about Megatron-Core's own layers; on a GPU they are Transformer Engine's"
)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied, scaled": {
        "tied_embeddings": True,
        "rope_scaling": RopeScalingConfig(kind="llama3", factor=4.0, original_context_length=16),
    },
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "num_query_groups": 1},
    "every head its own": {"num_query_groups": 4, "head_dim": None},
}


def model_of(runtime: Runtime, **changes: Any) -> torch.nn.Module:
    """With weights of norms and biases that are not their initial ones and zeros."""
    model = build(ParallelConfig(threads=1), runtime, ModelConfig(**(MODEL.model_dump() | changes)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.device, parameter.dtype), alpha=0.3)
    return model


def history(stage: StagePass) -> list[Tensor]:
    """Hidden states of passes over rows that grow by few or many tokens, rest, are cut and copied; and the caches."""
    draw = random.Random(7)
    session = KVSession(stage)
    session.open(3)
    found = []
    for longest in (20, 1, 6, 1):
        new = [[draw.randrange(VOCAB) for _ in range(draw.randint(1, longest))] for _ in range(session.rows)]
        if longest == 6:
            new[0] = []
        found.append(session.feed(new)[0])
        session.cut([max(1, length - draw.randint(0, 2)) for length in session.lengths])
        session.select([1, 0, 2, 2][: session.rows + 1])
    return found + [tensor for cache in session.caches for tensor in (cache.keys, cache.values)]


@MODULES_ARE_OURS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_is_the_modules_bit_for_bit(runtime: Runtime, name: str, precision: str) -> None:
    model = model_of(runtime, precision=precision, **ARCHITECTURES[name])
    stage = StagePass(model, runtime)
    assert stage.direct
    through_modules = history(StagePass(model, runtime, direct=False))
    directly = history(stage)
    assert all(torch.equal(one, other) for one, other in zip(directly, through_modules, strict=True))
    assert directly[0].abs().mean() > 0.1


@MODULES_ARE_OURS
def test_it_follows_the_weights(runtime: Runtime) -> None:
    """They are read where they are, not copied."""
    model = model_of(runtime)
    stage, modules = StagePass(model, runtime), StagePass(model, runtime, direct=False)
    before = history(stage)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = history(stage)
    assert all(torch.equal(one, other) for one, other in zip(after, history(modules), strict=True))
    assert not torch.equal(before[0], after[0])


def test_weights_that_are_gathered_when_a_module_is_called_are_waited_for(runtime: Runtime) -> None:
    model = model_of(runtime)
    stage = StagePass(model, runtime)
    called = []
    (chunk,) = chunks_of(model)
    hook = chunk.decoder.layers[1].mlp.linear_fc2.register_forward_pre_hook(lambda *_: called.append(1))
    assert not stage.direct
    history(stage)
    assert called
    hook.remove()
    assert stage.direct


def test_experts_go_through_their_modules(runtime: Runtime) -> None:
    model = model_of(runtime, num_experts=4, experts_per_token=2, expert_ffn_hidden_size=24)
    (chunk,) = chunks_of(model)
    assert not takes(chunk) and not StagePass(model, runtime).direct
    with pytest.raises(ValueError, match="more to them than a direct pass computes"):
        DirectPass(chunk)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_on_a_gpu_it_is_the_modules_but_for_rounding(runtime: Runtime, name: str) -> None:
    """There the layers of a bf16 model are Transformer Engine's where that is installed."""
    model = model_of(runtime, precision="bf16", **ARCHITECTURES[name])
    directly = history(StagePass(model, runtime))
    through_modules = history(StagePass(model, runtime, direct=False))
    for one, other in zip(directly, through_modules, strict=True):
        difference = (one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-6)
        assert difference < 2e-2
