"""Where the seconds of a run's steps went, and `profile.*`: traces of chosen steps, refusals, no number changed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import Ra3, curves, metrics

from ra3_megatron.config.differences import differences
from ra3_megatron.config.load import load_config
from ra3_megatron.config.profile import ProfileConfig
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.step_clock import StepClock
from ra3_megatron.report.metrics import PARTS
from ra3_megatron.training.profiling import Profiler
from ra3_megatron.training.step_times import StepTimes

TRAINING = {"data", "forward", "backward", "grad_reduce", "optimizer", "other"}
ESTEP = TRAINING | {"sampling", "refit", "scoring"}
PHASES = {"warm_start": TRAINING, "ntp": TRAINING, "mstep": TRAINING, "estep": ESTEP}
needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without CUDA")


def steps_of(run: Path, phase: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["phase"] == phase and "seconds_other" in line]


def parts_of(line: dict[str, Any]) -> dict[str, float]:
    return {part: line[f"seconds_{part}"] for part in PARTS if f"seconds_{part}" in line}


@pytest.mark.parametrize("phase", PHASES)
def test_every_step_says_where_its_seconds_went(phase: str, finished: Path) -> None:
    lines = steps_of(finished, phase)
    assert len(lines) == {"warm_start": 24}.get(phase, 4)
    for line in lines:
        parts = parts_of(line)
        assert parts.keys() == PHASES[phase]
        assert all(seconds >= 0 for seconds in parts.values())
        assert sum(parts.values()) == pytest.approx(line["seconds"], rel=1e-9)
        assert line["seconds_checkpoint"] >= 0
        assert ("peak_memory_gib" if torch.cuda.is_available() else "peak_rss_gib") in line
    assert sum(line["seconds_forward"] for line in lines) > 0 and sum(line["seconds_backward"] for line in lines) > 0


def test_every_phase_ends_with_a_line_of_it(finished: Path) -> None:
    output = finished.with_name("output.txt").read_text()
    for phase in ("warm_start", "estep-2", "mstep-1", "ntp-1"):
        (line,) = [line for line in output.splitlines() if line.startswith(f"{phase}: ")]
        assert " a step: " in line and "forward" in line and "checkpoints beside it: " in line
    assert {f"{phase}/seconds_{part}" for phase, parts in PHASES.items() for part in parts} <= curves(finished).keys()
    assert "Where the time goes" in (finished / "report.html").read_text()


class MadeClock(StepClock):
    """Every step takes the same."""

    @contextmanager
    def step(self) -> Iterator[None]:
        yield
        self.seconds = {"other": 2.0, "data": 0.01, "forward": 3.19}


def test_the_line_of_a_phase() -> None:
    times = StepTimes(MadeClock(), torch.device("cpu"))
    assert times.line() is None, "a phase of which no step was left"
    for _ in range(2):
        with times.step():
            pass
    assert times.line() == "5.2 s a step: forward 61%, data <1%, other 38%"
    assert times.seconds == pytest.approx(5.2)
    with times.saving():
        pass
    first, second = times.values(), times.values()
    assert first["seconds_checkpoint"] > 0 == second["seconds_checkpoint"], "saving is logged once"


@pytest.fixture(scope="module")
def profiled(ra3: Ra3, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped before any profile, and went on with traces of some steps."""
    run = tmp_path_factory.mktemp("profiled") / "run"
    arguments = ("train", config, f"run_dir={run}", "em.control=false", "em.iterations=1")
    kill = ["ra3_megatron.em.steps:PackedSteps.step", "before", 6]
    assert ra3(*arguments, "checkpoint.interval=4", code=None, kill=kill).code == -9
    ra3(*arguments, "profile.steps=[2,7]", "profile.phases=[warm_start,estep]", "--resume")
    return run


def events(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt") as text:
        return list(json.load(text)["traceEvents"])


def test_traces_of_the_chosen_steps_alone(profiled: Path) -> None:
    # step 2 of the warm start was before the kill, and the E-step has two
    traces = {"warm_start-000007-rank0.json.gz": TRAINING, "estep-1-000002-rank0.json.gz": ESTEP}
    assert {path.name for path in (profiled / "profile").iterdir()} == traces.keys()
    for name, parts in traces.items():
        found = [event.get("name") for event in events(profiled / "profile" / name)]
        assert "aten::mm" in found or "aten::addmm" in found
        assert parts - {"other"} <= set(found)
        assert found.count("forward") == found.count("backward") > 0


def test_other_ranks_are_not_profiled(tmp_path: Path) -> None:
    settings = ProfileConfig(steps=[1], ranks=[0, 2])
    for rank in range(3):
        runtime = Runtime(torch.device("cpu"), rank, world_size=3)
        with Profiler(settings, tmp_path, "ntp", "ntp-1", runtime).step(1, StepClock()):
            torch.ones(3)
    assert {path.name for path in tmp_path.iterdir()} == {f"ntp-1-000001-rank{rank}.json.gz" for rank in (0, 2)}


@pytest.mark.gpu
def test_marks_for_nsight_and_a_history_of_memory(tmp_path: Path) -> None:
    device = torch.device("cuda")
    clock, runtime = StepClock(device), Runtime(device, 0, world_size=1)
    profiler = Profiler(ProfileConfig(steps=[1], tool="nsight", memory=True), tmp_path, "ntp", "ntp-1", runtime)
    with profiler.step(1, clock), clock.step(), clock.part("forward"):
        torch.ones(1 << 20, device=device)
    (file,) = tmp_path.iterdir()
    assert file.name == "memory-ntp-1-000001-rank0.pickle" and file.stat().st_size > 0
    assert clock.ranges is None and clock.seconds["forward"] > 0


def test_a_profile_changes_no_number(profiled: Path, finished: Path) -> None:
    def lines(run: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
        rows = [{k: v for k, v in row.items() if k != "global_step"} for row in metrics(run) if "monitor" not in row]
        return {(row["phase"], row["iteration"], row["step"], row.get("arm")): row for row in rows}

    found, expected = lines(profiled), lines(finished)
    assert len(found) == 24 + 1 + 2 + 1 + 2 + 1
    assert found == {key: expected[key] for key in found}


def test_profiles_may_change_when_a_run_is_resumed() -> None:
    settings = ["profile.steps=[3]", "profile.memory=true", "profile.ranks=[1]", "profile.tool=nsight"]
    assert differences(load_config(None, []), load_config(None, settings)) == []


@needs_no_cuda
@pytest.mark.parametrize(
    ("setting", "start"),
    [
        ("profile.tool=nsight", "profile.tool=nsight: needs CUDA, which this machine does not have: use "),
        ("profile.memory=true", "profile.memory=true: needs CUDA, which this machine does not have: leave it out"),
        ("profile.ranks=[0,1]", "profile.ranks=[0, 1]: this layout has the processes 0 to 0: leave out the others"),
        ("profile.steps=[0]", "profile.steps[0]=0: must be at least 1"),
        ("profile.phases=[infuse]", "profile.phases[0]=infuse: must be one of "),
    ],
)
def test_what_cannot_be_profiled_is_refused(setting: str, start: str, ra3: Ra3, config: Path, tmp_path: Path) -> None:
    problem = ra3.refuses("train", config, f"run_dir={tmp_path / 'run'}", setting)
    assert problem.startswith(start)
    assert not (tmp_path / "run").exists()
