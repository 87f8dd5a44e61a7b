"""A process that stalls: every process says where it stands and ends, and `--resume` ends as if nothing had been."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import Ra3, metrics

from ra3_megatron.config.errors import HUNG

STALL = """
import os, time
if os.environ.get("RANK") == "1":
    import ra3_megatron.mcore
    from ra3_megatron.em import steps

    inner = steps.PackedSteps.step

    def stall(self, number):
        if number == 3:
            time.sleep(600)
        return inner(self, number)

    steps.PackedSteps.step = stall
"""
"""Python runs it as it starts. Step 4 of rank 1 takes forever."""
SETTINGS = ("parallel.data=2", "warm_start.steps=6", "em.iterations=0", "evaluation.documents=2")
SECONDS = 6


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_rank_that_stalls_is_told_and_the_run_goes_on(ra3: Ra3, config: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    (tmp_path / "sitecustomize.py").write_text(STALL)
    settings = (*SETTINGS, f"run_dir={run}", "checkpoint.interval=2", f"watchdog.timeout_minutes={SECONDS / 60}")
    process = subprocess.Popen(
        [sys.executable, "-c", "from ra3_megatron.cli import main; main()", "train", str(config), *settings],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or len((run / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGUSR2)  # stacks at any moment, and nothing ends
    begin = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == HUNG, errors
    assert time.monotonic() - begin < 4 * SECONDS, "seconds, not the half an hour of a process group"
    # both wrote piece by piece to one pipe; rank 1's last line has the word once more
    assert errors.count("(most recent call first)") >= 2, "SIGUSR2 showed both"
    assert len(re.findall("stall(?!s)", errors)) >= 2, errors
    said = sorted(line for line in errors.splitlines() if line.startswith("ra3: "))
    assert len(said) == 2 and all("the last one: warm_start step 3; it stands in " in line for line in said), errors
    assert "ra3: rank 0 hangs" in said[0] and "ra3: rank 1 hangs" in said[1] and "it stands in stall (" in said[1]
    zero, one = (path.read_text() for path in sorted((run / "stacks").iterdir()))
    assert " in all_reduce\n" in zero and " in stall\n" not in zero
    assert " in stall\n" in one and " in all_reduce\n" not in one

    assert sorted(path.name for path in (run / "checkpoints" / "warm_start").iterdir()) == ["step_000002"]
    one_process = (*SETTINGS, "parallel.data=1")
    ra3("train", config, *one_process, f"run_dir={run}", "--resume")
    ra3("train", config, *one_process, f"run_dir={whole}")
    lines, expected = metrics(run), metrics(whole)
    assert [(line["phase"], line["step"]) for line in lines] == [(line["phase"], line["step"]) for line in expected]
    for found, line in zip(lines, expected, strict=True):
        assert found["code_ce"] == pytest.approx(line["code_ce"], rel=1e-4), line
