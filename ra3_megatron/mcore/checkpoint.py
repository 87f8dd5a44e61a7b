"""Distributed checkpoints that are whole or absent, hold everything the next step depends on, and load anywhere.

A checkpoint is written to a `*.partial` folder beside its place and renamed when every process has finished, so a
folder without that suffix is complete. It holds the weights, optional optimizer and schedule state, generator states,
and a JSON record of the caller's state; `checkpoint.json` says what is in it, with the size and checksum of every file.

One that was saved at any layout (tensor, pipeline, virtual pipeline, context, expert, data), with a distributed or a
replicated optimizer (`mcore.optimizer_state`), with local or Transformer Engine layers (`mcore.names`), loads at any
other. Data order and learning rate go on where they were. All random numbers of a run are functions of (seed, phase,
step, document), so they do not depend on the layout either; the generators of torch and Megatron, which a model
without dropout does not draw from, are restored at the same tensor- and pipeline-parallel size only, and those of
experts stay as they were seeded.

`save` returns when the checkpoint is complete. `begin` with `background` returns as soon as the values to be written
are safe from later steps; `PendingSave` is finished by `poll` or `wait`, which all processes call alike.
"""

import json
import secrets
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.utils import get_model_config
from torch.distributed import DistError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from ra3_megatron import __version__
from ra3_megatron.config.errors import Unavailable, UserError
from ra3_megatron.mcore import optimizer_state
from ra3_megatron.mcore.checkpoint_files import facts_of, force_to_disk, wrong_contents, wrong_sizes
from ra3_megatron.mcore.checkpoint_record import PARTIAL, RECORD, check_architecture, is_partial, read_record
from ra3_megatron.mcore.fp8 import keep_exact
from ra3_megatron.mcore.model import SHARDING, chunks_of
from ra3_megatron.mcore.names import EXTRA_STATE
from ra3_megatron.mcore.shard_writer import ShardWriter
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.trainer import Trainer

CAUSE_LENGTH = 300
"""Characters of Megatron's message that an error quotes."""
_REPLACED = ".replaced" + PARTIAL
_EXPERT_GENERATOR = "expert-parallel-rng"


class DamagedCheckpoint(UserError):
    """A complete checkpoint whose files are not as they were written."""


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; the ones before it are untouched."""


def save(
    folder: Path, model: torch.nn.Module, runtime: Runtime, record: dict[str, Any], trainer: Trainer | None = None
) -> None:
    """Write a checkpoint to `folder` (replaced if it exists). Collective.

    record: JSON-serialisable state of the caller. trainer: also save its optimizer and schedule.
    Raises CheckpointWriteError on every process when any of them could not write.
    """
    begin(folder, model, runtime, record, trainer).wait()


def begin(
    folder: Path,
    model: torch.nn.Module,
    runtime: Runtime,
    record: dict[str, Any],
    trainer: Trainer | None = None,
    background: bool = False,
) -> "PendingSave":
    """Begin what `save` does. Collective. With `background`, shards are written while training goes on.

    Values that change after the call do not change the checkpoint. One save at a time: call `wait` before the next.
    """
    partial = runtime.broadcast(folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{PARTIAL}"))
    error = ""
    if runtime.is_main:
        try:
            for old in _leftovers(folder):
                shutil.rmtree(old, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as problem:
            error = str(problem)
    _raise_anywhere(error, folder, partial, runtime)
    if trainer is not None:
        trainer.synchronize()
    description = {"version": __version__, **_description(model, trainer), **record}
    writer: ShardWriter | None = None
    request: AsyncRequest | None = None
    try:
        with _resident(trainer):
            request = dist_checkpointing.save(
                _state(model, trainer),
                str(partial),
                TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
                async_sharded_save=True,
                content_metadata=dict(SHARDING),
            )
            writer = ShardWriter(request)
            writer.start(background)
    except (Exception, CheckpointException) as problem:  # the latter is a BaseException
        error = _cause(problem)
    try:
        _raise_anywhere(error, folder, partial, runtime)
    except CheckpointWriteError:
        if writer is not None:  # others could not begin
            writer.kill()
        raise
    assert writer is not None and request is not None
    return PendingSave(folder, partial, description, request.finalize_fns, writer, runtime)


class PendingSave:
    """A checkpoint that is being written. `poll`, `wait` are collective: all processes call the same in turn."""

    def __init__(
        self,
        folder: Path,
        partial: Path,
        description: dict[str, Any],
        finalize: Sequence[Callable[[], None]],
        writer: ShardWriter,
        runtime: Runtime,
    ) -> None:
        self.folder = folder
        self._partial, self._description = partial, description
        self._finalize, self._writer, self._runtime = finalize, writer, runtime
        self._finished = False

    def poll(self) -> bool:
        """Whether the checkpoint is complete; completes it when every process has written its part.

        Raises CheckpointWriteError on every process when any of them could not write.
        """
        if not self._finished and self._all_done():
            self._finish()
        return self._finished

    def wait(self) -> None:
        """Wait until the checkpoint is complete. Raises what `poll` raises."""
        if not self._finished:
            self._finish()

    def abandon(self) -> None:
        """Stop writing, without any other process: the checkpoint stays absent. Not collective."""
        if not self._finished:
            self._writer.kill()
            self._finished = True

    def _all_done(self) -> bool:
        busy = torch.tensor(int(not self._writer.is_done()))
        if self._runtime.world_size > 1:
            dist.all_reduce(busy)
        return not bool(busy)

    def _finish(self) -> None:
        self._finished = True
        written = self._writer.result()
        written.hand_over()
        error = ""
        try:
            for finalize in self._finalize:
                finalize()
        except (Exception, CheckpointException) as problem:
            error = _cause(problem)
        _raise_anywhere(error, self.folder, self._partial, self._runtime)
        files = {name: facts for part in self._runtime.gather_all(written.files) for name, facts in part.items()}
        if self._runtime.is_main:
            try:
                self._put_in_place(files)
            except OSError as problem:
                error = str(problem)
        _raise_anywhere(error, self.folder, self._partial, self._runtime)

    def _put_in_place(self, files: dict[str, Any]) -> None:
        """Write the record, force everything to the disk, and give the folder its name."""
        others = (path for path in self._partial.iterdir() if path.name not in files)
        files |= {path.name: facts_of(path) for path in others}
        content = json.dumps({**self._description, "files": dict(sorted(files.items()))}, indent=1)
        (self._partial / RECORD).write_text(content + "\n")
        force_to_disk(self._partial)
        replaced = self.folder.with_name(self.folder.name + _REPLACED)
        if self.folder.exists():  # never delete in place: a folder with its name is whole at any moment
            shutil.rmtree(replaced, ignore_errors=True)
            self.folder.rename(replaced)
        self._partial.rename(self.folder)
        force_to_disk(self.folder.parent, recursive=False)
        shutil.rmtree(replaced, ignore_errors=True)


def load(
    folder: Path, model: torch.nn.Module, runtime: Runtime, trainer: Trainer | None = None, verify: bool = False
) -> dict[str, Any]:
    """Load weights (and `trainer`'s optimizer and schedule) in place; returns the record. Collective.

    verify: compare the checksums of all files first; their sizes are always compared.
    Raises UserError when `folder` is no complete checkpoint or does not fit the model, DamagedCheckpoint when its files
    are not as they were written, Unavailable when another process is lost meanwhile.
    """
    record = read_record(folder)
    _check_fit(folder, record, model, trainer)
    _check_files(folder, record, runtime, verify)
    layout = record["layout"]
    same_ranks = (layout["tensor"], layout["pipeline"]) == (runtime.tensor_size, runtime.pipeline_size)
    with _resident(trainer):
        try:
            template = _only_extra_state_of(folder, _state(model, trainer, loading=True, generators=same_ranks))
            state = dist_checkpointing.load(template, str(folder))
        except (Exception, CheckpointException) as problem:
            if _is_loss(_first(problem)):
                raise Unavailable(f"{folder}: a process was lost while it was loaded: {_cause(problem)}") from problem
            raise UserError(f"{folder}: cannot be loaded: {_cause(problem)}") from problem
        for key, chunk in _chunks(model).items():
            _put_in(chunk, state[key])
        if trainer is not None:
            optimizer_state.load_state(trainer.optimizer, state["optimizer"])
    if trainer is not None:
        trainer.scheduler.num_steps = 0  # Megatron adds the saved number
        trainer.scheduler.load_state_dict(state["scheduler"])
        if same_ranks:
            _set_generators(state["generators"])
    return record


def _resident(trainer: Trainer | None) -> AbstractContextManager[None]:
    return nullcontext() if trainer is None else trainer.optimizer_resident()


# -- what is in a checkpoint ------------------------------------------------------------------------------------------


def _chunks(model: torch.nn.Module) -> dict[str, Any]:
    """The chunks of this pipeline stage under Megatron's keys."""
    chunks = chunks_of(model)
    return {"model" if len(chunks) == 1 else f"model{number}": chunk for number, chunk in enumerate(chunks)}


def _description(model: torch.nn.Module, trainer: Trainer | None) -> dict[str, Any]:
    state = parallel_state
    kind = None if trainer is None else _optimizer_kind(trainer)
    return {
        "layout": {
            "tensor": state.get_tensor_model_parallel_world_size(),
            "pipeline": state.get_pipeline_model_parallel_world_size(),
            "virtual_pipeline": len(chunks_of(model)),
            "context": state.get_context_parallel_world_size(),
            "expert": state.get_expert_model_parallel_world_size(),
            "expert_tensor": state.get_expert_tensor_parallel_world_size(),
            "data": state.get_data_parallel_world_size(),
            "distributed_optimizer": None if kind is None else kind == "distributed",
        },
        "architecture": chunks_of(model)[0].architecture,
        "precision": _precision(model),
        "optimizer": kind,
    }


def _precision(model: torch.nn.Module) -> str:
    return "bf16" if get_model_config(chunks_of(model)[0]).bf16 else "fp32"


def _optimizer_kind(trainer: Trainer) -> str:
    network: Any = trainer.model[0]
    return "distributed" if network.ddp_config.use_distributed_optimizer else "replicated"


def _state(
    model: torch.nn.Module, trainer: Trainer | None, loading: bool = False, generators: bool = True
) -> dict[str, Any]:
    metadata = dict(SHARDING)  # Megatron adds this layout's groups to it
    weights = {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in _chunks(model).items()}
    state: dict[str, Any] = dict(weights)
    if trainer is not None:
        state["optimizer"] = optimizer_state.sharded_state(trainer.optimizer, weights, metadata, loading)
        state["scheduler"] = trainer.scheduler.state_dict()
    force_all_tensors_to_non_fp8(weights)  # checkpoints hold no FP8; behind the optimizer's, which knows the weights
    if trainer is not None and generators:
        place = (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank())
        shape = (
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        # each replica of the model has the same generators, but for those of experts
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        state["generators"] = ShardedObject("generators", _generators(), shape, place, replica_id=replica)
    return state


def _generators() -> dict[str, Any]:
    states = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tensor_parallel": {name: state for name, state in states.items() if name != _EXPERT_GENERATOR},
    }


def _set_generators(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["device"].shape != torch.cuda.get_rng_state().shape:
        return  # saved on a CPU and loaded on a GPU, or the other way: their generators have nothing in common
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.set_states({**tracker.get_states(), **state["tensor_parallel"]})
    torch.cuda.set_rng_state(state["device"])


# -- checks and loading -----------------------------------------------------------------------------------------------


def _check_fit(folder: Path, record: dict[str, Any], model: torch.nn.Module, trainer: Trainer | None) -> None:
    """UserError unless the checkpoint holds this model's architecture and what `trainer` needs."""
    check_architecture(str(folder), record, chunks_of(model)[0].architecture)
    if trainer is None:
        return
    if record["optimizer"] is None:
        raise UserError(f"{folder}: holds no optimizer state, so training cannot go on from it")
    held, wanted = record["precision"], _precision(model)
    if held != wanted:
        raise UserError(
            f"{folder}: holds the optimizer state of a {held} run, but model.precision={wanted}: set "
            f"model.precision={held} to go on from it (its weights alone load at either)"
        )


def _check_files(folder: Path, record: dict[str, Any], runtime: Runtime, verify: bool) -> None:
    """DamagedCheckpoint on every process when a file is missing, of another size or, if `verify`, of other content.

    The main process compares sizes; processes share the reading for checksums.
    """
    files = record["files"]
    wrong = runtime.broadcast(wrong_sizes(folder, files) if runtime.is_main else {})
    if not wrong and verify:
        mine = sorted(files)[runtime.rank :: runtime.world_size]
        parts = runtime.gather_all(wrong_contents(folder, files, mine))
        wrong = {name: problem for part in parts for name, problem in part.items()}
    if wrong:
        name, problem = min(wrong.items())
        more = f" ({len(wrong) - 1} more files are not whole either)" if len(wrong) > 1 else ""
        raise DamagedCheckpoint(f"{folder / name}: {problem}{more}: use another checkpoint")


def _only_extra_state_of(folder: Path, template: dict[str, Any]) -> dict[str, Any]:
    """The template without those extra states of modules that the checkpoint does not hold."""
    held = FileSystemReader(folder).read_metadata().state_dict_metadata

    def is_absent(entry: Any) -> bool:
        return isinstance(entry, ShardedObject) and entry.key.endswith(EXTRA_STATE) and entry.unique_key not in held

    _, kept = extract_matching_values(template, is_absent)
    return kept


def _put_in(chunk: torch.nn.Module, weights: dict[str, Any]) -> None:
    missing, unexpected = chunk.load_state_dict(weights, strict=False)
    wrong = [name for name in [*missing, *unexpected] if EXTRA_STATE not in name]
    if wrong:
        raise RuntimeError(f"weights that should have been loaded, or should not: {', '.join(wrong)}")
    for name, parameter in chunk.named_parameters():
        if name in weights:
            keep_exact(parameter, weights[name])


# -- errors, alike on every process -----------------------------------------------------------------------------------


def _leftovers(folder: Path) -> list[Path]:
    """Unfinished folders of earlier attempts to save `folder`."""
    if not folder.parent.is_dir():
        return []
    return [path for path in folder.parent.iterdir() if path.name.startswith(f"{folder.name}.") and is_partial(path)]


def _cause(problem: BaseException) -> str:
    """One line on what went wrong, on whichever rank it did."""
    problem = _first(problem)
    line = f"{type(problem).__name__}: {problem}".splitlines()[0]
    return line if len(line) <= CAUSE_LENGTH else line[:CAUSE_LENGTH] + " …"


def _first(problem: BaseException) -> BaseException:
    """What went wrong on the first rank where anything did."""
    if isinstance(problem, CheckpointException) and problem.failures:
        return next(iter(problem.failures.values()))[0]
    return problem


def _is_loss(problem: BaseException) -> bool:
    """Whether another process has gone, or does not answer. Gloo has no exception of its own, but names its file."""
    return isinstance(problem, DistError) or (isinstance(problem, RuntimeError) and "gloo/" in str(problem))


def _raise_anywhere(error: str, folder: Path, partial: Path, runtime: Runtime) -> None:
    errors = [e for e in runtime.gather_all(error) if e]
    if errors:
        room = _room(folder) if runtime.is_main else ""
        if runtime.is_main:  # what was written takes room that the disk may lack
            shutil.rmtree(partial, ignore_errors=True)
        room = runtime.broadcast(room)
        raise CheckpointWriteError(f"{folder}: cannot be written: {errors[0]} ({room}earlier checkpoints are kept)")


def _room(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder.parent).free / 1e9:.1f} GB free on its disk, "
    except OSError:
        return ""
