"""A test that fails while the machine computes wrong is run again, and told; one that fails otherwise stays failed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import python_path
from tests.sentinel import VARIABLE, wrong_divisions

HELD = """
@pytest.fixture(scope="session")
def held():
    return []
"""
BEFORE = """
import os, time

def test_one_file_before(held):
    with open(os.environ["RA3_TEST_SENTINEL"], "a") as lines:
        lines.write(f"{time.time():.6f} 1\\n")
"""
SUITE = """
from pathlib import Path

def test_first(held):
    held.append("wrong")

def test_differs(held):
    tries = Path(__file__).with_name("tries")
    count = int(tries.read_text()) if tries.exists() else 0
    tries.write_text(str(count + 1))
    assert held == [], "with fixtures of its own it has none of the first test"

def test_always_fails():
    assert False
"""


@pytest.mark.parametrize("wrong", [True, False])
def test_what_failed_beside_wrong_divisions_runs_again(tmp_path: Path, wrong: bool) -> None:
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path / "conftest.py")
    with (tmp_path / "conftest.py").open("a") as conftest:
        conftest.write(HELD)
    (tmp_path / "test_before.py").write_text(BEFORE if wrong else "")
    (tmp_path / "test_suite.py").write_text(SUITE)
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
    environment["PYTHONPATH"] = python_path(Path(__file__).parents[1])
    found = tmp_path / "found"
    found.touch()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    environment[VARIABLE] = str(found)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    assert (tmp_path / "tries").read_text() == ("2" if wrong else "1")
    if wrong:
        assert "1 failed, 3 passed" in done.stdout
        assert "defective: it divided wrongly (CPU 1 1 times)" in done.stdout
        why = "CPU 1 1 times until then; before: AssertionError: with fixtures of its own it has none"
        assert f"run again, and passed then: test_suite.py::test_differs ({why}" in done.stdout
        assert "run again, and failed then: test_suite.py::test_always_fails" in done.stdout
    else:
        assert "2 failed, 1 passed" in done.stdout and "defective" not in done.stdout


def test_the_watching_process_ends_with_the_tests(tmp_path: Path) -> None:
    """Its parent is killed; it finds nothing on a machine that computes right, and both are quick."""
    program, found = str(Path(__file__).with_name("sentinel.py")), str(tmp_path / "found")
    code = (
        "import os, subprocess, sys\n"
        f"process = subprocess.Popen([sys.executable, {program!r}, {found!r}, str(os.getpid())], stdout=2)\n"
        "print(process.pid, flush=True)"
    )
    environment = {**os.environ, "PYTHONPATH": python_path(Path(__file__).parents[1])}
    pid = int(subprocess.run([sys.executable, "-c", code], env=environment, stdout=-1, check=True).stdout)
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_lines_are_counted_by_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "found"
    monkeypatch.setenv(VARIABLE, str(file))
    assert not wrong_divisions()
    file.write_text("10.0 0\n20.0 1\n20.5 1\n30")  # a line that is being written
    assert wrong_divisions() == {"0": 1, "1": 2}
