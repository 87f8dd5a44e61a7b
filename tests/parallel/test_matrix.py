"""Every topology of the table computes what one process computes: samples, scores, losses, gradients and weights.

Processes are started once for all topologies of one world size.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ra3_megatron.config.model import ParallelConfig
from ra3_megatron.mcore.startup import initialize
from ra3_megatron.text.transcript import Role
from tests.mcore.small_models import assembled, build, pieces, weights
from tests.parallel.comparison import TOLERANCES, differences
from tests.parallel.matrix import SPLITS, STEPS, Method, Numbers, Outcome, run
from tests.parallel.topologies import MODELS, TOPOLOGIES
from tests.processes import ProcessesFailed, run_processes

SECONDS_EACH = 120.0
"""Time limit of one topology."""
PARTS = ("streams", "scores", "warm_start", "grpo", "estep", "mstep")


def in_processes(names: list[str]) -> dict[str, Outcome]:
    """The outcome of each topology. Whole tensors, which are the same everywhere by construction, from rank 0 only."""
    outcomes = {}
    for name in names:
        outcome = run(TOPOLOGIES[name])
        if dist.get_rank() > 0:
            outcome = {
                part: {kind: values for kind, values in numbers.items() if kind not in ("gradients", "weights")}
                for part, numbers in outcome.items()
            }
        outcomes[name] = outcome
    return outcomes


class Matrix:
    """Outcomes of the topologies that this session tests, and of one process."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self._outcomes: dict[str, list[Outcome] | ProcessesFailed] = {}
        self._references: dict[str, Outcome] = {}

    def ranks(self, name: str) -> list[Outcome]:
        """The outcome of a topology on each of its processes."""
        if name not in self._outcomes:
            self._run_all_of(TOPOLOGIES[name].parallel.world_size)
        outcome = self._outcomes[name]
        if isinstance(outcome, ProcessesFailed):
            raise outcome
        return outcome

    def _run_all_of(self, size: int) -> None:
        names = [name for name in self.names if TOPOLOGIES[name].parallel.world_size == size]
        try:
            self._store(names, size)
        except ProcessesFailed:
            for name in names:  # which ones was it?
                try:
                    self._store([name], size)
                except ProcessesFailed as failure:
                    self._outcomes[name] = failure

    def _store(self, names: list[str], size: int) -> None:
        ranks = run_processes(size, in_processes, names, timeout=60 + SECONDS_EACH * len(names))
        for name in names:
            self._outcomes[name] = [rank[name] for rank in ranks]

    def reference(self, model: str) -> Outcome:
        """The outcome of one process with this toy model."""
        if model not in self._references:
            topology = next(t for t in TOPOLOGIES.values() if t.model == model)
            single = dataclasses.replace(
                topology, parallel=ParallelConfig(threads=1), splits=False, micro_batch_tokens=None
            )
            self._references[model] = run(single)
        return self._references[model]


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest) -> Matrix:
    chosen = {
        item.callspec.params["name"]: None
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec") and "name" in item.callspec.params
    }
    return Matrix(list(chosen))


def rows(splits: bool = False) -> list[Any]:
    """Names of the table as parameters; those that are not in the representative subset carry a marker."""
    return [
        pytest.param(name, marks=() if topology.ci else pytest.mark.full_matrix)
        for name, topology in TOPOLOGIES.items()
        if topology.splits or not splits
    ]


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("name", rows())
@pytest.mark.parametrize("part", PARTS)
def test_a_layout_computes_what_one_process_computes(matrix: Matrix, name: str, part: str) -> None:
    found = matrix.ranks(name)[0][part]
    expected = matrix.reference(TOPOLOGIES[name].model)[part]
    assert differences(found, expected) == []


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("name", rows())
def test_all_processes_report_the_same(matrix: Matrix, name: str) -> None:
    """Bit for bit: whatever a process goes on to decide by these numbers, all decide alike."""
    first, *others = matrix.ranks(name)
    for other in others:
        assert other.keys() == first.keys()
        for part, numbers in other.items():
            for kind, values in numbers.items():
                for key, value in values.items():
                    assert torch.equal(first[part][kind][key], value), f"{part}: {kind} {key}"


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("name", rows(splits=True))
@pytest.mark.parametrize("split", SPLITS)
def test_how_a_batch_is_dealt_out_does_not_matter(matrix: Matrix, name: str, split: str) -> None:
    """Number and size of micro-batches, rows of padding, which rank and row holds which document, ranks of unequal
    load: counts are global, there is no mean of means."""
    found = matrix.ranks(name)[0][f"streams, {split}"]
    assert differences(found, matrix.reference(TOPOLOGIES[name].model)["streams"]) == []


# -- the comparison is worth something --------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_what_is_compared_with_exercises_everything(matrix: Matrix, model: str) -> None:
    """Gradients are no rounding errors and are clipped, weights move, thoughts are sampled, ratios are clipped."""
    outcome = matrix.reference(model)
    for part in ("streams", "warm_start", "grpo", "estep", "mstep"):
        numbers = outcome[part]
        clip = 0.5 if part == "streams" else 0.3
        assert bool((numbers["grad_norm"][""][[0, -1]] > clip).all()), part
        for name, value in numbers["gradients"].items():
            assert all(float(layer.abs().max()) > 1e-4 for layer in layers_of(name, value)), f"{part}: {name}"
        assert len(set(numbers["learning_rate"][""].tolist())) == STEPS
    initial = initial_weights(model)
    chain = [initial, *(outcome[part]["weights"] for part in ("warm_start", "mstep"))]
    later = [(chain[1], outcome[part]["weights"]) for part in ("estep", "grpo")]
    for before, after in [*pairwise(chain), *later]:
        for name, value in after.items():
            assert all(float(layer.abs().max()) > 1e-4 for layer in layers_of(name, value - before[name])), name

    counts = outcome["streams"]["counts"]
    assert all(bool((values > 3).all()) for values in counts.values())
    assert bool((outcome["mstep"]["counts"]["THOUGHT_TOKENS"] > 20).all())
    estep = outcome["estep"]
    assert bool((estep["counts"]["CLIPPED"][1::2] > 20).all()), "ratios of the second update of each batch"
    assert bool((estep["stats"]["MISMATCH"][0::2] < 1e-3).all()), "the first update is on-policy"
    grpo = outcome["grpo"]
    assert bool((grpo["counts"]["CLIPPED"][1::2] > 20).all()) and bool((grpo["stats"]["MISMATCH"][0::2] < 1e-3).all())
    assert bool((grpo["metrics"]["kl"] > 0.01).all()) and bool((grpo["metrics"]["advantage_std"] > 0.5).all())
    assert grpo["transcripts"]["versions"].unique().tolist() == [0, 1]
    assert 0.5 < float(estep["advantages"][""].std()) < 2
    assert float(estep["rewards"]["reward"].std()) > 0.1

    half = 64  # of a vocabulary padded to 128
    for part in ("scores", "estep", "mstep"):
        transcripts = outcome[part]["transcripts"]
        assert 0.1 < float(transcripts["think"].float().mean()) < 0.9
        thoughts = transcripts["ids"][transcripts["roles"] == Role.THOUGHT]
        assert bool((thoughts < half).any()) and bool((thoughts >= half).any()) and len(thoughts.unique()) > 20
    assert float(outcome["scores"]["entropies"]["of choices"].max()) > 1
    total = outcome["scores"]["logits"]["normalised"].double().exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5, msg="they are whole distributions")


def layers_of(name: str, value: torch.Tensor) -> list[torch.Tensor]:
    """A stacked tensor layer by layer (and expert by expert)."""
    leading = 0 if "layers" not in name else 2 if ".experts." in name else 1
    return list(value.flatten(0, leading - 1)) if leading else [value]


def initial_weights(model: str) -> dict[str, torch.Tensor]:
    topology = next(t for t in TOPOLOGIES.values() if t.model == model)
    single = dataclasses.replace(topology, parallel=ParallelConfig(threads=1))
    runtime = initialize(single.parallel, seed=1)
    return weights(Method(single, runtime).model(), runtime)


@pytest.mark.parametrize("kind", TOLERANCES)
def test_the_comparison_finds_what_is_out_of_tolerance(kind: str) -> None:
    tolerance = TOLERANCES[kind]
    value = torch.tensor([[0.5, -2.0, 3.0]], dtype=torch.float64)
    allowed = tolerance.absolute + tolerance.relative * 2
    expected = {kind: {"one": value, "two": value}}

    def found(change: float) -> Numbers:
        return {kind: {"one": value, "two": value + torch.tensor([0, change, 0])}}

    assert differences(found(0.9 * allowed), expected) == []
    (line,) = differences(found(1.1 * allowed + 1e-9), expected)
    assert line.startswith(f"{kind} two: 1 of 3 numbers differ, by ")
    assert differences(found(float("nan")), expected)
    assert differences({kind: {"one": value}}, expected)
    assert differences({kind: {"one": value, "two": value[0]}}, expected)
    assert differences({}, expected)


def test_replicas_that_differ_are_found() -> None:
    """`whole` puts tensors together only from pieces that agree, cover everything and do not overlap."""
    parallel = ParallelConfig(threads=1)
    runtime = initialize(parallel, seed=1)
    mine = pieces(build(parallel, runtime), lambda parameter: parameter)
    assert assembled([mine, mine]).keys() == {key for key, *_ in mine}
    key, shape, place, piece = mine[0]
    other = piece.clone()
    other.view(-1)[3] += 1e-7
    with pytest.raises(AssertionError, match=f"ranks disagree on {key}"):
        assembled([mine, [(key, shape, place, other)]])
    with pytest.raises(AssertionError, match="no rank holds a part of"):
        assembled([[(key, shape, tuple(slice(0, n - 1) for n in shape), piece[:-1, :-1])]])
