"""Which GPUs colocated engines get; no GPU is needed."""

import pytest
import torch

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.rollout.engine_pool import EnginePool, Place, colocated_gpus
from ra3_megatron.rollout.refit.plan import leaders


def engines(replicas: list[int], size: int, present: int = 8, nodes: int = 1) -> list[list[int]]:
    """GPUs of each replica's engine. replicas: number of the replica of every rank."""
    each = len(replicas) // nodes
    places = [Place(f"n{rank // each}", replica, rank % each) for rank, replica in enumerate(replicas)]
    return [colocated_gpus(places, rank, present, size) for rank in leaders(replicas)]


TP2_PP2_DP2 = [0, 0, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("replicas", "size", "nodes", "expected"),
    [
        (TP2_PP2_DP2, 2, 1, [[0, 1], [2, 3]]),
        (TP2_PP2_DP2, 4, 1, [[0, 1, 4, 5], [2, 3, 6, 7]]),  # a later stage's, not the next replica's
        (TP2_PP2_DP2, 2, 2, [[0, 1], [2, 3]]),
        ([0, 0, 0, 0], 4, 1, [[0, 1, 2, 3]]),
        ([0], 4, 1, [[0, 1, 2, 3]]),  # nobody else is there
        ([0, 1], 4, 2, [[0, 1, 2, 3], [0, 1, 2, 3]]),
    ],
)
def test_every_engine_has_gpus_of_its_own(
    replicas: list[int], size: int, nodes: int, expected: list[list[int]]
) -> None:
    assert engines(replicas, size, nodes=nodes) == expected


@pytest.mark.parametrize(
    ("replicas", "size", "nodes", "own"), [([0, 0, 1, 1], 4, 1, 2), (TP2_PP2_DP2, 4, 2, 2), ([0], 16, 1, 8)]
)
def test_an_engine_that_needs_more_is_refused(replicas: list[int], size: int, nodes: int, own: int) -> None:
    with pytest.raises(UserError, match=rf"^rollout.vllm.tensor={size}: .* these are {own}: use .*tensor={own} or"):
        engines(replicas, size, nodes=nodes)


@pytest.mark.parametrize(
    ("placement", "tensor", "message"),
    [
        ("server", 1, "engine 1 needs GPUs 2 to 2 of this node, which has 2: use fewer rollout.replicas"),
        ("colocated", 3, "these are 2: use rollout.vllm.tensor=2"),
    ],
)
def test_gpus_that_are_named_and_not_there_are_not_given_out(
    monkeypatch: pytest.MonkeyPatch, placement: str, tensor: int, message: str
) -> None:
    """CUDA sees those in front of the first that is not there, here two; the trainer has the first."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    rollout = {"engine": "vllm", "placement": placement, "vllm": {"tensor": tensor}}
    pool = object.__new__(EnginePool)
    pool.config = RunConfig.model_validate({"rollout": rollout})
    pool.runtime = Runtime(torch.device("cuda", 0), 0, world_size=1)
    pool._own_devices, pool._places = placement == "server", [Place("n", 0, 0)]
    if placement == "server":
        assert pool._devices(0) == ("5",)
    with pytest.raises(UserError, match=message):
        pool._devices(1)
