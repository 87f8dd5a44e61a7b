"""`ra3 train` at two processes gives the numbers of one, and a run goes on at another layout than it began with."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_run import Ra3, metrics, weights

SECONDS = 120.0
"""Time limit of the part of a run that is killed."""
CODE = "from ra3_megatron.em import infuse; infuse.CHUNK = 8; from ra3_megatron.cli import main; main()"
"""The `ra3` command with small chunks, as small_run.py has them."""
TOLERANCE = 5e-4
"""Relative. Rounding differs between layouts; a sampled choice that it tipped over would show as a gross difference."""


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("parallel.tensor=2", None),
        ("parallel.context=1", "parallel.data=2"),
        ("parallel.pipeline=2", "parallel.context=2"),
    ],
)
def test_two_processes_compute_what_one_does(
    first: str, then: str | None, finished: Path, ra3: Ra3, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ("train", config, f"run_dir={run}")
    if then is None:
        outcome = ra3(*arguments, first)
    else:  # every process of it is killed within E-step 1; then it goes on at another layout, to the end
        start_and_kill([*arguments, first, "checkpoint.interval=1"], run / "checkpoints/estep-1/step_000001")
        assert not (run / "summary.json").exists()
        outcome = ra3(*arguments, then, "--resume")
    assert outcome.errors == ""
    assert outcome.output.count("held-out documents") == 1, "one process speaks"
    _compare(metrics(finished), metrics(run))
    for phase in ("estep-1", "mstep-2", "ntp-2"):
        expected, found = (weights(folder / "checkpoints" / phase / "final") for folder in (finished, run))
        for name, tensor in expected.items():
            # of the whole: where a gradient is next to nothing, Adam turns rounding errors into steps
            difference = found[name][: len(tensor)] - tensor  # the vocabulary may be padded further
            assert difference.norm() < 1e-4 * tensor.norm(), f"{phase} {name}"


def start_and_kill(arguments: list[object], when: Path) -> None:
    """Run `ra3` until the folder `when` is there, then kill it and all processes that it started, at once."""
    command = [sys.executable, "-c", CODE, *map(str, arguments)]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    family: list[psutil.Process] = [process]
    try:
        end = time.monotonic() + SECONDS
        while not when.is_dir():
            assert process.poll() is None and time.monotonic() < end, f"{when} did not appear"
            time.sleep(0.02)
    finally:
        family += process.children(recursive=True)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=30)


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
