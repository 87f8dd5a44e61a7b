"""The parts of a step add up to it, whatever opens and closes them; Megatron's schedules feed the clock.

How long a part takes is nobody's to promise: only order, sums and who gets which moment are tested.
"""

from __future__ import annotations

import time
from typing import get_args

import pytest
import torch

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.mcore.startup import Runtime, initialize
from ra3_megatron.mcore.step_clock import Part, StepClock
from ra3_megatron.report.metrics import PARTS, TIME_FIELDS
from tests.mcore.small_models import MODEL, make_documents, make_trainer, micro_batches, put_in_rows
from tests.processes import run_processes

NAP = 0.02
DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]
OF_TRAINING = {"data", "forward", "backward", "grad_reduce", "optimizer", "other"}
LAYOUTS = (
    {"pipeline": 2, "tensor": 2},
    {"pipeline": 2, "virtual_pipeline": 2, "data": 2, "overlap_grad_reduce": True},
    {"tensor": 2, "data": 2, "distributed_optimizer": True},
)


def test_the_report_knows_every_part() -> None:
    assert set(PARTS) == set(get_args(Part))
    assert {f"seconds_{part}" for part in get_args(Part)} <= TIME_FIELDS


@pytest.mark.parametrize("device", DEVICES)
def test_each_moment_belongs_to_the_innermost_part(device: torch.device) -> None:
    clock = StepClock(device)
    begin = time.perf_counter()
    with clock.step():
        with clock.part("sampling"):
            time.sleep(NAP)
            with clock.part("refit"):
                time.sleep(2 * NAP)
            time.sleep(NAP)
        time.sleep(NAP)
        with clock.part("refit"):
            time.sleep(NAP)
    wall = time.perf_counter() - begin
    assert clock.seconds.keys() == {"sampling", "refit", "other"}
    assert clock.seconds["sampling"] >= 1.9 * NAP
    assert clock.seconds["refit"] >= 2.9 * NAP
    assert clock.seconds["other"] >= 0.9 * NAP
    assert 4.9 * NAP <= sum(clock.seconds.values()) <= wall + 1e-3


@pytest.mark.gpu
def test_work_that_was_only_queued_counts_where_it_was_queued() -> None:
    device = torch.device("cuda")
    a = torch.randn(4000, 4000, device=device)
    clock = StepClock(device)
    for _ in range(2):  # the first time, libraries are loaded
        with clock.step():
            with clock.part("forward"):
                for _ in range(20):
                    a = (a @ a).clamp(-1, 1)
            with clock.part("data"):
                pass
    assert clock.seconds["forward"] > clock.seconds["data"]


def test_outside_of_a_step_nothing_is_measured() -> None:
    clock = StepClock()
    with clock.part("scoring"), clock.schedule(pipelined=True):
        clock.timers("forward-compute", log_level=2).start()
        clock.timers("forward-compute").stop()
    assert clock.seconds == {}


def test_megatrons_timers_count_inside_a_schedule_alone() -> None:
    clock = StepClock()
    with clock.step():
        with clock.part("sampling"):  # a pass of the sampler through the stages of the model
            clock.timers("forward-compute", log_level=2).start()
            time.sleep(NAP)
            clock.timers("forward-compute").stop()
        with clock.schedule(pipelined=True):
            clock.timers("forward-backward", log_level=1).start(barrier=True)
            clock.timers("forward-recv", log_level=2).start()
            clock.timers("backward-compute").stop()  # never started
            time.sleep(NAP)
            clock.timers("forward-recv").stop()
            clock.timers("forward-compute", log_level=2).start()
            clock.timers("a name of another version").start()
            time.sleep(NAP)
            clock.timers("forward-compute").stop()
            clock.timers("forward-backward").stop()
    assert clock.seconds.keys() == {"sampling", "pipeline", "forward", "other"}
    assert all(clock.seconds[part] >= 0.9 * NAP for part in ("sampling", "pipeline", "forward"))


def test_a_step_that_fails_leaves_a_clock_that_goes_on() -> None:
    clock = StepClock()
    with pytest.raises(ValueError), clock.step(), clock.schedule(pipelined=False):
        clock.timers("forward-compute").start()
        raise ValueError
    assert clock.seconds == {}
    with clock.step():
        pass
    assert clock.seconds.keys() == {"other"}


def test_a_profiler_sees_the_parts_as_ranges() -> None:
    clock = StepClock()
    with torch.profiler.profile() as profile, clock.step():
        clock.ranges = torch.profiler.record_function
        with clock.part("scoring"), clock.part("data"):
            torch.ones(3)
    found = {event.name: event for event in profile.events()}
    assert found["scoring"].time_range.start <= found["data"].time_range.start
    assert found["data"].time_range.end <= found["scoring"].time_range.end


def parts_of_a_step(parallel: ParallelConfig, runtime: Runtime) -> tuple[dict[Part, float], float]:
    """Seconds of the parts of one train step, and of all of it by another clock."""
    trainer = make_trainer(parallel, runtime, model=MODEL.model_copy(update={"num_layers": 4}))
    batches = micro_batches(put_in_rows(make_documents(24, seed=1)), runtime, 1)
    begin = time.perf_counter()
    with trainer.clock.step():
        trainer.step(batches)
    return trainer.clock.seconds, time.perf_counter() - begin


def check(seconds: dict[Part, float], wall: float, pipelined: bool) -> None:
    assert seconds.keys() == OF_TRAINING | ({"pipeline"} if pipelined else set())
    assert min(seconds.values()) >= 0 and min(seconds["forward"], seconds["backward"], seconds["optimizer"]) > 0
    assert 0 < sum(seconds.values()) <= wall + 1e-3


def test_a_train_step(runtime: Runtime) -> None:
    check(*parts_of_a_step(ParallelConfig(threads=1), runtime), pipelined=False)


def in_four_processes() -> list[tuple[dict[Part, float], float]]:
    found = []
    for layout in LAYOUTS:
        parallel = ParallelConfig(threads=1, **layout)
        found.append(parts_of_a_step(parallel, initialize(parallel, seed=1)))
    return found


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_train_step_of_several_processes() -> None:
    for rank in run_processes(4, in_four_processes, timeout=360):
        for layout, (seconds, wall) in zip(LAYOUTS, rank, strict=True):
            check(seconds, wall, pipelined="pipeline" in layout)
            assert seconds.get("pipeline", 1.0) > 0
