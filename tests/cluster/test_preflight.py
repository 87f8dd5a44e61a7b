"""`ra3 preflight` in real processes, each of which takes itself for a node: a good allocation, and bad ones by name.

Not covered: GPUs and NCCL, a hung file system.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from ra3_megatron.cluster.results import Limits
from tests.processes import python_path, run_processes

ROOT = Path(__file__).parents[2]


def one_case(name: str, folder: Path, limits: Limits) -> tuple[int, list[str], float]:
    """Exit code, what was printed, seconds; in this process something is amiss if it is the node of the case."""
    from ra3_megatron.cluster import arithmetic, clock, collective
    from ra3_megatron.report import versions
    from ra3_megatron.verbs.preflight import preflight

    rank = int(os.environ["RANK"])
    # a name of its own for each, and for each case a part of the store of its own
    here = {"SLURMD_NODENAME": f"n{rank}", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": name}
    run_dir = folder / "runs" / "run"
    amiss: Any = nullcontext()
    sizes = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1 and name == "other folder":
        run_dir = folder / "elsewhere" / "run"
    if rank == 1 and name == "unwritable":
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, sizes[1]))
    if rank == 0 and name == "no folder":
        (folder / "file").write_text("")
        run_dir = folder / "file" / "runs" / "run"
    if rank == 1 and name == "versions":
        real = versions.collect_versions()
        changed = {**real, "packages": {**real["packages"], "numpy": "1.0"}}
        amiss = patch.object(versions, "collect_versions", lambda: changed)
    if rank == 1 and name == "clock":
        amiss = patch.object(clock, "now", lambda: time.time() - 60.05)
    if rank == 1 and name == "defect":
        amiss = patch.object(clock, "answer", side_effect=LookupError("no clock"))
    if name == "wrong":  # the machine of the tests may be wrong itself
        amiss = patch.object(arithmetic, "questions", lambda device: [miscounting(rank == 1)])
    if rank == 1 and name == "raises":
        amiss = patch("ra3_megatron.cluster.disk.room", side_effect=LookupError("no disk"))
    if rank == 1 and name == "one is slow":
        amiss = patch.multiple(collective.dist, **{each: slowed(each) for each in ("all_reduce", "batch_isend_irecv")})
    start, printed = time.monotonic(), StringIO()
    out = folder / f"{name}.json" if name == "good" else None
    with patch.dict(os.environ, here), amiss, redirect_stdout(printed):
        try:
            code = preflight(run_dir, limits, out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, sizes)
    return code, printed.getvalue().splitlines(), time.monotonic() - start


def miscounting(wrong: bool) -> Any:
    """A division that is wrong in one of eight elements on the first processor, and right on others."""
    import torch

    from ra3_megatron.cluster.arithmetic import divisions

    right = divisions(torch.device("cpu"))

    def divide(a: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        given = right.answer.clone()
        if wrong and os.sched_getaffinity(0) == {0}:
            given[5::8] = torch.nextafter(given[5::8], torch.tensor(1.0))
        return given

    return dataclasses.replace(right, compute=divide)


def cases(folder: Path, limits: dict[str, dict[str, Any]]) -> dict[str, tuple[int, list[str], float]]:
    return {name: one_case(name, folder, Limits(**given)) for name, given in limits.items()}


SMALL = dataclasses.asdict(Limits(mib=1, timeout=40, min_free_gib=0.01, min_tmp_gib=0.01, arithmetic=0))
CASES = {
    "good": SMALL,
    "room": SMALL | {"min_free_gib": 1e9},
    **dict.fromkeys(("other folder", "unwritable", "no folder", "versions", "clock", "defect", "raises"), SMALL),
    "wrong": SMALL | {"arithmetic": 0.2},
    "all are slow": SMALL | {"min_bus_gbs": 1e6},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[tuple[int, list[str], float]]]]:
    """Each case's outcome in both processes."""
    folder = tmp_path_factory.mktemp("preflight")
    first, second = run_processes(2, cases, folder, CASES, timeout=400)
    return folder, {name: [first[name], second[name]] for name in CASES}


@pytest.mark.multiprocess
def test_a_good_allocation(found: Any) -> None:
    folder, outcomes = found
    (code, printed, _), (other, silent, _) = outcomes["good"]
    assert code == other == 0 and silent == []
    assert [line.split()[:3] for line in printed[2:]] == [["n0", "1", "CPU"], ["n1", "1", "CPU"]]
    content = json.loads((folder / "good.json").read_text())
    assert content["good"] is True and content["processes"] == {"n0": 1, "n1": 1}
    results = {(each["node"], each["check"]): each for each in content["results"]}
    assert {check for _, check in results} >= {"GPUs", "versions", "clock", "shared folder", "run folder"}
    rates = {float(results[node, "all-reduce GB/s"]["figure"]) for node in ("n0", "n1")}
    assert len(rates) == 1 and rates.pop() > 0
    assert abs(float(results["n1", "clock"]["figure"])) < 1


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("room", ["node n0: run folder: * should be 1e+09 (--min-free-gib)", "node n1: run folder: *"]),
        ("other folder", ["node n1: shared folder: */elsewhere: it is another folder than the first node's (no *"]),
        ("unwritable", ["node n1: shared folder: */runs: cannot be used (File too large)"]),
        ("no folder", ["node n0: shared folder: */file/runs: cannot be used (Not a directory)"]),
        ("versions", ["node n1: versions: numpy 1.0, but * on n0"]),
        ("clock", ["node n1: clock: -60.0* should be within 5 s *"]),
        ("defect", ["node n1: clock: could not be checked (LookupError: no clock)"]),
        ("raises", ["node n1: free room: could not be checked (LookupError: no disk)"]),
        ("wrong", ["node n1: arithmetic: CPU 0: wrong results (division in *: defective, take the node out"]),
        ("all are slow", ["node n0: all-reduce GB/s: *; every pair of nodes is slow", "node n1: all-reduce GB/s: *"]),
    ],
)
def test_a_bad_node_is_named(found: Any, name: str, lines: list[str]) -> None:
    """And nothing else is: one line for what is amiss, the same exit code in both processes."""
    (code, printed, seconds), (other, silent, _) = found[1][name]
    assert code == other == 3 and silent == []
    bad = [line for line in printed if line.startswith("node n")]
    assert len(bad) == len(lines), printed
    for line, pattern in zip(bad, lines, strict=True):
        place = 0
        for part in pattern.split("*"):
            place = line.find(part, place)
            assert place >= 0, (line, pattern)
            place += len(part)
    assert seconds < 38, "it does not wait for its time limit"


@pytest.mark.multiprocess
def test_nothing_is_left_behind(found: Any) -> None:
    folder, _ = found
    assert list((folder / "runs").iterdir()) == [] and not (folder / "elsewhere").exists()


def slowed(name: str) -> Any:
    """A function of torch.distributed that starts its transfer late."""
    import torch.distributed as dist

    function = getattr(dist, name)

    def late(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.6)
        return function(*arguments, **options)

    return late


def one_of_three(folder: Path) -> tuple[int, list[str], float]:
    """1 MiB in 0.6 s is 0.0017 GB/s for a pair; the others need 0.2 s at most."""
    return one_case("one is slow", folder, Limits(**SMALL | {"min_bus_gbs": 0.005}))


@pytest.mark.multiprocess
def test_the_node_that_slows_the_others_down_is_named(tmp_path: Path) -> None:
    (code, printed, _), *others = run_processes(3, one_of_three, tmp_path)
    assert [code, *(each[0] for each in others)] == [3, 3, 3]
    (line,) = [line for line in printed if line.startswith("node n")]
    assert line.startswith("node n1: all-reduce GB/s: 0.00 GB/s over all processes, should be 0.005"), line
    assert " with n0, " in line and line.endswith(" with n2")


ITSELF = ("-m", "ra3_megatron")


def start(
    rank: int, folder: Path, port: int, seconds: int, program: tuple[str, ...] = ITSELF, **changes: str
) -> subprocess.Popen[str]:
    """One of two processes, by the command line."""
    names = {"SLURMD_NODENAME": f"n{rank}", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2", "RANK": str(rank)}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": python_path(ROOT)}
    options = (
        "preflight",
        "--run-dir",
        str(folder / "run"),
        "--timeout",
        str(seconds),
        "--min-free-gib",
        "0.01",
        "--arithmetic",
        "0",
    )
    command = [sys.executable, *program, *options]
    given = {**os.environ, **names, **address, **changes}
    return subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.multiprocess
def test_a_process_that_does_not_come_is_named(tmp_path: Path) -> None:
    """The second of two on one side, the first on the other: each is missed, in time, and without a stack trace."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\n[ \"$*\" = 'show hostnames n[0-1]' ] && printf 'n0\\nn1\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "n[0-1]", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    processes = [start(0, tmp_path, free_port(), 8, **job), start(1, tmp_path, free_port(), 8, **job)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [3, 3], outputs
    assert "node n1: rendezvous: none of its processes came within 6 s" in outputs[0][0].splitlines()
    (line,) = outputs[1][0].splitlines()
    assert line.startswith("node n0: rendezvous: rank 0 cannot be reached: 127.0.0.1:")
    assert outputs[0][1] == outputs[1][1] == ""


@pytest.mark.multiprocess
def test_a_process_that_hangs_is_named_and_ends_nobody_else(tmp_path: Path) -> None:
    """The second process is stopped by a signal as soon as both have met; a third one hangs alone."""
    code = (
        "import os, signal, time\n"
        "from ra3_megatron.cluster import node\n"
        "def look(*given):\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    time.sleep(1000)\n"
        "node.look = look\n"
        "from ra3_megatron.cli import main\n"
        "main()\n"
    )
    alone = code.replace("    os.kill(os.getpid(), signal.SIGSTOP)\n", "")
    port = free_port()
    first, second = start(0, tmp_path, port, 12), start(1, tmp_path, port, 12, ("-c", code))
    third = start(0, tmp_path, free_port(), 4, ("-c", alone), WORLD_SIZE="1")
    try:
        output, errors = first.communicate(timeout=120)
        itself, _ = third.communicate(timeout=120)
    finally:
        for process in (second, third):
            process.kill()
            process.communicate()
    assert first.returncode == 3 and errors == "", (output, errors)
    (line,) = [line for line in output.splitlines() if line.startswith("node n")]
    assert line == "node n1: node: no answer from rank 1 within 11 s: hung or ended"
    assert third.returncode == 3, "a process ends even if its own check hangs"
    assert "node n0: node: rank 0 still hangs in it after 4 s" in itself.splitlines()


def without_a_launcher(run_dir: Path) -> list[int]:
    from ra3_megatron.verbs.preflight import preflight

    for name in [name for name in os.environ if name.startswith(("SLURM", "MASTER_", "RANK", "WORLD", "LOCAL_"))]:
        del os.environ[name]
    limits = Limits(timeout=40, min_free_gib=0.01, min_tmp_gib=0.01, gpus_per_node=0, arithmetic=0)
    codes = [preflight(run_dir, limits), preflight(run_dir, Limits(timeout=40, min_free_gib=1e9))]
    os.environ.update(RANK="0", WORLD_SIZE="1")  # which run_processes needs
    return codes


def test_one_process_needs_no_launcher(tmp_path: Path) -> None:
    assert run_processes(1, without_a_launcher, tmp_path / "run") == [[0, 3]]
    assert list(tmp_path.iterdir()) == []


def test_questions_that_take_the_time_of_the_other_checks_are_refused() -> None:
    command = [sys.executable, "-m", "ra3_megatron", "preflight", "--arithmetic", "30"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (2, "ra3: --arithmetic 30: at most a quarter of --timeout 60\n")


def test_a_node_that_cannot_execute_programs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from ra3_megatron.cluster import node
    from ra3_megatron.rlvr.sandboxing import command

    monkeypatch.setattr(command, "_problem", command._problem.__wrapped__)  # without its memory

    def found(limits: Limits) -> dict[str, tuple[str, str]]:
        seen = node.look("n1", 1, Path("runs"), limits)["results"]
        return {each["check"]: (each["state"], each["text"]) for each in seen}

    needed = Limits(gpus_per_node=0, sandbox=True)
    assert shutil.which("bwrap") is not None, "make install-sandbox"
    assert found(needed)["sandbox"][0] == "ok" and "sandbox" not in found(Limits(gpus_per_node=0))
    monkeypatch.setenv("PATH", "/nowhere")
    state, text = found(needed)["sandbox"]
    assert state == "bad" and text.startswith("sandbox=bubblewrap: bwrap is missing")
