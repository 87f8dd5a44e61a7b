"""The process group of one process, and the end of the vLLM processes."""

from collections.abc import Iterator

import pytest
from vllm_processes import close_engines

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.mcore.startup import Runtime, initialize, shutdown


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    yield initialize(ParallelConfig(threads=1), seed=1)
    shutdown()


@pytest.fixture(scope="session", autouse=True)
def engines_end() -> Iterator[None]:
    yield
    close_engines()
