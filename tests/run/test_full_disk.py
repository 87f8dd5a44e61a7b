"""A disk that is really full: one line, exit code 2, the last checkpoint is kept, and a resumed run ends as ever."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import Ra3, metrics

from tests.disk import fill, small_disk

SETTINGS = ("logging.tensorboard=false", "warm_start.steps=6", "em.iterations=0", "evaluation.documents=2")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", megabytes=24) as place:
        yield place


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(ra3: Ra3, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    ra3("train", config, *SETTINGS, f"run_dir={run}")
    return run


@pytest.mark.parametrize("background", ["false", pytest.param("true", marks=pytest.mark.extended)])
def test_a_full_disk_ends_the_run_and_loses_nothing(
    background: str, whole: Path, disk: Path, ra3: Ra3, config: Path
) -> None:
    run = disk / "run"
    folder = run / "checkpoints" / "warm_start"
    arguments = ("train", config, *SETTINGS, f"run_dir={run}", "checkpoint.interval=1", "--resume")
    ra3(*arguments, code=-9, kill=["ra3_megatron.em.steps:PackedSteps.step", "before", 4])
    kept = max(path for path in folder.glob("step_??????") if (path / "checkpoint.json").is_file())
    before = contents(kept)
    ballast = fill(disk, left=2**17)
    arguments += (f"checkpoint.async_save={background}",)
    for _ in range(2):  # the second time the disk is as full
        problem = ra3.refuses(*arguments)
        assert problem.startswith(f"{folder}/step_") and ": cannot be written: " in problem, problem
        assert "GB free on its disk, earlier checkpoints are kept" in problem
        assert contents(kept) == before
    ballast.unlink()
    ballast = fill(disk, left=0)  # not a line of metrics
    assert "No space left on device" in ra3.refuses(*arguments)
    ballast.unlink()
    ra3(*arguments)
    assert metrics(run) == metrics(whole)
