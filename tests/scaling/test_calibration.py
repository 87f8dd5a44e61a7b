"""The step-time model against published measurements, those it was fitted to and the others."""

import numpy as np
import pytest

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.scaling.calibration import FITTED, Published, fit, published
from ra3_megatron.scaling.memory import GIB, Work, frozen_gib, memory
from ra3_megatron.scaling.rates import RATES
from ra3_megatron.scaling.step import group_bandwidth, step_time
from ra3_megatron.scaling.tables import architecture_named, gpu_named


def name(row: Published) -> str:
    return f"{row.row['model']}-{row.row['gpu']}-{row.row['gpus']}-{row.row['precision']}-{row.row['source']}"


def test_the_rates_are_those_that_the_fit_finds() -> None:
    found = fit()
    for key in FITTED:
        assert getattr(found, key) == pytest.approx(getattr(RATES, key), abs=0.002)


@pytest.mark.parametrize("row", [row for row in published() if row.fit], ids=name)
def test_fitted_rows_come_out(row: Published) -> None:
    assert abs(row.error()) < 0.01


@pytest.mark.parametrize("row", [row for row in published() if not row.fit], ids=name)
def test_other_rows_are_predicted(row: Published) -> None:
    assert abs(row.error()) < 0.15


def test_most_are_predicted_within_a_twentieth() -> None:
    errors = [abs(row.error()) for row in published() if not row.fit]
    assert len(errors) >= 20 and np.median(errors) < 0.05


def test_memory_of_a_published_run() -> None:
    """Llama 3.1 8B on 8 H100, CP 2: 44.27e9 bytes between steps, 70.83e9 at the peak (dgxc-benchmarking)."""
    made = architecture_named("llama3.1-8b", 8192)
    parallel = ParallelConfig(context=2, data=4, distributed_optimizer=True)
    found = memory(made.model, made.vocab_size, parallel, Work(8192, 128, 1, "bf16", 2))
    between = (found.weights + found.gradients + found.optimizer) * GIB
    assert between == pytest.approx(44.27e9, rel=0.01)
    assert (found.total - found.buffers) * GIB == pytest.approx(70.83e9, rel=0.12)


def test_more_work_takes_longer() -> None:
    """Not faster with: recomputation, messages that are not overlapped, a slower network, more rows."""
    made, gpu = architecture_named("llama3.1-70b", 8192), gpu_named("h100")
    base = {"tensor": 4, "pipeline": 4, "data": 8, "sequence": True, "distributed_optimizer": True}
    work = Work(8192, 128, 1)

    def seconds(work: Work = work, network: float = 50, **changes: object) -> float:
        parallel = ParallelConfig(**(base | changes))  # type: ignore[arg-type]
        slower = gpu.model_copy(update={"network_gb_s": network})
        return step_time(made.model, made.vocab_size, parallel, work, slower).total

    overlapped = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    assert seconds(virtual_pipeline=5) < seconds() < seconds(recompute="full")
    assert seconds(**overlapped) < seconds() < seconds(network=12.5)
    assert seconds(Work(8192, 256, 1)) > 1.8 * seconds()
    assert seconds(Work(8192, 128, 1, "fp8")) < seconds()


def test_rings_use_the_ports_of_all_their_ranks_in_a_node() -> None:
    gpu = gpu_named("h100")
    assert group_bandwidth(gpu, 1, 8) == 450e9 * RATES.link
    assert group_bandwidth(gpu, 1, 16) == 400e9 * RATES.link
    assert group_bandwidth(gpu, 4, 16) == 100e9 * RATES.link
    assert group_bandwidth(gpu, 8, 16) == 50e9 * RATES.link


def test_weights_in_fp8_come_beside_those_in_bf16() -> None:
    """Two bytes for each weight of the layers' products; of Llama-3.1-8B's, but for tables and norms."""
    made = architecture_named("llama3.1-8b", 8192)
    parallel = ParallelConfig()
    plain = memory(made.model, made.vocab_size, parallel, Work(8192, 1, 1))
    eight = memory(made.model, made.vocab_size, parallel, Work(8192, 1, 1, "fp8"))
    products = 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)
    assert eight.weights - plain.weights == pytest.approx(2 * products / 2**30)
    gathered = made.model.model_copy(update={"fp8": made.model.fp8.model_copy(update={"parameter_gather": True})})
    assert memory(gathered, made.vocab_size, parallel, Work(8192, 1, 1, "fp8")).weights == plain.weights


def test_a_frozen_model_has_one_copy_in_fp8_and_gathers_none() -> None:
    """Also where its weights are in host memory, and where the trained model's are kept in FP8."""
    made = architecture_named("llama3.1-8b", 8192)
    gathered = made.model.model_copy(update={"fp8": made.model.fp8.model_copy(update={"parameter_gather": True})})
    parallel, eight = ParallelConfig(), Work(8192, 1, 1, "fp8")
    away = parallel.model_copy(update={"offload_scorer": True})
    plain = memory(made.model, made.vocab_size, parallel, Work(8192, 1, 1)).weights
    copy = 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336) / 2**30
    assert frozen_gib(made.model, made.vocab_size, parallel, Work(8192, 1, 1)) == pytest.approx(plain)
    assert frozen_gib(made.model, made.vocab_size, away, Work(8192, 1, 1)) == 0.0
    for model in (made.model, gathered):
        assert frozen_gib(model, made.vocab_size, parallel, eight) == pytest.approx(plain + copy)
        assert frozen_gib(model, made.vocab_size, away, eight) == pytest.approx(copy)


def test_logits_are_kept_or_computed_again() -> None:
    made = architecture_named("llama3.1-8b", 8192)
    work = Work(8192, 2, 2)
    kept = memory(made.model, made.vocab_size, ParallelConfig(), work)
    again = memory(made.model, made.vocab_size, ParallelConfig(recompute_logits=True), work)
    assert kept.logits - again.logits == pytest.approx(2 * 8192 * 128_256 * 2 / 2**30)


def test_memory_that_is_offloaded() -> None:
    """The optimizer's state is there in turn with activations; so many layers' activations are not there at all."""
    made = architecture_named("llama3.1-8b", 8192)
    parallel = ParallelConfig(context=2, data=4, distributed_optimizer=True)
    work = Work(8192, 128, 1, "bf16", 2)
    plain = memory(made.model, made.vocab_size, parallel, work)
    off = memory(made.model, made.vocab_size, parallel.model_copy(update={"offload_optimizer": True}), work)
    assert off.optimizer == pytest.approx(max(0.0, plain.optimizer - plain.activations - plain.logits))
    assert off.total < plain.total and off.activations == plain.activations
    some = memory(made.model, made.vocab_size, parallel.model_copy(update={"offload_activations": 8}), work)
    assert some.activations == pytest.approx(plain.activations * 24 / 32) and some.optimizer == plain.optimizer
