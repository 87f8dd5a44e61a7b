"""Process start-up: the one place that decides between CPU/gloo and CUDA/NCCL, and that builds the process groups.

Under torchrun or srun the environment tells rank and world size; without either, this is a world of one process.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.model import ParallelConfig

_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


@dataclass(frozen=True)
class Runtime:
    """Where this process stands in the layout."""

    device: torch.device
    rank: int
    world_size: int
    data_rank: int
    data_size: int
    tensor_rank: int
    tensor_size: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        """Processes that hold the shards of one model replica."""
        return parallel_state.get_tensor_model_parallel_group()

    def gather_data(self, item: Any) -> list[Any]:
        """`item` of each data-parallel rank, in rank order, on every process."""
        if self.data_size == 1:
            return [item]
        items: list[Any] = [None] * self.data_size
        dist.all_gather_object(items, item, group=parallel_state.get_data_parallel_group())
        return items

    def broadcast(self, item: Any) -> Any:
        """`item` of rank 0 on every process."""
        if self.world_size == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world_size > 1:
            dist.barrier()


def launched() -> bool:
    """Whether torchrun or srun started this process as one of several (or of one)."""
    return "RANK" in os.environ or ("SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ)


def initialize(parallel: ParallelConfig, seed: int, timeout_minutes: float = 30.0) -> Runtime:
    """Join the process group and build Megatron's groups for `parallel`.

    Raises UserError when the world that was started is not the one the layout needs.
    """
    for name, source in _SLURM.items():
        if name not in os.environ and launched():
            os.environ[name] = os.environ[source]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if world_size != parallel.world_size:
        raise UserError(
            f"parallel.tensor * parallel.data = {parallel.world_size}, but {world_size} processes were started: "
            "start as many as the layout needs, or change the layout"
        )
    cuda = torch.cuda.is_available()
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        torch.set_num_threads(parallel.threads or max(1, available_cores() // local))
    if not dist.is_initialized():
        rendezvous = "env://" if "MASTER_ADDR" in os.environ else f"tcp://127.0.0.1:{_free_port()}"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            init_method=rendezvous,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=timeout_minutes),
        )
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=parallel.tensor)
    seed_everything(seed)
    return Runtime(
        device=device,
        rank=rank,
        world_size=world_size,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
    )


def seed_everything(seed: int) -> None:
    """Seed torch and Megatron's tensor-parallel generators; the same call gives the same weights."""
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def shutdown() -> None:
    """Leave the process groups."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
