"""metrics.jsonl and TensorBoard: exact values, torn lines, rewinding, resuming."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_run import write_made_metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ra3_megatron.config.errors import UserError
from ra3_megatron.report.metrics import RESERVED_FIELDS, TIME_FIELDS, MetricsWriter, read_metrics


def without_time(records: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if name not in TIME_FIELDS} for record in records]


def write_steps(run_dir: Path, first: int, last: int, tensorboard: bool = False) -> None:
    with MetricsWriter(run_dir, tensorboard=tensorboard) as writer:
        for step in range(first, last + 1):
            writer.write("mstep", 1, step, {"loss": 1 / step, "tokens": step * 100})


def test_line_holds_what_was_written(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write("warm_start", 0, 1, {"loss": 2.5, "tokens": 8192, "note": "first ½"})
        writer.write("estep", 1, 1, {"reward": np.float32(-0.5), "lines": np.int64(7), "thought_ce": None})
    first, second = read_metrics(tmp_path)
    assert first.pop("time") > 1.6e9
    assert first == {
        "phase": "warm_start",
        "iteration": 0,
        "step": 1,
        "global_step": 0,
        "loss": 2.5,
        "tokens": 8192,
        "note": "first ½",
    }
    assert (second["reward"], second["lines"], second["thought_ce"], second["global_step"]) == (-0.5, 7, None, 1)
    assert "nonfinite" not in second


@given(st.lists(st.floats(), min_size=1, max_size=5))
def test_floats_survive_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    run_dir = tmp_path_factory.mktemp("floats")
    with MetricsWriter(run_dir, tensorboard=False) as writer:
        writer.write("p", 0, 0, {f"v{i}": value for i, value in enumerate(values)})
    (record,) = read_metrics(run_dir)
    for index, value in enumerate(values):
        name = f"v{index}"
        if math.isfinite(value):
            assert record[name].hex() == value.hex()
        else:
            assert record[name] is None
            assert name in record["nonfinite"]


def test_lines_are_on_disk_before_the_writer_closes(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write("p", 0, 1, {"loss": 1.0})
    writer.sync()
    assert [record["loss"] for record in read_metrics(tmp_path)] == [1.0]
    writer.close()
    writer.close()


@pytest.mark.parametrize("name", sorted(RESERVED_FIELDS))
def test_reserved_names_are_refused(tmp_path: Path, name: str) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer, pytest.raises(ValueError, match=name):
        writer.write("p", 0, 0, {name: 1.0})
    assert read_metrics(tmp_path) == []


def test_values_of_other_types_are_refused(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, tensorboard=False) as writer, pytest.raises(TypeError, match="'loss' is list"):
        writer.write("p", 0, 0, {"loss": [1.0]})  # type: ignore[dict-item]


@given(cut=st.integers(1, 10_000))
def test_a_torn_last_line_is_dropped_wherever_it_was_cut(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    run_dir = tmp_path_factory.mktemp("torn")
    write_steps(run_dir, 1, 3)
    path = run_dir / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % len(whole)])
    lines = whole[: cut % len(whole)].count(b"\n")
    assert [record["step"] for record in read_metrics(run_dir)] == list(range(1, lines + 1))
    write_steps(run_dir, lines + 1, 3)
    assert without_time(read_metrics(run_dir)) == without_time([json.loads(line) for line in whole.splitlines()])


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:20] + "\n" + lines[2])
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)


def test_resumed_file_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    write_steps(tmp_path / "whole", 1, 9)
    write_steps(tmp_path / "killed", 1, 7)
    with MetricsWriter(tmp_path / "killed", tensorboard=False) as writer:
        assert writer.rewind(lambda record: record["step"] <= 4) == 3
        assert writer.global_step == 4
        for step in range(5, 10):
            writer.write("mstep", 1, step, {"loss": 1 / step, "tokens": step * 100})
    assert without_time(read_metrics(tmp_path / "killed")) == without_time(read_metrics(tmp_path / "whole"))
    assert len(read_metrics(tmp_path / "whole")) == 9


def test_rewind_drops_everything_behind_the_first_refused_line(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 6)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        assert writer.rewind(lambda record: record["step"] != 3) == 4
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_rewind_that_keeps_all_leaves_the_file_alone(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        assert writer.rewind(lambda record: True) == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def read_events(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def test_tensorboard_holds_every_number_under_phase_and_name(tmp_path: Path) -> None:
    write_made_metrics(tmp_path, tensorboard=True)
    events = read_events(tmp_path)
    expected: dict[str, list[tuple[int, float]]] = {}
    for record in read_metrics(tmp_path):
        for name, value in record.items():
            if name not in RESERVED_FIELDS and not isinstance(value, str):
                expected.setdefault(f"{record['phase']}/{name}", []).append((record["global_step"], value))
    assert set(events.Tags()["scalars"]) == set(expected)
    for tag, points in expected.items():
        written = events.Scalars(tag)
        assert [event.step for event in written] == [step for step, _ in points]
        assert [event.value for event in written] == pytest.approx([value for _, value in points], rel=1e-6)
    assert "estep/monitor/text_summary" in events.Tags()["tensors"]


def test_tensorboard_forgets_what_was_rewound(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 7, tensorboard=True)
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.rewind(lambda record: record["step"] <= 4)
        writer.write("mstep", 1, 5, {"loss": 50.0})
    points = read_events(tmp_path).Scalars("mstep/loss")
    assert [event.step for event in points] == [0, 1, 2, 3, 4]
    assert [event.value for event in points] == pytest.approx([1.0, 1 / 2, 1 / 3, 1 / 4, 50.0])


def test_tensorboard_is_written_step_by_step(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=True)
    writer.write("mstep", 1, 1, {"loss": 1.5})
    assert [event.value for event in read_events(tmp_path).Scalars("mstep/loss")] == [1.5]
    writer.close()


def test_without_tensorboard_there_are_no_events(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    assert not (tmp_path / "tensorboard").exists()


def test_a_line_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: has no 'phase': no line of a run's metrics"):
        read_metrics(tmp_path)
