"""What nvidia-smi says, and who is missing from a job. The CSV texts are made by hand from nvidia-smi's documented
columns and values (`nvidia-smi --help-query-gpu`); they were not captured from a machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ra3_megatron.cluster import devices, place, smi
from ra3_megatron.cluster.results import Limits, Result

NAME = "NVIDIA H100 80GB HBM3"
HEALTHY = f"0, GPU-aaaa, {NAME}, 550.54.15, 4, 0, No\n1, GPU-bbbb, {NAME}, 550.54.15, 4, 0, [N/A]\n"
IDLE = "GPU-aaaa, Not Active, Not Active, Not Active, Not Active\n"


def test_a_healthy_node() -> None:
    gpus = smi.parse_gpus(HEALTHY)
    smi.add_reasons(gpus, IDLE)
    smi.add_remapped(gpus, "GPU-aaaa, 0, 0\nGPU-bbbb, No, No\n")
    smi.add_processes(gpus, "")
    assert [(gpu.index, gpu.uuid, gpu.driver, gpu.memory_used, gpu.uncorrected) for gpu in gpus] == [
        (0, "GPU-aaaa", "550.54.15", 4, 0),
        (1, "GPU-bbbb", "550.54.15", 4, 0),
    ]
    assert (gpus[0].retired_pending, gpus[1].retired_pending) == (False, None)
    assert gpus[0].remap_pending is gpus[1].remap_failed is False
    assert [devices.problems(gpu) for gpu in gpus] == [[], []]


def test_every_fault_is_seen_on_the_gpu_that_has_it() -> None:
    text = (
        f"0, GPU-aaaa, {NAME}, 550.54.15, 70000, 0, No\n"
        f"1, GPU-bbbb, {NAME}, 550.54.15, 9000, 2, Yes\n"
        f"2, GPU-cccc, {NAME}, 550.54.15, [GPU requires reset], [GPU requires reset], [GPU requires reset]\n"
    )
    gpus = smi.parse_gpus(text)
    smi.add_reasons(gpus, IDLE + "GPU-bbbb, Active, Active, Not Active, Not Active\n")
    smi.add_remapped(gpus, "GPU-aaaa, 0, 0\nGPU-bbbb, 1, Yes\n")
    smi.add_processes(gpus, "GPU-aaaa, 4321, python3, 69000\n")
    found = [[line.split(": ", 1)[1].split(":")[0] for line in devices.problems(gpu)] for gpu in gpus]
    assert found == [
        ["used by python3 (4321)"],
        [
            "2 uncorrected ECC errors since the driver was loaded, should be 0",
            "pages of memory wait to be retired",
            "rows of memory wait to be remapped",
            "rows of memory could not be remapped",
            "clocks are held down (hw_slowdown, hw_thermal_slowdown)",
            "9000 MiB in use before the job, should be under 2048",
        ],
        ["answers [GPU requires reset]"],
    ]
    assert all(line.startswith("GPU 1: ") for line in devices.problems(gpus[1]))


def test_only_visible_gpus_count() -> None:
    gpus = smi.parse_gpus(HEALTHY)
    for variable, expected in ((None, [0, 1]), ("1", [1]), ("GPU-aa", [0]), ("", []), ("0,GPU-bbbb", [0, 1])):
        assert [gpu.index for gpu in smi.visible(gpus, variable)] == expected, variable


def fake_smi(folder: Path, text: str) -> None:
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


def test_nvidia_smi_is_asked_by_the_names_that_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script answers as a driver before 535 does, which has no clocks_event_reasons and no remapped rows."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    fake_smi(
        tmp_path,
        f"""case "$1" in
        --query-gpu=*clocks_throttle_reasons.hw_slowdown*) echo "GPU-aaaa, Not Active, Active, Not Active, Active";;
        --query-gpu=index,*) echo "0, GPU-aaaa, {NAME}, 525.60.13, 4, 0, No";;
        --query-compute-apps=*) ;;
        *) echo "Field is not a valid field to query."; exit 2;;
        esac""",
    )
    (gpu,), unasked = smi.gpus()
    assert gpu.slowed == ("hw_thermal_slowdown", "sw_thermal_slowdown") and unasked == ["remapped rows"]
    fake_smi(tmp_path, 'echo "Unable to determine the device handle for GPU0000:3B:00.0: Unknown Error"; exit 15')
    with pytest.raises(smi.SmiFailed, match="Unable to determine the device handle"):
        smi.gpus()
    ((result,), _, _) = (devices.check("n1", 1, Limits())[0], 0, 0)
    assert result.state == "bad" and "nvidia-smi: Unable to determine" in result.text


@pytest.mark.parametrize(
    ("count", "shown", "processes", "wanted", "state", "text"),
    [
        (8, 8, 8, None, "ok", "8 GPUs for 8 processes"),
        (7, 7, 8, None, "bad", "7 GPUs that torch can use (7 in nvidia-smi); 8 processes need 8"),
        (7, 7, 7, 8, "bad", "7 GPUs that torch can use (7 in nvidia-smi); --gpus-per-node 8 need 8"),
        (0, 0, 4, None, "ok", "no GPUs: processes on CPU"),
        (0, 0, 4, 4, "bad", "0 GPUs that torch can use (0 in nvidia-smi); --gpus-per-node 4 need 4"),
        (0, 8, 4, None, "warn", "nvidia-smi shows 8 GPUs, torch can use none: processes on CPU"),
    ],
)
def test_gpus_are_counted(count: int, shown: int, processes: int, wanted: int | None, state: str, text: str) -> None:
    (result,) = devices.counted("n1", count, shown, processes, Limits(gpus_per_node=wanted))
    assert (result.state, result.text) == (state, text)


@pytest.mark.parametrize(
    ("variable", "limits", "state", "text"),
    [
        (None, Limits(), "ok", "no GPUs: processes on CPU"),
        ("0", Limits(), "ok", "no GPUs: processes on CPU"),
        ("8", Limits(), "bad", "the job has 8 GPUs, torch can use none (0 in nvidia-smi): ra3 doctor says what is"),
        ("8", Limits(gpus_per_node=0), "ok", "GPUs not wanted: processes on CPU"),
    ],
)
def test_a_job_with_gpus_does_not_train_on_processors(
    variable: str | None, limits: Limits, state: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_smi() -> None:
        raise FileNotFoundError

    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices.smi, "gpus", no_smi)
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    if variable is not None:
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", variable)
    (result,), _, _ = devices.check("n1", 8, limits)
    assert result.state == state and result.text.startswith(text)


def test_a_node_with_fewer_gpus_than_others_is_named() -> None:
    assert devices.compare({"n1": 8, "n2": 8}) == []
    (result,) = devices.compare({"n1": 8, "n2": 0, "n3": 8})
    assert result == Result("n2", "GPUs", "bad", "0 GPUs, other nodes have 8", "0")


def test_who_is_missing() -> None:
    nodes = ["n1", "n2", "n3"]
    here = {0: "n1", 1: "n1", 4: "n3"}
    assert place.absent(here, 6, 2, nodes) == [
        ("n2", "none of its processes came"),
        ("n3", "1 of its 2 processes came"),
    ]
    assert place.absent({0: "a", 2: "b"}, 4, 2, []) == [("a", "rank 1 did not come"), ("b", "rank 3 did not come")]
    assert place.absent({0: "a", 1: "a"}, 4, 2, []) == [("of rank 2, 3", "rank 2, 3 did not come")]
    assert place.absent({0: "a"}, 2, None, []) == [("of rank 1", "rank 1 did not come")]
    assert place.absent({0: "n1"}, 2, None, ["n1"]) == [("?", "rank 1 did not come")]
    assert place.absent({0: "n1", 1: "n2"}, 2, 1, ["n1", "n2"]) == []


def test_names_of_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)
    assert place.job_nodes() == []
    assert place.node_name() == subprocess.run(["hostname"], capture_output=True, text=True).stdout.strip()
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu-7")
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-7")
    assert place.job_nodes() == ["gpu-7"] and place.node_name() == "gpu-7"
