"""The vLLM processes of a run or an infusion: there while it lasts, gone when it ends, however it ends."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig

if TYPE_CHECKING:
    from ra3_megatron.mcore.startup import Runtime
    from ra3_megatron.rollout.engine_pool import EnginePool
    from ra3_megatron.text.latents import LatentFormat
    from ra3_megatron.text.tokenizer import Tokenizer

FOLDER = "vllm"
"""In the folder of a run or an infusion: descriptions of models, logs, and where nodes meet."""


@contextmanager
def rollout_engines(
    config: RunConfig,
    runtime: "Runtime",
    latents: "LatentFormat",
    tokenizer: "Tokenizer",
    folder: Path,
    source: Path | None,
    samples: bool = True,
) -> "Iterator[EnginePool | None]":
    """The engines that `rollout.engine` asks for; None when the model itself is sampled from. Collective.

    folder: `vllm/` in it gets their logs. source: small files of the Hugging Face folder that the model came from.
    samples: False: nothing will be sampled.
    """
    if config.rollout.engine != "vllm" or not samples:
        yield None
        return
    from ra3_megatron.rollout.engine_pool import EnginePool

    pool = EnginePool(config, runtime, latents, tokenizer, folder / FOLDER, source)
    done = False
    try:
        yield pool
        done = True
    finally:
        pool.close(done)


def thinks(config: RunConfig) -> bool:
    """Whether EM samples anything: with an infinite price it does not."""
    return math.isfinite(config.estep.latent_price)


def host_engines(run_dir: Path, engines: int | None, address: str | None, say: Callable[[str], None]) -> None:
    """Host engines of the run in `run_dir`, on this node, until it is finished; see rollout/nodes/host.py."""
    from ra3_megatron.rollout.nodes.host import Host

    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir}: is a file: give the folder of the run")
    Host(run_dir.absolute() / FOLDER, engines, address, say).run()
