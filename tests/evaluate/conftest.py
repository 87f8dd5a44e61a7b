"""What the tests of evaluation need: the harnesses, and the benchmarks' data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.evaluate.harness_call import require_harness
from ra3_megatron.evaluate.suites import SUITES

SHARED = Path(os.environ.get("RA3_SHARED", Path(__file__).parents[2].parent / "shared"))


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of benchmark data beside the checkout, or in $RA3_SHARED."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("benchmark data: no folder ../shared/data beside the checkout (RA3_SHARED names another one)")
    return folder


@pytest.fixture(scope="session")
def harness() -> Callable[[str], None]:
    """Skips when the harness of a suite is not installed."""

    def need(suite: str) -> None:
        try:
            require_harness(SUITES[suite].kind, SUITES[suite].version)
        except UserError as error:
            pytest.skip(str(error))

    return need
