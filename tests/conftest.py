"""What all tests share: one thread, reproducible hypothesis, and a summary that counts and explains every skip."""

from __future__ import annotations

import os
import re
import resource
from collections import Counter
from collections.abc import Iterator
from typing import Any

# Before anything imports torch: the tests are small, and threads of several processes would fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

# Tensors that other processes send keep a file open each, and a whole run of the tests has many.
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(_soft, min(_hard, 65536)), _hard))

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a bare GPU machine: the tests that need a GPU need no hypothesis
    pass
else:
    settings.register_profile("local", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("ci", settings.get_profile("local"), derandomize=True, print_blob=True)
    settings.load_profile("ci" if os.environ.get("CI") else "local")

ACCEPTED_SKIP = re.compile(
    r"\b(gpus?|cuda|nccl|cores?|memory|disk|sandbox)\b|transformer[_-]engine|apex|benchmark data",
    re.IGNORECASE,
)
"""Reasons for a skip that `make install-…` cannot remove: hardware, the system, packages for GPUs,
data that is not distributed with this project."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full-matrix",
        action="store_true",
        help="test every topology of tests/parallel/topologies.py, not only the representative subset",
    )
    parser.addoption("--extended", action="store_true", help="run what is marked `extended` as well")


def pytest_configure(config: pytest.Config) -> None:
    from tests.sentinel import Sentinel

    config.pluginmanager.register(Sentinel(), "sentinel")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out(config, items, "full_matrix", "--full-matrix")
    leave_out(config, items, "extended", "--extended")
    if os.environ.get("PYTEST_XDIST_WORKER"):
        rank = {folder: place for place, folder in enumerate(FIRST)}
        items.sort(key=lambda item: rank.get(folder_of(item.nodeid), len(rank)))
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def leave_out(config: pytest.Config, items: list[pytest.Item], marker: str, option: str) -> None:
    """Deselect what has this marker, unless it was asked for."""
    left_out = [item for item in items if item.get_closest_marker(marker)]
    if left_out and not config.getoption(option):
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker(marker)]


TOGETHER = ("slurm", "rollout")
"""Folders whose tests share what takes long to start (a cluster, vLLM engines): they run in one process each."""
FIRST = ("slurm", "rollout", "run", "cluster", "parallel", "rlvr", "evaluate")
"""Folders with the longest tests: with several processes they begin first, so that no process ends with them."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes (`-n`): the tests of a file, or of a folder in TOGETHER, run in one of them, in order.

    (`--dist loadgroup` would do, but that of pytest-xdist 3.8 has no effect with pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            folder = folder_of(nodeid)
            return folder if folder in TOGETHER else nodeid.split("::")[0]

    return ByFile(config, log)


def folder_of(nodeid: str) -> str:
    """The folder in `tests/` that a test stands in."""
    parts = nodeid.split("::")[0].split("/")
    return parts[1] if len(parts) > 2 else ""


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count what is left out for its time."""
    for item in items:
        for marker in LEFT_OUT:
            LEFT_OUT[marker] += item.get_closest_marker(marker) is not None


LEFT_OUT = {"full_matrix": 0, "extended": 0}
"""Tests left out, by marker."""


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """With several processes: all collect the same tests, so what one left out is what all did."""
    LEFT_OUT.update(getattr(node, "workeroutput", {}).get("left_out", {}))


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left_out"] = dict(LEFT_OUT)
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("RA3_STRICT_SKIPS") and reporter is not None and unexplained_skips(skip_reasons(reporter)):
        session.exitstatus = max(session.exitstatus, pytest.ExitCode.TESTS_FAILED)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reasons = skip_reasons(terminalreporter)
    ran = sum(len(terminalreporter.stats.get(outcome, ())) for outcome in ("passed", "failed", "xfailed", "xpassed"))
    terminalreporter.write_line("")
    terminalreporter.write_line(f"{ran} tests ran, {reasons.total()} skipped{':' if reasons else '.'}")
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"  {count:4} {reason}")
    if LEFT_OUT["full_matrix"]:
        terminalreporter.write_line(
            f"{LEFT_OUT['full_matrix']} tests of parallel layouts left out for their time: "
            "a representative subset ran, `make test-parallel` runs every layout."
        )
    if LEFT_OUT["extended"]:
        terminalreporter.write_line(
            f"{LEFT_OUT['extended']} tests left out for their time: `make test-extended` runs them."
        )
    if os.environ.get("RA3_STRICT_SKIPS"):
        for reason in unexplained_skips(reasons):
            message = f"ERROR: skipped although `make install-…` should have brought what it needs: {reason}"
            terminalreporter.write_line(message, red=True)


def skip_reasons(reporter: Any) -> Counter[str]:
    """How often each reason was given for a skip."""
    reports = reporter.stats.get("skipped", ())
    return Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in reports)


def unexplained_skips(reasons: Counter[str]) -> list[str]:
    """Reasons that name neither hardware nor a package that needs it."""
    return sorted(reason for reason in reasons if not ACCEPTED_SKIP.search(reason))
