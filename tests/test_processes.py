"""The harness that starts processes: results in rank order, failures with every rank's traceback, nothing left over."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.processes import ProcessesFailed, run_processes

pytestmark = pytest.mark.multiprocess


def rank_sum(offset: int) -> tuple[int, int]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(value)
    return dist.get_rank(), int(value)


def fail_on_rank_1(folder: str) -> None:
    mine = Path(folder, os.environ["RANK"])
    mine.with_suffix(".new").write_text(str(os.getpid()))
    mine.with_suffix(".new").rename(mine)
    if os.environ["RANK"] == "1":
        while not Path(folder, "0").exists():
            time.sleep(0.01)
        raise RuntimeError("rank 1 is unhappy")
    time.sleep(60)


def test_results_come_in_rank_order() -> None:
    assert run_processes(2, rank_sum, 10) == [(0, 21), (1, 21)]


def test_a_failure_shows_its_traceback_and_ends_the_others(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ProcessesFailed, match=r"rank 0: was still running(.|\n)*RuntimeError: rank 1 is unhappy"):
        run_processes(2, fail_on_rank_1, str(tmp_path))
    assert time.monotonic() - start < 30
    pid = int((tmp_path / "0").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_time_limit_is_kept() -> None:
    with pytest.raises(ProcessesFailed, match=r"not finished after 0\.5 s"):
        run_processes(1, time.sleep, 60, timeout=0.5)
