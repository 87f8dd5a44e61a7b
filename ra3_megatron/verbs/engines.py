"""The vLLM processes of a run or an infusion: there while it lasts, gone when it ends, however it ends."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ra3_megatron.config.run import RunConfig

if TYPE_CHECKING:
    from ra3_megatron.mcore.startup import Runtime
    from ra3_megatron.rollout.engine_pool import EnginePool

FOLDER = "vllm"
"""In the folder of a run or an infusion: descriptions of models, logs, and where nodes meet."""


@contextmanager
def rollout_engines(
    config: RunConfig, runtime: "Runtime", corpus: Any, folder: Path, source: Path | None
) -> "Iterator[EnginePool | None]":
    """The engines that `rollout.engine` asks for; None when the model itself is sampled from. Collective.

    folder: `vllm/` in it gets their logs. source: small files of the Hugging Face folder that the model came from.
    """
    if config.rollout.engine != "vllm" or math.isinf(config.estep.latent_price):  # then nothing is sampled
        yield None
        return
    from ra3_megatron.rollout.engine_pool import EnginePool

    pool = EnginePool(config, runtime, corpus.format, corpus.tokenizer, folder / FOLDER, source)
    done = False
    try:
        yield pool
        done = True
    finally:
        pool.close(done)


def host_engines(run_dir: Path, engines: int | None, address: str | None, say: Callable[[str], None]) -> None:
    """Host engines of the run in `run_dir`, on this node, until it is finished; see rollout/nodes/host.py."""
    from ra3_megatron.rollout.nodes.host import Host

    Host(run_dir.absolute() / FOLDER, engines, address, say).run()
