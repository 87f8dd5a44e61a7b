"""Distributed checkpoints that are whole or absent, and that hold everything the next step depends on.

A checkpoint is written to `<name>.partial` beside its place and renamed when every process has finished, so a folder
without that suffix is complete. It holds the weights, optional optimizer and schedule state, the generator states of
every process, and a JSON record of the caller's state; `checkpoint.json` says what is in it. Megatron's distributed
format lets it be loaded at another layout.
"""

import json
import os
import queue
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from ra3_megatron import __version__
from ra3_megatron.config.errors import UserError
from ra3_megatron.mcore.model import language_model
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import Trainer

RECORD = "checkpoint.json"
PARTIAL = ".partial"
CAUSE_LENGTH = 300
"""Characters of Megatron's message that an error quotes."""
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}

# Megatron hands results over through a manager process, for saving in the background. Saving here is synchronous: the
# process would cost seconds at the first save and 200 MB, and it would outlive a run that is killed.
filesystem_async._results_queue = queue.Queue()


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; the ones before it are untouched."""


def save(
    folder: Path, model: torch.nn.Module, runtime: Runtime, record: dict[str, Any], trainer: Trainer | None = None
) -> None:
    """Write a checkpoint to `folder` (replaced if it exists). Collective.

    record: JSON-serialisable state of the caller. trainer: also save its optimizer (which must have made a step) and
    schedule.
    Raises CheckpointWriteError on every process when any of them could not write.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    error = ""
    if runtime.is_main:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as problem:
            error = str(problem)
    _raise_anywhere(error, folder, runtime)
    description = {
        "version": __version__,
        "layout": {"tensor": runtime.tensor_size, "data": runtime.data_size},
        "architecture": language_model(model).architecture,
        "optimizer": _optimizer_kind(trainer) if trainer is not None else None,
        **record,
    }
    try:
        dist_checkpointing.save(
            _state(model, runtime, trainer),
            str(partial),
            TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
            content_metadata=dict(_METADATA),
        )
    except (Exception, CheckpointException) as problem:  # the latter is a BaseException
        error = _cause(problem)
    _raise_anywhere(error, folder, runtime)
    if runtime.is_main:
        try:
            (partial / RECORD).write_text(json.dumps(description, indent=1) + "\n")
            _sync(partial)
            replaced = folder.with_name(f"{folder.name}.replaced{PARTIAL}")
            if folder.exists():  # never delete in place: a folder with its name is whole at any moment
                shutil.rmtree(replaced, ignore_errors=True)
                folder.rename(replaced)
            partial.rename(folder)
            _sync(folder.parent, recursive=False)
            shutil.rmtree(replaced, ignore_errors=True)
        except OSError as problem:
            error = str(problem)
    _raise_anywhere(error, folder, runtime)


def load(folder: Path, model: torch.nn.Module, runtime: Runtime, trainer: Trainer | None = None) -> dict[str, Any]:
    """Load weights (and `trainer`'s optimizer and schedule) in place; returns the record. Collective.

    Raises UserError when `folder` is no complete checkpoint or does not fit the model.
    """
    record = read_record(folder)
    _check_fit(folder, record, model, trainer)
    same_ranks = record["layout"]["tensor"] == runtime.tensor_size
    template = _state(model, runtime, trainer, loading=True, generators=same_ranks)
    try:
        state = dist_checkpointing.load(template, str(folder))
    except (Exception, CheckpointException) as problem:
        raise UserError(f"{folder}: cannot be loaded: {_cause(problem)}") from problem
    language_model(model).load_state_dict(state["model"], strict=True)
    if trainer is not None:
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.scheduler.num_steps = 0  # Megatron adds the saved number
        trainer.scheduler.load_state_dict(state["scheduler"])
        if same_ranks:  # at another tensor-parallel size the generators stay as they were seeded
            _set_generators(state["generators"])
    return record


def read_record(folder: Path) -> dict[str, Any]:
    """The JSON record of a complete checkpoint. Raises UserError when there is none."""
    path = folder / RECORD
    if folder.name.endswith(PARTIAL) or not path.is_file():
        raise UserError(f"{folder}: is no complete checkpoint (no {RECORD})")
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise UserError(f"{path}: cannot be read: {problem}") from problem
    missing = [key for key in ("architecture", "optimizer", "layout") if key not in record]
    if missing:
        raise UserError(f"{path}: names no {missing[0]}: not a checkpoint of this version of ra3")
    return record


def check_architecture(name: str, record: dict[str, Any], architecture: dict[str, Any]) -> None:
    """UserError unless the record is that of a model with this architecture. name: what the user called it."""
    for key, wanted in architecture.items():
        held = record["architecture"].get(key)
        if held != wanted:
            raise UserError(f"{name}: holds a model with {key}={held}, but this model has {key}={wanted}")


def _check_fit(folder: Path, record: dict[str, Any], model: torch.nn.Module, trainer: Trainer | None) -> None:
    """UserError unless the checkpoint holds this model's architecture and what `trainer` needs."""
    check_architecture(str(folder), record, language_model(model).architecture)
    if trainer is None:
        return
    held, wanted = record["optimizer"], _optimizer_kind(trainer)
    if held is None:
        raise UserError(f"{folder}: holds no optimizer state, so training cannot go on from it")
    if held != wanted:
        raise UserError(
            f"{folder}: holds the state of a {held} optimizer, but this run has a {wanted} one: "
            f"set parallel.distributed_optimizer={'true' if held == 'distributed' else 'false'}"
        )


def _optimizer_kind(trainer: Trainer) -> str:
    return "distributed" if trainer.model.ddp_config.use_distributed_optimizer else "replicated"


def _state(
    model: torch.nn.Module,
    runtime: Runtime,
    trainer: Trainer | None,
    loading: bool = False,
    generators: bool = True,
) -> dict[str, Any]:
    metadata = dict(_METADATA)  # Megatron adds this layout's groups to it
    weights = language_model(model).sharded_state_dict(metadata=metadata)
    state: dict[str, Any] = {"model": weights}
    if trainer is not None:
        state["optimizer"] = trainer.optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)
        state["scheduler"] = trainer.scheduler.state_dict()
    if trainer is not None and generators:
        place = (parallel_state.get_pipeline_model_parallel_rank(), runtime.tensor_rank)
        shape = (parallel_state.get_pipeline_model_parallel_world_size(), runtime.tensor_size)
        # generators differ over model-parallel ranks only: each data-parallel replica has the same
        state["generators"] = ShardedObject("generators", _generators(), shape, place, replica_id=runtime.data_rank)
    return state


def _generators() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "tensor_parallel": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _set_generators(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tensor_parallel"])


def _cause(problem: BaseException) -> str:
    """One line on what went wrong, on whichever rank it did."""
    if isinstance(problem, CheckpointException) and problem.failures:
        problem = next(iter(problem.failures.values()))[0]
    line = f"{type(problem).__name__}: {problem}".splitlines()[0]
    return line if len(line) <= CAUSE_LENGTH else line[:CAUSE_LENGTH] + " …"


def _raise_anywhere(error: str, folder: Path, runtime: Runtime) -> None:
    errors = [e for e in _all_gather(error, runtime) if e]
    if errors:
        room = _room(folder) if runtime.is_main else ""
        if runtime.is_main:  # what was written takes room that the disk may lack
            shutil.rmtree(folder.with_name(folder.name + PARTIAL), ignore_errors=True)
        room = runtime.broadcast(room)
        raise CheckpointWriteError(f"{folder}: cannot be written: {errors[0]} ({room}earlier checkpoints are kept)")


def _room(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder.parent).free / 1e9:.1f} GB free on its disk, "
    except OSError:
        return ""


def _all_gather(item: str, runtime: Runtime) -> list[str]:
    if runtime.world_size == 1:
        return [item]
    items: list[Any] = [None] * runtime.world_size
    torch.distributed.all_gather_object(items, item)
    return items


def _sync(folder: Path, recursive: bool = True) -> None:
    paths = [folder, *folder.rglob("*")] if recursive else [folder]
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
