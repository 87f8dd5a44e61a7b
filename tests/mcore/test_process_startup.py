"""Start-up: the world must fit the layout, threads are set, and CPU support must come before Megatron-Core."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from ra3_megatron.config.errors import Unavailable, UserError
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.config.run import RunConfig
from ra3_megatron.mcore.launch import SLURM, launched
from ra3_megatron.mcore.startup import Runtime, available_cores, initialize, seed_everything
from tests.processes import run_processes


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


def test_a_world_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError) as caught:
        initialize(ParallelConfig(tensor=2, data=2), seed=1)
    assert str(caught.value) == (
        "the layout needs parallel.tensor * pipeline * context * data = 4 processes, but 1 were started: start 4"
    )
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = RunConfig(parallel=ParallelConfig(tensor=2, data=2))
    with pytest.raises(UserError) as caught:
        initialize(config.parallel, seed=1, advice=config.layout_advice)
    assert str(caught.value).endswith(
        "= 4 processes, but 3 were started: start 4; what would fit 3 processes with other batch sizes: "
        "parallel.tensor=1 parallel.data=3"
    )


@pytest.mark.parametrize(
    ("variables", "missing"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "no MASTER_ADDR and no MASTER_PORT"),
        (
            {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "MASTER_ADDR": "n1"},
            "no MASTER_PORT",
        ),
    ],
)
def test_processes_that_are_not_told_where_to_meet(variables: dict[str, str], missing: str) -> None:
    """Each would wait for the others at a port of its own."""
    clean = [name for name in os.environ if name.startswith(("SLURM_", "MASTER_")) or name in ("RANK", "WORLD_SIZE")]
    code = (
        f"import os; [os.environ.pop(name) for name in {clean}]; os.environ.update({variables})\n"
        "import ra3_megatron.mcore\n"
        "from ra3_megatron.config.model import ParallelConfig\n"
        "from ra3_megatron.mcore.startup import initialize\n"
        "initialize(ParallelConfig(data=2), seed=1, timeout_minutes=1 / 60)"
    )
    said = python(code).stderr
    assert f"2 processes were started, and not told where to meet ({missing}): export MASTER_ADDR" in said


@pytest.mark.parametrize("place", ["0", "1"])
def test_more_processes_than_gpus_are_refused_on_all_of_them(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": place, "WORLD_SIZE": "2", "LOCAL_RANK": place, "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"^2 processes on node .* see 1 GPUs there, and each needs one of its own: "):
        initialize(ParallelConfig(data=2), seed=1, timeout_minutes=1 / 60)


@pytest.mark.parametrize(
    "variables",
    [
        {"MASTER_ADDR": "n1"},
        {"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29511"},
        {"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29511", "TORCHELASTIC_USE_AGENT_STORE": "True"},
    ],
)
def test_a_process_alone_meets_nobody_elsewhere(variables: dict[str, str]) -> None:
    """Some sites export these to everybody; a torchrun of one process has a store of its own."""
    code = (
        "import os; [os.environ.pop(name, None) for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')]\n"
        f"os.environ.update({variables})\n"
        "import ra3_megatron.mcore\n"
        "from ra3_megatron.config.model import ParallelConfig\n"
        "from ra3_megatron.mcore.startup import initialize, shutdown\n"
        "print(initialize(ParallelConfig(), seed=1, timeout_minutes=0.1).world_size); shutdown()"
    )
    done = python(code)
    assert done.stdout == "1\n", done.stderr


def test_a_world_of_one(runtime: Runtime) -> None:
    assert runtime.is_main and runtime.world_size == runtime.data_size == runtime.tensor_size == 1
    assert runtime.gather_data("x") == ["x"] and runtime.broadcast("y") == "y"
    runtime.barrier()
    if not torch.cuda.is_available():
        assert runtime.device == torch.device("cpu")


def test_the_seed_decides_random_numbers(runtime: Runtime) -> None:
    def numbers(seed: int) -> list[torch.Tensor]:
        from megatron.core import tensor_parallel

        seed_everything(seed)
        found = [torch.rand(3)]
        with tensor_parallel.get_cuda_rng_tracker().fork():
            found.append(torch.rand(3))
        return [*found, torch.rand(3)]

    first, again, other = numbers(1), numbers(1), numbers(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[1]), "the tracker has a stream of its own"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"RANK": "0"}, True),
        ({"SLURM_PROCID": "0"}, False),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "1"}, True),
    ],
)
def test_launched(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: bool) -> None:
    for name in ("RANK", "SLURM_PROCID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched() is expected


def places() -> dict[str, Any]:
    found: dict[str, Any] = {}
    # the environment of srun is enough: no RANK, no WORLD_SIZE
    for name, source in SLURM.items():
        os.environ[source] = os.environ.pop(name)
    os.environ["SLURM_STEP_ID"] = "0"
    for name, parallel in (
        ("tp2", ParallelConfig(tensor=2, threads=3)),
        ("dp2", ParallelConfig(data=2)),
    ):
        runtime = initialize(parallel, seed=1)
        found[name] = (runtime.rank, runtime.tensor_rank, runtime.data_rank, runtime.gather_data(runtime.rank))
        found[name, "threads"] = torch.get_num_threads()
        found[name, "broadcast"] = runtime.broadcast(f"from {runtime.rank}")
    with pytest.raises(UserError, match="= 1 processes, but 2 were started: start 1"):
        initialize(ParallelConfig(), seed=1)
    return found


@pytest.mark.multiprocess
def test_places_in_the_layout() -> None:
    first, second = run_processes(2, places)
    assert first["tp2"] == (0, 0, 0, [0]) and second["tp2"] == (1, 1, 0, [1])
    assert first["dp2"] == (0, 0, 0, [0, 1]) and second["dp2"] == (1, 0, 1, [0, 1])
    for found in (first, second):
        assert found["tp2", "threads"] == 3, "parallel.threads"
        assert found["dp2", "threads"] == max(1, available_cores() // 2), "the machine's cores are shared"
        assert found["tp2", "broadcast"] == found["dp2", "broadcast"] == "from 0"


def test_cpu_support_after_megatron_is_refused() -> None:
    done = python("import megatron.core\nimport ra3_megatron.mcore")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == (
        "RuntimeError: megatron.core was imported before ra3_megatron.mcore: import ra3_megatron.mcore first"
    )


def test_imports_are_quiet_and_leave_the_process_alone() -> None:
    """No warnings of missing GPU packages, no process group, torch.compile as it was."""
    code = (
        "import torch; before = torch.compile\n"
        "import ra3_megatron.mcore.trainer, ra3_megatron.mcore.checkpoint, ra3_megatron.mcore.cpu as cpu\n"
        "cpu.install()\n"
        "assert torch.compile is before and not torch.distributed.is_initialized()\n"
    )
    done = python(code, PYTHONWARNINGS="default")
    assert done.returncode == 0, done.stderr
    assert "not installed" not in done.stderr


def test_norms_of_megatron_core_are_split_over_sequences_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers are those of fp32 models there, and of all where Transformer Engine is missing."""
    from megatron.core.transformer import torch_norm

    from ra3_megatron.mcore import cpu
    from ra3_megatron.mcore.model import transformer_config

    fresh = types.ModuleType(torch_norm.__name__)
    assert isinstance(torch_norm.__loader__, cpu._Loader)
    torch_norm.__loader__.inner.exec_module(fresh)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        cpu._fix_norm(fresh)
    config = transformer_config(ModelConfig(), ParallelConfig(tensor=2, sequence=True))
    norm = fresh.WrappedTorchNorm(config, 8)
    assert isinstance(norm, torch.nn.RMSNorm) and norm.weight.sequence_parallel  # type: ignore[attr-defined]


def test_a_model_is_built_where_apex_is_installed(tmp_path: Path) -> None:
    """Megatron-Core would take its norm for the last one, which is a LayerNorm."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    code = (
        "import ra3_megatron.mcore\n"
        "from ra3_megatron.config.model import ParallelConfig\n"
        "from ra3_megatron.mcore.startup import initialize\n"
        "from tests.mcore.small_models import build\n"
        "parallel = ParallelConfig(threads=1)\n"
        "print(type(build(parallel, initialize(parallel, seed=1))[0].decoder.final_layernorm).__name__)\n"
    )
    done = python(code, PYTHONPATH=os.pathsep.join([str(tmp_path), os.getcwd()]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["RMSNorm"]


def _main_is_slow() -> tuple[float, str]:
    """What a collective would not wait for: its process groups give up after a second."""
    from ra3_megatron.verbs.processes import on_main

    runtime = initialize(ParallelConfig(data=2, threads=1), seed=1, timeout_minutes=1 / 60)
    begin, said = time.monotonic(), ""
    on_main(runtime, lambda: time.sleep(4))
    taken = time.monotonic() - begin
    for action in (_mistaken, _failed):
        try:
            on_main(runtime, action)
        except (UserError, Unavailable) as error:
            said += f"{type(error).__name__}: {error}; "
    return taken, said


def _mistaken() -> None:
    raise UserError("a mistake")


def _failed() -> None:
    raise Unavailable("a sandbox that does not start")


@pytest.mark.multiprocess
def test_what_the_main_process_does_alone_may_take_longer_than_any_timeout() -> None:
    for taken, said in run_processes(2, _main_is_slow):
        assert taken >= 4 and said == "UserError: a mistake; Unavailable: a sandbox that does not start; "


def test_starting_again_leaves_no_groups_behind() -> None:
    """Those of gloo keep threads, which slow everything down."""
    initialize(ParallelConfig(threads=1), seed=1)
    groups, threads = len(dist.distributed_c10d._world.pg_map), psutil.Process().num_threads()
    for _ in range(3):
        initialize(ParallelConfig(threads=1), seed=1)
    assert len(dist.distributed_c10d._world.pg_map) == groups
    assert psutil.Process().num_threads() <= threads + 3
