"""The vLLM processes of a run or an infusion: there while it lasts, gone when it ends, however it ends."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ra3_megatron.config.run import RunConfig
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rollout.engine_pool import EnginePool


@contextmanager
def rollout_engines(
    config: RunConfig, runtime: Runtime, corpus: Any, folder: Path, source: Path | None
) -> Iterator[EnginePool | None]:
    """The engines that `rollout.engine` asks for; None when the model itself is sampled from. Collective.

    folder: `vllm/` in it gets their logs. source: small files of the Hugging Face folder that the model came from.
    """
    if config.rollout.engine != "vllm" or math.isinf(config.estep.latent_price):  # then nothing is sampled
        yield None
        return
    pool = EnginePool(config, runtime, corpus.format, corpus.tokenizer, folder / "vllm", source)
    try:
        yield pool
    finally:
        pool.close()
