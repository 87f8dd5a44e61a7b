"""The sandbox for an ordinary user, as most users are, also where the tests run as real root."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import ra3_megatron
from ra3_megatron.rlvr.sandbox import Isolation
from ra3_megatron.rlvr.sandboxing.bwrap import interpreter, reachable

pytestmark = pytest.mark.multiprocess

USER = 54321


@pytest.fixture
def package() -> Iterator[Path]:
    """A folder that everybody may read, with what the sandbox consists of."""
    with tempfile.TemporaryDirectory(prefix="sandbox-test-") as name:
        folder, source = Path(name), Path(ra3_megatron.__file__).parent
        (folder / "ra3_megatron").mkdir()
        shutil.copy(source / "__init__.py", folder / "ra3_megatron")
        for room in ("config", "rlvr"):
            shutil.copytree(source / room, folder / "ra3_megatron" / room)
        shutil.copy(Path(__file__).with_name("as_user.py"), folder)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        yield folder


def python() -> str:
    """An interpreter that everybody may start."""
    for path in (interpreter()[1], *(shutil.which(f"python3.{minor}", path="/usr/bin") for minor in (11, 12, 13))):
        if path is not None and reachable(Path(path)):
            return path
    pytest.skip("the sandbox cannot be tried as another user: there is no Python 3.11 that everybody may start")


def test_an_ordinary_user(bubblewrap: Isolation, package: Path) -> None:
    """The same verdicts, bounds and walls as for real root, without any right of root's."""
    become = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--"] if os.geteuid() == 0 else []
    line = [*become, python(), "-P", "-s", "-S", str(package / "as_user.py")]
    done = subprocess.run(line, env={"PYTHONPATH": str(package)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["user"] == (USER if become else os.getuid()) and told["command"] == "65534\n/tmp\n"
    assert {name: verdict for name, (verdict, _) in told["verdicts"].items()} == {
        "right": "passed",
        "wrong": "wrong",
        "exit": "crashed",
        "hangs": "timeout",
        "memory of children": "memory",
        "memory of files": "memory",
        "forks": "passed",
        "looks": "passed",
        "signals": "passed",
        "script": "passed",
    }, told
