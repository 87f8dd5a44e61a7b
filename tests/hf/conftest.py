"""The pytest process is a world of one; other layouts run in processes of their own (tests/processes.py)."""

from pathlib import Path

import pytest
from hf_models import make

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.mcore.startup import Runtime, initialize


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return initialize(ParallelConfig(threads=1), seed=1)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with experts in shards, with a tokenizer."""
    return make("qwen3-moe", tmp_path_factory.mktemp("source") / "hf", max_shard_size="150KB", tokenizer=True)
