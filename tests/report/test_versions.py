"""versions.json: complete, expressible in JSON, and honest about commits."""

import json
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

import ra3_megatron
from ra3_megatron.report.versions import PACKAGES, _git, collect_versions


def test_versions_are_complete() -> None:
    versions = collect_versions()
    assert json.loads(json.dumps(versions)) == versions
    assert versions["ra3_megatron"] == ra3_megatron.__version__
    assert versions["python"] == platform.python_version()
    assert set(versions["packages"]) == set(PACKAGES)
    import torch

    assert versions["packages"]["torch"] == torch.__version__
    assert versions["cores"] >= 1
    assert versions["processor"]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git: none on this system")
def test_commit_of_a_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "package" / "__init__.py"
    file.parent.mkdir()
    file.write_text("")
    assert _git(file) is None
    git("init", "-q")
    assert _git(file) is None
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert _git(file) == {"commit": git("rev-parse", "HEAD"), "modified": False}
    file.write_text("x = 1\n")
    assert _git(file) == {"commit": git("rev-parse", "HEAD"), "modified": True}


def test_package_inside_another_checkout_has_no_commit(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    installed = tmp_path / "venv" / "site-packages" / "package" / "__init__.py"
    assert _git(installed) is None
