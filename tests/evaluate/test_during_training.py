"""Evaluations on suites within a training. Not covered here: whole runs (tests/run/test_benchmarks_run.py)."""

from __future__ import annotations

from typing import Any

import pytest

from ra3_megatron.config.errors import Unavailable
from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.config.run import RunConfig
from ra3_megatron.evaluate.during import TrainingSuites, _Open
from ra3_megatron.evaluate.suites import SUITES
from ra3_megatron.mcore.startup import initialize, shutdown
from ra3_megatron.report.progress import Progress
from ra3_megatron.rlvr.sandbox import SandboxError


class Broken:
    """A scorer whose sandbox does not start."""

    def score(self, *of_nothing: Any) -> list[Any]:
        raise SandboxError("the sandbox failed 4 times: no process could be started")


def test_a_sandbox_that_fails_is_no_mistake_of_the_user() -> None:
    """The job is to try again (exit code 69), as it is when rewards of RLVR are graded."""
    runtime = initialize(ParallelConfig(threads=1), seed=1)
    try:
        opened = _Open(SUITES["humaneval"], ["HumanEval/0"], [""], Broken())  # type: ignore[arg-type]
        with Progress("off") as progress:
            unread: Any = None
            suites = TrainingSuites(RunConfig(), runtime, unread, unread, frozenset(), progress, [opened])
            with pytest.raises(Unavailable, match=r"^sandbox=bubblewrap: the sandbox failed 4 times: "):
                suites._score(opened, [], ours=True, title="humaneval")
    finally:
        shutdown()
