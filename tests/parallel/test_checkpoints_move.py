"""A checkpoint saved at any topology of the table goes on in one process, and one process's at any topology.

By way of one process, every layout's checkpoint so loads at every other one: weights, both kinds of optimizer, learning
rate. `tests/mcore/test_distributed_checkpoint.py` tests what is bit for bit, and what is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.mcore import checkpoint
from ra3_megatron.mcore.checkpoint_record import read_record
from ra3_megatron.mcore.startup import Runtime, initialize
from tests.mcore.small_models import make_documents, make_trainer, micro_batches, put_in_rows, weights
from tests.parallel.comparison import TOLERANCES, Tolerance, without_padding
from tests.parallel.matrix import POLICY, stream_model
from tests.parallel.topologies import TOPOLOGIES
from tests.processes import ProcessesFailed, run_processes

SAVED_AFTER, STEPS = 2, 4
SINGLE = ParallelConfig(threads=1)
Numbers = dict[str, torch.Tensor]


def train(trainer: Any, runtime: Runtime, first: int, last: int) -> Numbers:
    """Steps `first` to `last`; what they report, and the weights at the end."""
    results = []
    for step in range(first, last):
        rows = put_in_rows(make_documents(16, seed=300 + step))
        result = trainer.step(micro_batches(rows, runtime, 2), POLICY)
        results.append((result.loss, result.grad_norm, result.learning_rate))
    trainer.synchronize()
    names = ("loss", "grad_norm", "learning_rate")
    reported = {n: torch.tensor(v, dtype=torch.float64) for n, v in zip(names, zip(*results, strict=True), strict=True)}
    return {**reported, **weights(trainer.model, runtime)}


def save_on_the_way(folder: Path, parallel: ParallelConfig, runtime: Runtime, model: ModelConfig) -> Numbers:
    """Train all steps and save on the way; what came behind the checkpoint."""
    trainer = make_trainer(parallel, runtime, STEPS, model)
    train(trainer, runtime, 0, SAVED_AFTER)
    checkpoint.save(folder, trainer.model, runtime, {"step": SAVED_AFTER}, trainer)
    return train(trainer, runtime, SAVED_AFTER, STEPS)


def go_on(folder: Path, parallel: ParallelConfig, runtime: Runtime, model: ModelConfig) -> Numbers:
    """The same from the checkpoint, by a trainer that had other weights and a history of its own."""
    trainer = make_trainer(parallel, runtime, STEPS, model)
    train(trainer, runtime, 50, 51)
    assert checkpoint.load(folder, trainer.model, runtime, trainer)["step"] == SAVED_AFTER
    return train(trainer, runtime, SAVED_AFTER, STEPS)


def pass_on(start: Path, to: Path, parallel: ParallelConfig, runtime: Runtime, model: ModelConfig) -> None:
    """Load a checkpoint and save it again."""
    trainer = make_trainer(parallel, runtime, STEPS, model)
    checkpoint.load(start, trainer.model, runtime, trainer)
    checkpoint.save(to, trainer.model, runtime, {}, trainer)


def stored(folder: Path) -> Numbers:
    """Every tensor of a checkpoint, whole: weights and moments."""
    from megatron.core import dist_checkpointing  # behind ra3_megatron.mcore

    loaded = dist_checkpointing.load_plain_tensors(str(folder))
    step = loaded["optimizer"]["step"]
    return {"steps": torch.tensor(step), **{n: v for n, v in loaded.items() if isinstance(v, torch.Tensor)}}


def in_processes(folder: Path, names: list[str]) -> dict[str, Numbers]:
    """What came behind one process's checkpoint at each topology; leaves a checkpoint of each."""
    found = {}
    for name in names:
        topology = TOPOLOGIES[name]
        runtime = initialize(topology.parallel, seed=1)
        model = stream_model(topology)
        start = folder / f"one process, {topology.model}"
        pass_on(start, folder / f"passed on by {name}", topology.parallel, runtime, model)
        found[name] = go_on(start, topology.parallel, runtime, model)
        save_on_the_way(folder / name, topology.parallel, runtime, model)
    return found if dist.get_rank() == 0 else {}


class Moves:
    """Checkpoints of one process and of the topologies that this session tests, and what came behind them."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names = folder, names
        self.runtime = initialize(SINGLE, seed=1)
        self.expected: dict[str, Numbers] = {}
        for topology in (TOPOLOGIES[name] for name in names):
            if topology.model not in self.expected:
                place = folder / f"one process, {topology.model}"
                self.expected[topology.model] = save_on_the_way(place, SINGLE, self.runtime, stream_model(topology))
        self._found: dict[str, Numbers | ProcessesFailed] = {}

    def found(self, name: str) -> Numbers:
        if name not in self._found:
            size = TOPOLOGIES[name].parallel.world_size
            together = [n for n in self.names if TOPOLOGIES[n].parallel.world_size == size]
            try:
                self._found |= run_processes(
                    size, in_processes, self.folder, together, timeout=60 + 60 * len(together)
                )[0]
            except ProcessesFailed as failure:
                self._found |= dict.fromkeys(together, failure)
        result = self._found[name]
        if isinstance(result, ProcessesFailed):
            raise result
        return result


@pytest.fixture(scope="module")
def moves(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Moves:
    chosen = {
        item.callspec.params["name"]: None
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }
    return Moves(tmp_path_factory.mktemp("checkpoints"), list(chosen))


def assert_same(found: Numbers, expected: Numbers) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance: Tolerance = TOLERANCES[name] if name in TOLERANCES else TOLERANCES["weights"]
        one, other = without_padding(name, found[name], value)
        torch.testing.assert_close(
            one, other, atol=tolerance.absolute, rtol=tolerance.relative, msg=lambda text, n=name: f"{n}: {text}"
        )


NAMES = [
    pytest.param(name, marks=() if topology.ci else pytest.mark.full_matrix) for name, topology in TOPOLOGIES.items()
]


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_processs_checkpoint_goes_on_at_any_layout(moves: Moves, name: str) -> None:
    assert_same(moves.found(name), moves.expected[TOPOLOGIES[name].model])


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_a_layout_passes_on_is_the_same_bit_for_bit(moves: Moves, name: str) -> None:
    """Weights, moments and the number of steps, loaded and saved again."""
    moves.found(name)
    expected = stored(moves.folder / f"one process, {TOPOLOGIES[name].model}")
    found = stored(moves.folder / f"passed on by {name}")
    assert found.keys() == expected.keys() and len(found) > 20 and int(found["steps"]) == SAVED_AFTER
    for key, value in expected.items():
        one, other = without_padding(key, found[key], value)
        assert torch.equal(one, other), key


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_any_layouts_checkpoint_goes_on_in_one_process(moves: Moves, name: str) -> None:
    moves.found(name)
    topology = TOPOLOGIES[name]
    record = read_record(moves.folder / name)
    for key, size in record["layout"].items():
        asked = getattr(topology.parallel, key)
        assert size == (topology.parallel.tensor if asked is None else asked), key
    found = go_on(moves.folder / name, SINGLE, moves.runtime, stream_model(topology))
    assert_same(found, moves.expected[topology.model])
