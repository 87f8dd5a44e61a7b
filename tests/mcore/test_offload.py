"""Tensors that are parked in host memory hold nothing while parked, and change no number.

On a CPU the device is the host itself: what is tested is everything but the speed and the place of the copies.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.mcore import checkpoint
from ra3_megatron.mcore.hardware import has_transformer_engine
from ra3_megatron.mcore.offload import Parking, on_device, optimizer_tensors, park, require_offload
from ra3_megatron.mcore.startup import initialize
from ra3_megatron.mcore.trainer import NonFiniteLoss, Trainer
from tests.mcore.small_models import MODEL, build, make_documents, make_trainer, micro_batches, put_in_rows, weights

SINGLE = ParallelConfig(threads=1)
CPU = torch.device("cpu")
BF16 = MODEL.model_copy(update={"precision": "bf16"})


def step(trainer: Trainer, seed: int) -> tuple[float, float]:
    result = trainer.step(micro_batches(put_in_rows(make_documents(8, seed)), trainer.runtime, 2))
    return result.loss, result.grad_norm


def state_bytes(trainer: Trainer) -> int:
    return sum(tensor.nbytes for tensor in optimizer_tensors(trainer.optimizer, trainer.model))


@pytest.mark.parametrize("model", [MODEL, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [False, True])
def test_an_offloaded_optimizer_makes_the_same_steps(model: ModelConfig, distributed: bool, tmp_path: Path) -> None:
    """Also over checkpoints, written and read while it is parked, and over a step that is refused."""
    plain = SINGLE.model_copy(update={"distributed_optimizer": distributed})
    saving = plain.model_copy(update={"offload_optimizer": True})
    runtime = initialize(plain, seed=1)
    expected, found = make_trainer(plain, runtime, model=model), make_trainer(saving, runtime, model=model)
    assert [step(expected, seed) for seed in (1, 2)] == [step(found, seed) for seed in (1, 2)]
    size = state_bytes(expected)
    parameters = sum(parameter.numel() for parameter in expected.model.parameters())
    copies = 2 if model.precision == "fp32" else 3
    assert size >= copies * 4 * parameters and state_bytes(found) == 0
    assert found._parking is not None and found._parking.nbytes == size

    broken = micro_batches(put_in_rows(make_documents(8, 9)), runtime, 2)
    assert broken[0].ce_weight is not None
    broken[0].ce_weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteLoss):
        found.step(broken)
    assert state_bytes(found) == 0

    for name, trainer in (("expected", expected), ("found", found)):
        checkpoint.save(tmp_path / name, trainer.model, runtime, {}, trainer)
    later = [make_trainer(saving, runtime, model=model), make_trainer(plain, runtime, model=model)]
    for name, trainer in zip(("expected", "found"), later, strict=True):
        checkpoint.load(tmp_path / name, trainer.model, runtime, trainer)
    assert state_bytes(later[0]) == 0 and state_bytes(later[1]) == size
    results = [step(trainer, 3) for trainer in (expected, found, *later)]
    assert len(set(results)) == 1
    first, *others = (weights(trainer.model, runtime) for trainer in (expected, found, *later))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


class Quantized(torch.Tensor):
    """A weight without a storage of its own, as Transformer Engine's in FP8 are."""

    @staticmethod
    def __new__(cls) -> Quantized:
        wrapper = torch.Tensor._make_wrapper_subclass(cls, (2, 2), dtype=torch.bfloat16)  # type: ignore[attr-defined]
        found: Quantized = wrapper
        return found

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function is torch.ops.aten.detach.default
        return cls()


def test_the_optimizer_of_weights_in_fp8_is_offloaded() -> None:
    """Their fp32 originals are its own, and the fp32 weights of the model are not."""
    model = torch.nn.Module()
    model.rounded, model.plain = torch.nn.Parameter(Quantized()), torch.nn.Parameter(torch.zeros(3))
    original = torch.ones(4)
    adam = torch.optim.AdamW([original, model.plain.data[1:]])
    found = list(optimizer_tensors(SimpleNamespace(optimizer=adam), model))
    assert len(found) == 1 and found[0] is original


def test_a_parked_model_is_there_while_it_is_needed() -> None:
    runtime = initialize(SINGLE, seed=1)
    model = build(SINGLE, runtime).requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    park(model, CPU)
    for _ in range(2):
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        with on_device(model), on_device(model):
            assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        with pytest.raises(KeyError), on_device(model):
            raise KeyError
    other = build(SINGLE, runtime)
    with on_device(other):
        assert all(parameter.numel() for parameter in other.parameters())


def test_tensors_may_come_and_go() -> None:
    """An optimizer's moments appear with its first step, and a loaded state may bring others."""
    tensors = [torch.arange(3.0)]
    parking = Parking(lambda: tensors, CPU)
    with parking.resident():
        tensors.append(torch.ones(2))
    assert [tensor.numel() for tensor in tensors] == [0, 0] and parking.nbytes == 20
    with parking.resident():
        assert [tensor.tolist() for tensor in tensors] == [[0.0, 1.0, 2.0], [1.0, 1.0]]
        tensors[0] = torch.full((4,), 7.0)
    with parking.resident():
        assert [tensor.tolist() for tensor in tensors] == [[7.0] * 4, [1.0, 1.0]] and parking.nbytes == 0


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_scorer", "offload_activations"])
def test_a_cpu_has_no_gpu_memory_to_save(key: str) -> None:
    value = 2 if key == "offload_activations" else True
    with pytest.raises(
        UserError, match=rf"^parallel.{key}={str(value).lower()}: there is no GPU memory to save on a CPU"
    ):
        require_offload(ParallelConfig(**{key: value}), CPU)
    require_offload(ParallelConfig(), CPU)
    if key == "offload_activations" and not has_transformer_engine(torch.device("cuda")):
        with pytest.raises(UserError, match=r"^parallel.offload_activations=2: needs Transformer Engine"):
            require_offload(ParallelConfig(**{key: value}), torch.device("cuda"))
    else:
        require_offload(ParallelConfig(**{key: value}), torch.device("cuda"))


def test_layers_whose_activations_are_offloaded() -> None:
    from ra3_megatron.config.layouts import layout_problems
    from ra3_megatron.mcore.model import transformer_config

    model = ModelConfig(num_layers=4, precision="bf16")
    (line,) = layout_problems(ModelConfig(num_layers=4), ParallelConfig(offload_activations=1))
    assert line.startswith("parallel.offload_activations=1 does not go with model.precision=fp32")
    (line,) = layout_problems(model, ParallelConfig(offload_activations=4))
    assert line.startswith("parallel.offload_activations=4 must be below model.num_layers=4")
    config = transformer_config(model, ParallelConfig(offload_activations=3))
    assert config.cpu_offloading and config.cpu_offloading_num_layers == 3
    for keys, said in (({"pipeline": 2}, "parallel.pipeline=2"), ({"recompute": "full"}, "parallel.recompute=full")):
        with pytest.raises(ValueError, match=f"parallel.offload_activations=1 does not go with {said}"):
            ParallelConfig.model_validate({"offload_activations": 1, **keys})
