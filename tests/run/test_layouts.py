"""`ra3 train` at two processes gives the numbers of one, and a run may be resumed at another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_run import Ra3, metrics, weights

TOLERANCE = 1e-4
"""Relative. Rounding differs between layouts; a sampled choice that it tipped over would show as a gross difference."""


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data", "tensor"])
def test_two_processes_compute_what_one_does(
    layout: str, finished: Path, ra3: Ra3, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ("train", config, f"run_dir={run}")
    # one process until the second step of E-step 1, then two, to the end
    kill = ["ra3_megatron.em.steps:EStepSteps.step", "before", 2] if layout == "data" else None
    if kill:
        ra3(*arguments, "checkpoint.interval=1", code=-9, kill=kill)
        outcome = ra3(*arguments, f"parallel.{layout}=2", "--resume")
    else:
        outcome = ra3(*arguments, f"parallel.{layout}=2")
    assert outcome.errors == ""
    assert outcome.output.count("held-out documents") == 1, "one process speaks"
    _compare(metrics(finished), metrics(run))
    for phase in ("estep-1", "mstep-2", "ntp-2"):
        expected, found = (weights(folder / "checkpoints" / phase / "final") for folder in (finished, run))
        for name, tensor in expected.items():
            # of the whole: where a gradient is next to nothing, Adam turns rounding errors into steps
            difference = found[name][: len(tensor)] - tensor  # the vocabulary may be padded further
            assert difference.norm() < 1e-4 * tensor.norm(), f"{phase} {name}"


def _compare(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    assert len(expected) == len(found)
    for line, (one, two) in enumerate(zip(expected, found, strict=True)):
        assert one.keys() == two.keys(), f"line {line}"
        for name, value in one.items():
            if name == "fill_rate":
                continue  # the one figure that is about the layout
            if isinstance(value, float):
                assert two[name] == pytest.approx(value, rel=TOLERANCE, abs=1e-5), f"line {line}: {one['phase']} {name}"
            elif name not in ("message", "advice"):
                assert two[name] == value, f"line {line}: {one['phase']} {name}"
