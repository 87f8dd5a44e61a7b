"""Shared memory of a process that is killed is free, that of others stays; no vLLM is needed."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from ra3_megatron.rollout.vllm.process import EngineProcess
from ra3_megatron.rollout.vllm.segments import SHARED, remove, segments_of

ENGINE = """
import subprocess, sys, time
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=4096)
if sys.argv[1:]:  # a worker of its own
    subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(memory.name, flush=True)
time.sleep(60)
"""


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[tuple[EngineProcess, list[str]]]:
    """A process with a worker, as their owner holds them, and the paths of their segments."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENGINE, ENGINE], stdout=subprocess.PIPE, start_new_session=True, text=True
    )
    assert process.stdout is not None
    paths = [SHARED + process.stdout.readline().strip() for _ in range(2)]
    read, write = os.pipe()
    os.close(write)
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    owned = EngineProcess(process, read, folder, tmp_path / "log", b"")  # type: ignore[arg-type]
    yield owned, paths
    owned.kill()
    process.stdout.close()


def test_a_killed_engine_leaves_no_shared_memory(engine: tuple[EngineProcess, list[str]]) -> None:
    process, paths = engine
    others = SharedMemory(create=True, size=4096)
    try:
        assert {path for path, _ in segments_of(process.pid)} == set(paths)
        process.kill()
        assert not [path for path in paths if os.path.exists(path)]
        assert os.path.exists(SHARED + others.name)
    finally:
        others.close()
        others.unlink()


def test_a_name_that_another_has_taken_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "segment"
    path.touch()
    remove({(str(path), path.stat().st_ino + 1), (str(tmp_path / "gone"), 1)})
    assert path.exists()
    remove({(str(path), path.stat().st_ino)})
    assert not path.exists()
