"""Process start-up: the one place that decides between CPU/gloo and CUDA/NCCL, and that builds the process groups.

Under torchrun or srun the environment tells rank and world size; without either, this is a world of one process.
"""

import itertools
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import HashStore  # type: ignore[attr-defined]

from ra3_megatron.config.errors import Unavailable, UserError
from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.mcore.launch import adopt_slurm

T = TypeVar("T")
_waits = itertools.count()
"""Numbers the waits for rank 0, alike on every process."""


@dataclass(frozen=True)
class Runtime:
    """Where this process stands in the layout."""

    device: torch.device
    rank: int
    world_size: int
    tensor_rank: int = 0
    tensor_size: int = 1
    pipeline_rank: int = 0
    pipeline_size: int = 1
    virtual_size: int = 1
    """Model chunks of each pipeline stage."""
    context_rank: int = 0
    context_size: int = 1
    expert_size: int = 1
    data_rank: int = 0
    data_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process holds the output layer."""
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def replica_rank(self) -> int:
        """Number of this process's copy of the model, among all data- and context-parallel ones.

        Sampling does not split sequences: context-parallel ranks hold the same weights and sample other documents.
        """
        return parallel_state.get_data_parallel_rank(with_context_parallel=True)

    @property
    def replica_size(self) -> int:
        """Copies of the model: data-parallel size times context-parallel size."""
        return self.data_size * self.context_size

    @property
    def micro_batch_multiple(self) -> int:
        """Micro-batches of a global batch, over all data-parallel ranks, are a multiple of this."""
        return self.data_size * (self.pipeline_size if self.virtual_size > 1 else 1)

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        """Processes that hold the shards of one stage of one model replica."""
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        """Processes that hold the stages of one model replica, first to last."""
        return parallel_state.get_pipeline_model_parallel_group()

    @property
    def context_group(self) -> dist.ProcessGroup:
        """Processes that hold the pieces of one sequence."""
        return parallel_state.get_context_parallel_group()

    @property
    def replica_group(self) -> dist.ProcessGroup:
        """Processes that hold the same weights: data- and context-parallel ones."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    @property
    def expert_group(self) -> dist.ProcessGroup:
        """Processes among which tokens are exchanged for their experts."""
        return parallel_state.get_expert_tensor_and_model_parallel_group()

    def gather_data(self, item: Any) -> list[Any]:
        """`item` of each data-parallel rank, in rank order, on every process."""
        return self._gather(item, self.data_size, parallel_state.get_data_parallel_group)

    def gather_replicas(self, item: Any) -> list[Any]:
        """`item` of each replica of the model, in the order of `replica_rank`, on every process."""
        return self._gather(item, self.replica_size, lambda: self.replica_group)

    def gather_all(self, item: Any) -> list[Any]:
        """`item` of every process, in rank order, on every process."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item)
        return items

    @staticmethod
    def _gather(item: Any, size: int, group: Callable[[], dist.ProcessGroup]) -> list[Any]:
        if size == 1:
            return [item]
        items: list[Any] = [None] * size
        dist.all_gather_object(items, item, group=group())
        return items

    def sum_replicas(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the data- and context-parallel ranks, in place."""
        if self.replica_size > 1:
            dist.all_reduce(values, group=self.replica_group)
        return values

    def max_replicas(self, values: torch.Tensor) -> torch.Tensor:
        """Maximum over the data- and context-parallel ranks, in place."""
        if self.replica_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.replica_group)
        return values

    def from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        """The last pipeline stage's values on every stage, in place (of a contiguous tensor)."""
        if self.pipeline_size > 1:
            source = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(values, src=source, group=self.pipeline_group)
        return values

    def agree(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the last stage's tensor-parallel rank 0 on every process of this replica, in place.

        What is decided by them is then decided alike, whatever rounding does.
        """
        if self.tensor_size > 1 and self.is_last_stage:
            dist.broadcast(values, src=dist.get_global_rank(self.tensor_group, 0), group=self.tensor_group)
        return self.from_last_stage(values)

    def broadcast(self, item: Any) -> Any:
        """`item` of rank 0 on every process."""
        if self.world_size == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait_for_main(self) -> None:
        """Wait until rank 0 calls this, too, however long that takes. All processes make the same calls.

        A collective gives up after the process groups' timeout; what rank 0 does alone (a corpus of a billion tokens,
        the conversion of a large model) may take longer. When rank 0 has died, its store is gone, and this raises.
        """
        if self.world_size == 1:
            return
        store = dist.distributed_c10d._get_default_store()
        key = f"ra3/main-{next(_waits)}"
        if self.is_main:
            store.set(key, "done")
            return
        pause = 0.01
        while not store.check([key]):
            time.sleep(pause)
            pause = min(1.0, 2 * pause)

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action`, which may take hours, returns on rank 0; its UserError or Unavailable is raised on every
        process."""
        found: T | None = None
        kind: type[UserError | Unavailable] | None = None
        message = ""
        if self.is_main:
            try:
                found = action()
            except (UserError, Unavailable) as error:
                kind, message = UserError if isinstance(error, UserError) else Unavailable, str(error)
        self.wait_for_main()
        kind, message, found = self.broadcast((kind, message, found))
        if kind is not None:
            raise kind(message)
        return cast(T, found)

    def barrier(self) -> None:
        """Wait for every process."""
        if self.world_size > 1:
            dist.barrier()


def initialize(
    parallel: ParallelConfig,
    seed: int,
    timeout_minutes: float = 30.0,
    advice: Callable[[int], str] = lambda world_size: "",
) -> Runtime:
    """Join the process group and build Megatron's groups for `parallel`.

    advice: names layouts that fit a number of processes. Raises UserError when the world that was started is not the
    one the layout needs, its processes are not told where to meet, or are more than the GPUs of a node.
    """
    adopt_slurm()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if world_size != parallel.world_size:
        fitting = advice(world_size)
        raise UserError(
            f"the layout needs parallel.tensor * pipeline * context * data = {parallel.world_size} processes, but "
            f"{world_size} were started: start {parallel.world_size}" + (f"; {fitting}" if fitting else "")
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world_size > 1 and missing and not dist.is_initialized():
        raise UserError(
            f"{world_size} processes were started, and not told where to meet (no {' and no '.join(missing)}): "
            "export MASTER_ADDR (address of the first process's node) and MASTER_PORT (a free port there), "
            "the same for all"
        )
    if parallel.tensor > 1:
        # messages start before the matrix products that they overlap with only where kernels keep their order
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    cuda = torch.cuda.is_available()
    if cuda:
        place = int(os.environ.get("LOCAL_RANK", "0"))
        here, gpus = max(place + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))), torch.cuda.device_count()
        if here > gpus:  # on all processes of the node alike
            raise UserError(
                f"{here} processes on node {socket.gethostname()} see {gpus} GPUs there, and each needs one of its "
                "own: start fewer on a node, and let each see all of its GPUs (CUDA_VISIBLE_DEVICES)"
            )
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # `mcore.attention` takes it where it is worth its plans
    else:
        device = torch.device("cpu")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        torch.set_num_threads(parallel.threads or max(1, available_cores() // local))
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            # one process meets nobody, wherever a launcher or a variable of the site would send it
            store=HashStore() if world_size == 1 else None,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=timeout_minutes),
        )
    _leave_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        distributed_timeout_minutes=timeout_minutes,
    )
    seed_everything(seed)
    return Runtime(
        device=device,
        rank=rank,
        world_size=world_size,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel.tensor,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel.pipeline,
        virtual_size=parallel.virtual_pipeline,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel.context,
        expert_size=parallel.expert,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel.data,
    )


def seed_everything(seed: int) -> None:
    """Seed torch and Megatron's tensor-parallel generators; the same call gives the same weights."""
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def shutdown() -> None:
    """Leave the process groups."""
    _leave_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _leave_model_parallel() -> None:
    """Leave Megatron's groups. It only forgets them itself: each of gloo's would keep threads that wake 100 times a
    second."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
