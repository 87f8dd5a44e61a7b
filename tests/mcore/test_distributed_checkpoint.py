"""Checkpoints: training goes on bit for bit, at other layouts too; whole or absent, whatever happens while saving.

Layouts here: tensor, data, distributed and replicated optimizers. Not covered here: pipeline, context and expert
parallelism over several processes.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ra3_megatron.config.errors import Unavailable, UserError
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.mcore import checkpoint
from ra3_megatron.mcore.checkpoint_record import read_record
from ra3_megatron.mcore.loss import PolicyLoss
from ra3_megatron.mcore.model import LanguageModel, build_model, language_model
from ra3_megatron.mcore.startup import Runtime, initialize
from ra3_megatron.mcore.trainer import Trainer
from tests.mcore.small_models import (
    MODEL,
    VOCAB,
    build,
    make_documents,
    make_trainer,
    micro_batches,
    put_in_rows,
    token_sets,
    weights,
)
from tests.processes import ProcessesFailed, run_processes

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

SINGLE = ParallelConfig(threads=1)
SINGLE_DISTRIBUTED = ParallelConfig(distributed_optimizer=True, threads=1)
TP2 = ParallelConfig(tensor=2, threads=1)
DP2 = ParallelConfig(data=2, threads=1)
DP2_DISTRIBUTED = ParallelConfig(data=2, distributed_optimizer=True, threads=1)
BF16 = MODEL.model_copy(update={"precision": "bf16", "init_std": 0.05})
EXPERTS = MODEL.model_copy(update={"num_experts": 4, "experts_per_token": 2, "expert_ffn_hidden_size": 24})
SAVED_AFTER, STEPS = 3, 6


def train(trainer: Trainer, runtime: Runtime, first: int, last: int) -> dict[str, Tensor]:
    """Steps `first` to `last`; losses and norms, and the weights at the end."""
    results = []
    for step in range(first, last):
        rows = put_in_rows(make_documents(12, seed=200 + step))
        result = trainer.step(micro_batches(rows, runtime, 2), PolicyLoss())
        results.append([result.loss, result.grad_norm, result.learning_rate])
    return {**weights(trainer.model, runtime), "results": torch.tensor(results, dtype=torch.float64)}


def save_half_way(folder: Path, parallel: ParallelConfig, runtime: Runtime, model: ModelConfig) -> dict[str, Tensor]:
    """Train all steps, saving on the way; what the steps after the checkpoint gave."""
    trainer = make_trainer(parallel, runtime, STEPS, model)
    train(trainer, runtime, 0, SAVED_AFTER)
    checkpoint.save(folder, trainer.model, runtime, {"step": SAVED_AFTER}, trainer)
    return train(trainer, runtime, SAVED_AFTER, STEPS)


def go_on(folder: Path, parallel: ParallelConfig, runtime: Runtime, model: ModelConfig) -> dict[str, Tensor]:
    """The same steps from the checkpoint, by a trainer that had other weights and a history of its own."""
    trainer = make_trainer(parallel, runtime, STEPS, model)
    train(trainer, runtime, 50, 52)
    assert checkpoint.load(folder, trainer.model, runtime, trainer)["step"] == SAVED_AFTER
    return train(trainer, runtime, SAVED_AFTER, STEPS)


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, and the number of optimizer steps."""
    loaded = dist_checkpointing.load_plain_tensors(str(folder))
    tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    return {**tensors, "steps": torch.tensor(loaded["optimizer"]["step"] if "optimizer" in loaded else 0)}


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("parallel", "model"),
    [(SINGLE, MODEL), (SINGLE, BF16), (SINGLE_DISTRIBUTED, MODEL), (SINGLE_DISTRIBUTED, BF16)],
    ids=["fp32", "bf16", "fp32-distributed", "bf16-distributed"],
)
def test_training_goes_on_bit_for_bit(
    runtime: Runtime, tmp_path: Path, parallel: ParallelConfig, model: ModelConfig
) -> None:
    expected = save_half_way(tmp_path / "saved", parallel, runtime, model)
    assert_identical(go_on(tmp_path / "saved", parallel, runtime, model), expected)


def test_saving_and_loading_change_nothing(runtime: Runtime, tmp_path: Path) -> None:
    """Neither the run that is saved nor random numbers notice; a loaded run draws the numbers of the saved one."""
    trainer = make_trainer(SINGLE, runtime, STEPS)
    uninterrupted = train(trainer, runtime, 0, STEPS)
    torch.manual_seed(3)
    trainer = make_trainer(SINGLE, runtime, STEPS)
    first = train(trainer, runtime, 0, SAVED_AFTER)
    torch.rand(7)
    checkpoint.save(tmp_path / "saved", trainer.model, runtime, {}, trainer)
    drawn = torch.rand(5)
    rest = train(trainer, runtime, SAVED_AFTER, STEPS)
    rest["results"] = torch.cat([first["results"], rest["results"]])
    assert_identical(rest, uninterrupted)
    checkpoint.load(tmp_path / "saved", trainer.model, runtime, trainer)
    assert torch.equal(torch.rand(5), drawn)


def test_generators_of_another_kind_of_device_stay_as_they_are(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's generator has a state of 16 bytes: a checkpoint that was saved on one loads here, but for that."""
    trainer = make_trainer(SINGLE, runtime, STEPS)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8))
        torch.manual_seed(5)
        saved = torch.get_rng_state()
        checkpoint.save(tmp_path / "gpu", trainer.model, runtime, {"step": 0}, trainer)
    torch.manual_seed(6)
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda *_: pytest.fail("a GPU's state was put into a CPU's generator")
    )
    checkpoint.load(tmp_path / "gpu", trainer.model, runtime, trainer)
    assert torch.equal(torch.get_rng_state(), saved)


def test_weights_alone(runtime: Runtime, tmp_path: Path) -> None:
    source, target = build(SINGLE, runtime, seed=5), build(SINGLE, runtime, seed=6)
    checkpoint.save(tmp_path / "weights", source, runtime, {"note": [1, "two"]})
    assert checkpoint.load(tmp_path / "weights", target, runtime)["note"] == [1, "two"]
    assert_identical(weights(target, runtime), weights(source, runtime))
    trainer = make_trainer(SINGLE, runtime)
    with pytest.raises(UserError, match="holds no optimizer state"):
        checkpoint.load(tmp_path / "weights", trainer.model, runtime, trainer)


def test_an_older_checkpoint_is_replaced(runtime: Runtime, tmp_path: Path) -> None:
    first, second, target = (build(SINGLE, runtime, seed=seed) for seed in (5, 6, 7))
    checkpoint.save(tmp_path / "weights", first, runtime, {"which": 1})
    checkpoint.save(tmp_path / "weights", second, runtime, {"which": 2})
    assert checkpoint.load(tmp_path / "weights", target, runtime)["which"] == 2
    assert_identical(weights(target, runtime), weights(second, runtime))
    assert os.listdir(tmp_path) == ["weights"]


# -- other layouts ----------------------------------------------------------------------------------------------------


def in_two_processes(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    runtime = initialize(TP2, seed=1)
    found["tp1 -> tp2"] = go_on(folder / "tp1", TP2, runtime, MODEL)
    found["tp2"] = save_half_way(folder / "tp2", TP2, runtime, MODEL)
    found["tp2 -> tp2"] = go_on(folder / "tp2", TP2, runtime, MODEL)
    found["failure"] = fail_on_one_rank(folder / "failing", runtime)
    runtime = initialize(DP2, seed=1)
    found["tp2 -> dp2"] = go_on(folder / "tp2", DP2, runtime, MODEL)
    found["tp1 -> dp2"] = go_on(folder / "tp1", DP2, runtime, MODEL)
    runtime = initialize(DP2_DISTRIBUTED, seed=1)
    for name, model in (("fp32", MODEL), ("bf16", BF16)):
        key = f"distributed {name}"
        found[key] = save_half_way(folder / key, DP2_DISTRIBUTED, runtime, model)
        found[f"{key} -> same"] = go_on(folder / key, DP2_DISTRIBUTED, runtime, model)
    found["one process -> distributed"] = go_on(folder / "one-distributed", DP2_DISTRIBUTED, runtime, MODEL)
    found["tp1 replicated -> distributed"] = go_on(folder / "tp1", DP2_DISTRIBUTED, runtime, MODEL)
    for name, model in (("fp32", MODEL), ("bf16", BF16)):  # back and forth, each copied by the other kind of optimizer
        copy_checkpoint(folder / f"distributed {name}", folder / f"replicated {name}", DP2, runtime, model)
        copy_checkpoint(folder / f"replicated {name}", folder / f"again {name}", DP2_DISTRIBUTED, runtime, model)
    return found


def copy_checkpoint(
    source: Path, target: Path, parallel: ParallelConfig, runtime: Runtime, model: ModelConfig = MODEL
) -> None:
    """Load with a trainer that had a history of its own, and save."""
    trainer = make_trainer(parallel, runtime, STEPS, model)
    train(trainer, runtime, 50, 51)
    checkpoint.load(source, trainer.model, runtime, trainer)
    checkpoint.save(target, trainer.model, runtime, {}, trainer)


def fail_on_one_rank(folder: Path, runtime: Runtime) -> str:
    """One rank cannot write: every rank hears of it, and the checkpoint before stays."""
    trainer = make_trainer(TP2, runtime)
    train(trainer, runtime, 0, 1)
    checkpoint.save(folder / "good", trainer.model, runtime, {}, trainer)
    before = weights(trainer.model, runtime)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if runtime.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(checkpoint.CheckpointWriteError) as caught:
            checkpoint.save(folder / "bad", trainer.model, runtime, {}, trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    runtime.barrier()
    assert os.listdir(folder) == ["good"]
    train(trainer, runtime, 1, 2)
    checkpoint.load(folder / "good", trainer.model, runtime, trainer)
    assert_identical(weights(trainer.model, runtime), before)
    return str(caught.value)


@pytest.mark.multiprocess
def test_other_layouts(runtime: Runtime, tmp_path: Path) -> None:
    expected = save_half_way(tmp_path / "tp1", SINGLE, runtime, MODEL)
    save_half_way(tmp_path / "one-distributed", SINGLE_DISTRIBUTED, runtime, MODEL)
    found, second = run_processes(2, in_two_processes, tmp_path)
    for name in (
        "tp1 -> tp2",
        "tp2",
        "tp2 -> dp2",
        "tp1 -> dp2",
        "one process -> distributed",
        "tp1 replicated -> distributed",
    ):
        assert_close(found[name], expected)
    assert_identical(found["tp2 -> tp2"], found["tp2"])
    for name in ("distributed fp32", "distributed bf16"):
        assert_identical(found[f"{name} -> same"], found[name])
    for name in ("fp32", "bf16"):
        original = stored(tmp_path / f"distributed {name}")
        assert_identical(stored(tmp_path / f"replicated {name}"), original)
        assert_identical(stored(tmp_path / f"again {name}"), original)
    # and back to one process
    assert_close(go_on(tmp_path / "tp2", SINGLE, runtime, MODEL), expected)
    assert_close(go_on(tmp_path / "distributed fp32", SINGLE_DISTRIBUTED, runtime, MODEL), expected)
    assert_close(go_on(tmp_path / "distributed fp32", SINGLE, runtime, MODEL), expected)
    # a rank that could not write
    assert found["failure"] == second["failure"]
    assert "bad: cannot be written" in found["failure"] and "earlier checkpoints are kept" in found["failure"]


# -- what is refused --------------------------------------------------------------------------------------------------


GONE = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:1")


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        (GONE, Unavailable),
        (dist.DistBackendError("NCCL communicator was aborted"), Unavailable),
        (CheckpointException("load", {1: (GONE, None)}), Unavailable),
        (CheckpointException("load", {1: (OSError("Input/output error"), None)}), UserError),
        (RuntimeError("PytorchStreamReader failed reading zip archive"), UserError),
        (pickle.UnpicklingError("invalid load key"), UserError),
    ],
)
def test_a_process_that_is_lost_is_no_mistake_of_the_user(
    problem: BaseException, kind: type[Exception], runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(SINGLE, runtime)
    checkpoint.save(tmp_path / "good", model, runtime, {})

    def fail(*arguments: Any) -> None:
        raise problem

    monkeypatch.setattr(checkpoint.dist_checkpointing, "load", fail)
    with pytest.raises(kind, match=rf"^{tmp_path / 'good'}: "):
        checkpoint.load(tmp_path / "good", model, runtime)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"hidden_size": 64}, "model.hidden_size=32, but this model has model.hidden_size=64"),
        ({"num_layers": 1}, "model.num_layers=2, but this model has model.num_layers=1"),
        ({"num_layers": 3}, "model.num_layers=2, but this model has model.num_layers=3"),
        ({"tied_embeddings": True}, "model.tied_embeddings=False, but this model has model.tied_embeddings=True"),
        ({"num_attention_heads": 6, "head_dim": 8}, "model.num_attention_heads=4, but this model has"),
        ({"rope_base": 5e5}, "model.rope_base=10000.0, but this model has model.rope_base=500000.0"),
    ],
)
def test_another_architecture_is_refused(runtime: Runtime, tmp_path: Path, change: dict[str, Any], line: str) -> None:
    checkpoint.save(tmp_path / "saved", build(SINGLE, runtime), runtime, {})
    other = build(SINGLE, runtime, MODEL.model_copy(update=change))
    before = weights(other, runtime)
    with pytest.raises(UserError) as caught:
        checkpoint.load(tmp_path / "saved", other, runtime)
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert_identical(weights(other, runtime), before)


def test_another_vocabulary_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "saved", build(SINGLE, runtime), runtime, {})
    other = build_model(MODEL, SINGLE, runtime, VOCAB - 1, token_sets()[:, :-1], seed=1)
    with pytest.raises(UserError, match="vocabulary=150, but this model has vocabulary=149"):
        checkpoint.load(tmp_path / "saved", other, runtime)


def test_a_run_of_other_length_or_precision_may_use_it(runtime: Runtime, tmp_path: Path) -> None:
    """Context length, precision and initialisation are no part of the weights."""
    source = build(SINGLE, runtime)
    checkpoint.save(tmp_path / "saved", source, runtime, {})
    other = build(SINGLE, runtime, BF16.model_copy(update={"context_length": 64}))
    checkpoint.load(tmp_path / "saved", other, runtime)
    found, expected = weights(other, runtime), weights(source, runtime)
    for name in expected:
        assert torch.equal(found[name], expected[name].bfloat16()), name


# -- distributed and replicated optimizers ----------------------------------------------------------------------------


@pytest.mark.parametrize("model", [MODEL, BF16, EXPERTS], ids=["fp32", "bf16", "experts"])
@pytest.mark.parametrize(("saved", "wanted"), [(SINGLE, SINGLE_DISTRIBUTED), (SINGLE_DISTRIBUTED, SINGLE)])
def test_either_optimizer_takes_the_state_of_the_other(
    runtime: Runtime, tmp_path: Path, saved: ParallelConfig, wanted: ParallelConfig, model: ModelConfig
) -> None:
    """Exactly: what it saves at once is what it loaded; and the steps that follow are the same."""
    expected = save_half_way(tmp_path / "saved", saved, runtime, model)
    copy_checkpoint(tmp_path / "saved", tmp_path / "copy", wanted, runtime, model)
    original = stored(tmp_path / "saved")
    assert_identical(stored(tmp_path / "copy"), original)
    assert int(original["steps"]) == SAVED_AFTER
    kinds = {name.split(".")[2] for name in original if name.startswith("optimizer.")}
    assert kinds == {"exp_avg", "exp_avg_sq"} | ({"fp32_param"} if model is BF16 else set())
    weight = "decoder.layers.self_attention.linear_qkv.weight"
    assert original[f"optimizer.state.exp_avg.{weight}"].abs().max() > 0
    if model is BF16:
        master = original[f"optimizer.state.fp32_param.{weight}"]
        assert master.dtype == torch.float32 and not torch.equal(master, master.bfloat16().float())
        assert torch.equal(master.bfloat16(), original[weight])
    found = go_on(tmp_path / "saved", wanted, runtime, model)
    if model is BF16:  # rounding of the gradient norm can turn a last bit of a bf16 weight
        torch.testing.assert_close(found["results"], expected["results"], rtol=1e-3, atol=1e-3)
    else:
        assert_close(found, expected)


def test_optimizer_state_of_another_precision_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    trainer = make_trainer(SINGLE, runtime)
    checkpoint.save(tmp_path / "saved", trainer.model, runtime, {}, trainer)
    other = make_trainer(SINGLE, runtime, model=BF16)
    with pytest.raises(UserError, match=r"of a fp32 run, but model\.precision=bf16: set model\.precision=fp32"):
        checkpoint.load(tmp_path / "saved", other.model, runtime, other)
    checkpoint.load(tmp_path / "saved", other.model, runtime)  # its weights are good for either


def test_an_optimizer_that_has_made_no_step(runtime: Runtime, tmp_path: Path) -> None:
    trainer = make_trainer(SINGLE, runtime, STEPS)
    checkpoint.save(tmp_path / "saved", trainer.model, runtime, {}, trainer)
    expected = train(trainer, runtime, 0, 2)
    other = make_trainer(SINGLE, runtime, STEPS)
    train(other, runtime, 50, 52)
    checkpoint.load(tmp_path / "saved", other.model, runtime, other)
    assert_identical(train(other, runtime, 0, 2), expected)


# -- extra state of modules -------------------------------------------------------------------------------------------


def test_extra_state_is_no_part_of_the_model(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's modules write more `_extra_state` entries than local ones, or fewer: both load."""
    source, target = build(SINGLE, runtime, seed=5), build(SINGLE, runtime, seed=6)
    describe = LanguageModel.sharded_state_dict

    def with_more(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = describe(self, *args, **kwargs)
        key = "decoder.final_layernorm._extra_state"
        return {**state, key: ShardedObject(key, torch.tensor([1, 2]), (1,), (0,))}

    def without_any(self: Any, *args: Any, **kwargs: Any) -> Any:
        return {k: v for k, v in describe(self, *args, **kwargs).items() if "_extra_state" not in k}

    held = describe(language_model(source))
    assert any("linear_qkv._extra_state" in key for key in held), "local linear layers have such entries"
    for name, writer in (("more", with_more), ("none", without_any), ("as it is", describe)):
        monkeypatch.setattr(LanguageModel, "sharded_state_dict", writer)
        checkpoint.save(tmp_path / name, source, runtime, {})
        for reader in (describe, with_more):
            monkeypatch.setattr(LanguageModel, "sharded_state_dict", reader)
            for parameter in target.parameters():
                parameter.data.zero_()
            checkpoint.load(tmp_path / name, target, runtime)
            assert_identical(weights(target, runtime), weights(source, runtime))


# -- trouble while saving ---------------------------------------------------------------------------------------------


def kill_while_saving(folder: Path, when: str) -> None:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    runtime = initialize(SINGLE, seed=1)
    trainer = make_trainer(SINGLE, runtime, STEPS)
    train(trainer, runtime, 0, 1)
    checkpoint.save(folder / "step-1", trainer.model, runtime, {"step": 1}, trainer)
    train(trainer, runtime, 1, 2)

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if when == "data":  # tensors are written, the index of them is not
        FileSystemWriterAsync.retrieve_write_results = die
    elif when == "record":  # everything is written, but perhaps not on the disk yet
        checkpoint.force_to_disk = die  # type: ignore[assignment]
    else:  # everything is on the disk under another name than the older checkpoint's
        rename = Path.rename
        Path.rename = lambda path, to: die() if Path(to).parent == folder else rename(path, to)  # type: ignore
    name = "step-1" if when == "replacing" else "step-2"
    checkpoint.save(folder / name, trainer.model, runtime, {"step": 2}, trainer)


@pytest.mark.multiprocess
@pytest.mark.parametrize("when", ["data", "record", "replacing"])
def test_killed_while_saving(runtime: Runtime, tmp_path: Path, when: str) -> None:
    """The older checkpoint is there and loads; what was half written is not taken, and does not disturb the next."""
    with pytest.raises(ProcessesFailed, match="exit code -9"):
        run_processes(1, kill_while_saving, tmp_path, when)
    name = "step-1" if when == "replacing" else "step-2"
    older, unfinished = sorted(os.listdir(tmp_path))
    assert older == "step-1" and unfinished.startswith(f"{name}.") and unfinished.endswith(".partial")
    trainer = make_trainer(SINGLE, runtime, STEPS)
    train(trainer, runtime, 0, 1)
    after_one_step = weights(trainer.model, runtime)
    train(trainer, runtime, 1, 2)
    assert checkpoint.load(tmp_path / "step-1", trainer.model, runtime, trainer)["step"] == 1
    assert_identical(weights(trainer.model, runtime), after_one_step)
    with pytest.raises(UserError, match="no complete checkpoint"):
        checkpoint.load(tmp_path / unfinished, trainer.model, runtime, trainer)
    checkpoint.save(tmp_path / name, trainer.model, runtime, {"step": 3}, trainer)
    assert checkpoint.load(tmp_path / name, trainer.model, runtime, trainer)["step"] == 3
    assert sorted(os.listdir(tmp_path)) == sorted({"step-1", name})


@pytest.mark.parametrize("limit", [5_000, 20_000])
def test_a_full_disk(runtime: Runtime, tmp_path: Path, limit: int) -> None:
    """Files cannot grow any more: the error says so, the last good checkpoint stays, a later save works."""
    trainer = make_trainer(SINGLE, runtime, STEPS)
    train(trainer, runtime, 0, 1)
    checkpoint.save(tmp_path / "good", trainer.model, runtime, {"step": 1}, trainer)
    before = weights(trainer.model, runtime)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(checkpoint.CheckpointWriteError) as caught:
            checkpoint.save(tmp_path / "bad", trainer.model, runtime, {"step": 2}, trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'bad'}: cannot be written: ")
    assert "File too large" in message or "iostream error" in message
    assert "GB free on its disk, earlier checkpoints are kept" in message
    assert "\n" not in message
    assert os.listdir(tmp_path) == ["good"], "nothing half-written takes up the room that is missing"
    train(trainer, runtime, 1, 2)
    assert checkpoint.load(tmp_path / "good", trainer.model, runtime, trainer)["step"] == 1
    assert_identical(weights(trainer.model, runtime), before)
    checkpoint.save(tmp_path / "bad", trainer.model, runtime, {"step": 2}, trainer)
    assert read_record(tmp_path / "bad")["step"] == 2


def test_a_folder_that_cannot_be_made(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(checkpoint.CheckpointWriteError, match=r"file/step-1: cannot be written: .*Not a directory"):
        checkpoint.save(tmp_path / "file" / "step-1", build(SINGLE, runtime), runtime, {})
