"""How it runs: sampling, checkpoints, logging."""

from typing import Literal

from pydantic import Field, model_validator

from ra3_megatron.config.base import Section


class VllmConfig(Section):
    """The vLLM processes (`rollout.engine=vllm`)."""

    start_timeout: float = Field(default=600.0, gt=0)
    """Seconds until an engine must be ready; with `placement=nodes` also until the nodes must have come."""

    call_timeout: float = Field(default=600.0, gt=0)
    """Seconds until an engine must have answered a batch; one that has not is taken for hung and ended."""

    quantization: Literal["none", "fp8"] = "none"
    """`fp8`: engines round the weights that they get, at every refit, and the inputs of linear layers to FP8 (e4m3), on
    GPUs only. Samples are then of another policy than the trainer's: needs `estep.importance_cap`
    (`rlvr.importance_cap`), and no `model.precision=fp32`."""

    cuda_graphs: bool = True
    """On GPUs: vLLM captures the passes of its decode loop in CUDA graphs, at its start (minutes for large models) and
    in memory beside the weights; off: each kernel is started by itself."""

    tensor: int = Field(default=1, ge=1)
    """Tensor-parallel size of each engine."""

    max_sequences: int = Field(default=256, ge=1)
    """Sequences that an engine computes at once."""

    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Memory of an engine's key/value cache."""

    threads: int | None = Field(default=None, ge=1)
    """CPU threads of an engine; none: its share of the cores (`colocated`: cores / engines)."""

    refit_bucket_mb: int = Field(default=256, ge=1)
    """Weights travel to the engines in buckets of this many megabytes."""


class RolloutConfig(Section):
    """Sampling of latents."""

    engine: Literal["megatron", "vllm"] = "megatron"
    """`megatron`: key/value-cache sampler on the live model; `vllm`: vLLM processes, whose weights are renewed before
    they sample."""

    placement: Literal["colocated", "server", "nodes"] = "colocated"
    """Where vLLM runs. `colocated`: one process beside each replica of the model, on its devices, for that replica's
    documents; `server`: `replicas` processes on the node of the main process, on the GPUs behind the trainer's, among
    which all documents are routed; `nodes`: `replicas` processes on other nodes, each of which runs `ra3 engines`."""

    replicas: int = Field(default=1, ge=1)
    """vLLM processes in all with `placement=server` or `placement=nodes`."""

    max_staleness: int = Field(default=0, ge=0, le=1)
    """1: the transcripts of the next E-step update are sampled while this one trains, with weights that are one update
    old when they are used (needs `engine=vllm` and an importance correction, such as `estep.importance_cap=2`)."""

    sampler: Literal["jump_ahead", "naive"] = "jump_ahead"
    """`jump_ahead`: one teacher-forced pass decides all lines up to the next thought; `naive`: one request a line."""

    temperature: float = Field(default=1.0, gt=0)
    """Temperature of decisions and thoughts."""

    batch_size: int = Field(default=128, ge=1)
    """Transcripts sampled at once on one process (with vLLM: by one engine)."""

    cuda_graphs: bool = False
    """`engine=megatron`, on a GPU: passes that add one token to each transcript are CUDA graphs (not with
    `parallel.tensor`, `pipeline`, `expert`). Their key/value caches stay on the GPU while the model trains."""

    vllm: VllmConfig = VllmConfig()
    """The vLLM processes."""

    @model_validator(mode="after")
    def _check(self) -> "RolloutConfig":
        problems = []
        if self.engine != "vllm":
            if self.max_staleness:
                problems.append(
                    f"max_staleness={self.max_staleness} needs rollout.engine=vllm: it samples beside training"
                )
            if self.placement != "colocated":
                problems.append(f"placement={self.placement} needs rollout.engine=vllm")
            if self.vllm.quantization != "none":
                problems.append(f"vllm.quantization={self.vllm.quantization} needs rollout.engine=vllm")
        elif self.cuda_graphs:
            problems.append("cuda_graphs=true is not read with rollout.engine=vllm: vllm.cuda_graphs is vLLM's")
        if self.replicas > 1 and self.placement == "colocated":
            problems.append(f"replicas={self.replicas} needs rollout.placement=server or nodes")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class CheckpointConfig(Section):
    """Saving and resuming."""

    interval: int = Field(default=50, ge=1)
    """Steps between checkpoints within a phase (one is always saved at its end)."""

    keep: int = Field(default=2, ge=1)
    """Checkpoints kept inside a phase; the ends of phases are all kept."""

    async_save: bool = False
    """Write the checkpoints inside a phase while training goes on (it needs memory for a copy of what is saved)."""

    verify: bool = False
    """Compare the checksums of a checkpoint's files before it is loaded; sizes are always compared."""


class WatchdogConfig(Section):
    """Noticing that a run hangs."""

    timeout_minutes: float | None = Field(default=30.0, gt=0)
    """Without a step, a pass through the model or a round of sampling for so long, every process writes the stacks of
    its threads to `<run>/stacks` and ends with exit code 70. The first step of a phase and checkpoints do not count.
    Process groups give up 10 minutes later. none: off."""


class ExportConfig(Section):
    """What a run leaves for others."""

    hf: bool = False
    """At the end, write the trained models as Hugging Face folders: `<run>/hf/ra3`, and `<run>/hf/ntp` for the
    control."""

    dtype: Literal["fp32", "bf16"] | None = None
    """Data type of the exported weights; none: `model.precision`."""

    max_shard_gb: float = Field(default=5.0, gt=0)
    """Gigabytes of tensors in one safetensors file at most."""


class LoggingConfig(Section):
    """What is written while a run goes on."""

    interval: int = Field(default=1, ge=1)
    """Steps between lines of `metrics.jsonl` and TensorBoard. RLVR writes every update."""

    tensorboard: bool = True
    """Write TensorBoard events to `<run>/tensorboard`."""

    progress: Literal["auto", "bar", "plain", "off"] = "auto"
    """Progress display; `auto`: bars on a terminal, plain lines elsewhere."""
