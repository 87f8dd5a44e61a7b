"""The pytest process is a world of one; other layouts run in processes of their own (tests/processes.py)."""

import pytest

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.mcore.startup import Runtime, initialize


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return initialize(ParallelConfig(threads=1), seed=1)
