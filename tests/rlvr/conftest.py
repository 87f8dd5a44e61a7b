"""The process group of one process."""

from collections.abc import Iterator

import pytest

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.mcore.startup import Runtime, initialize, shutdown


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    yield initialize(ParallelConfig(threads=1), seed=1)
    shutdown()
