"""The suite's command: a part leaves its rows whatever becomes of it, ends with its runner, runs on a bare machine."""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import __main__ as runner
from tests.gpu.evidence import Evidence
from tests.gpu.parts import PARTS
from tests.processes import python_path

ROOT = Path(__file__).parents[2]
BLOCKED = ("typer", "rich", "jinja2", "pygments", "psutil", "matplotlib", "scipy", "datasets")
"""Packages that a bare machine may lack."""


# -- rows on disk -----------------------------------------------------------------------------------------------------


def test_rows_are_on_disk_as_soon_as_they_are_known(evidence: Evidence) -> None:
    def disk() -> Any:
        return json.loads(evidence.file.read_text())

    assert disk()["status"] == "running"
    evidence.figure("a rate", 12.3456789, "GB/s", 12.0, 13.0)
    assert disk()["rows"] == [{"name": "a rate", "value": 12.346, "unit": "GB/s", "low": 12.0, "high": 13.0}]
    assert not evidence.check("an error", math.nan, at_most=1.0)
    assert not evidence.check("too small", 0.5, at_least=1.0, at_most=2.0)
    assert evidence.check("right", 0, 0)
    assert [row.get("holds") for row in disk()["rows"]] == [None, False, False, True]
    assert disk()["rows"][1]["value"] == "nan"


CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


def test_an_error_loses_nothing_but_one_of_the_gpu_ends_the_part(evidence: Evidence) -> None:
    with evidence.attempt("first"):
        raise ValueError("no good")
    with evidence.attempt("large"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    for number, words in enumerate(("CUDA error: out of memory", "Triton Error [CUDA]: out of memory", CUBLAS)):
        with evidence.attempt(f"large {number}"):
            raise RuntimeError(words)
    with pytest.raises(RuntimeError), evidence.attempt("second"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    names = [(entry["name"], entry["error"]) for entry in evidence.content["errors"]]
    assert names[0] == ("first", "ValueError: no good") and names[1][0] == "second"
    large = ["large", *(f"large {number}" for number in range(3))]
    assert evidence.content["missing"] == [{"name": name, "why": "out of memory"} for name in large]


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    evidence = Evidence(tmp_path / "part.json", "kernels", "a title", small=False, seconds=5.0)
    assert evidence.enough("short", 1.0) and not evidence.enough("long", 60.0)
    assert evidence.content["missing"][0]["name"] == "long"


# -- the runner -------------------------------------------------------------------------------------------------------

WRITES = """
import os, sys, time
from pathlib import Path
from tests.gpu.evidence import Evidence
evidence = Evidence(Path(sys.argv[1]), "kernels", "a title", small=True)
evidence.figure("before", 1.0)
"""


@pytest.mark.parametrize(
    ("ending", "status"),
    [("os.abort()", "crashed"), ("time.sleep(60)", "out of time"), ("evidence.end('complete')", "complete")],
)
@pytest.mark.multiprocess
def test_a_part_that_dies_or_hangs_leaves_what_it_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ending: str, status: str
) -> None:
    def command_of(name: str, file: Path, seconds: float, small: bool) -> list[str]:
        return [sys.executable, "-c", WRITES + ending, str(file)]

    monkeypatch.setattr(runner, "command_of", command_of)
    monkeypatch.setattr(runner, "GRACE", 0.0)
    seconds = 10.0 if status == "out of time" else 100.0  # a busy machine needs some to begin
    found = runner.run_part("kernels", tmp_path, seconds=seconds, small=True, characters=1000)
    assert found["status"] == status and [row["name"] for row in found["rows"]] == ["before"]
    assert runner.is_good(found) is (status == "complete")
    assert bool(found["errors"]) is (status == "crashed")
    assert json.loads((tmp_path / "kernels.json").read_text())["status"] == status


@pytest.mark.multiprocess
def test_a_part_ends_with_a_runner_that_is_killed(tmp_path: Path) -> None:
    """As the time limit of whoever started the suite kills it: the part is in a session of its own."""
    code = (
        "import sys; from pathlib import Path; from tests.gpu.__main__ import run_part;"
        "run_part('offload', Path(sys.argv[1]), 600.0, True, 0)"
    )
    environment = {**os.environ, "PYTHONPATH": python_path(ROOT), "TMPDIR": str(tmp_path)}
    runner_ = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    file, end = tmp_path / "offload.json", time.monotonic() + 60
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.01)
    (part,) = (int(pid) for pid in Path(f"/proc/{runner_.pid}/task/{runner_.pid}/children").read_text().split())
    handle = os.pidfd_open(part)
    runner_.kill()
    runner_.wait()
    assert select.select([handle], [], [], 60)[0]
    os.close(handle)
    found = json.loads(file.read_text())
    assert found["status"] == "running" and not found["rows"] + found["errors"], "it did not go on to its next line"


@pytest.mark.multiprocess
def test_a_part_that_cannot_begin_is_told_with_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runner, "command_of", lambda *_: [sys.executable, "-c", "raise SystemExit('no such thing')"])
    found = runner.run_part("kernels", tmp_path, seconds=10.0, small=True, characters=1000)
    assert found["status"] == "crashed" and "no such thing" in found["errors"][0]["error"]
    assert not runner.is_good(found)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_the_command_on_a_bare_machine(tmp_path: Path) -> None:
    """Without the packages that one may lack; progress is short, the table is there, and a GPU is asked for."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in BLOCKED:
        (bare / f"{name}.py").write_text(f'raise ModuleNotFoundError("No module named {name}")\n')
    environment = {**os.environ, "PYTHONPATH": python_path(bare), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "out"

    def suite(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.gpu", *arguments, "--out", str(out)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)

    parts = ", ".join(f"tests.gpu.{name}" for name in PARTS)
    subprocess.run([sys.executable, "-c", f"import {parts}"], cwd=ROOT, env=environment, check=True, timeout=100)
    done = suite("training", "--small", "--minutes", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "missing: " in done.stdout and len(done.stdout) < 12_000
    results = json.loads((out / "results.json").read_text())
    assert results["evidence"] is False and results["parts"]["training"]["status"] == "complete"
    assert {"name": "curves.png", "why": "matplotlib is not there"} in results["parts"]["training"]["missing"]
    assert "## training" in (out / "results.md").read_text()
    if not torch.cuda.is_available():
        refused = suite("kernels")
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "--small" in refused.stderr
