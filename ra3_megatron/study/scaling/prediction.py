"""The planner's step time and memory for what a cell trains, and the device that it is told.

With `gpu: measure` the device is what the cells measured of it, written to `device.yaml` in the study's folder with the
keys of a GPU's description. Shares that a data sheet leaves to `scaling/rates.py` are then measured too, or 1 where
the measured rate is what is reached already.
"""

from collections.abc import Sequence
from statistics import median
from typing import Any

from ra3_megatron.config.yaml_io import dump
from ra3_megatron.report.run_folder import write_text
from ra3_megatron.scaling.memory import Work
from ra3_megatron.scaling.search import Planned, evaluate
from ra3_megatron.scaling.step import peak
from ra3_megatron.scaling.tables import Architecture, Gpu, gpu_named
from ra3_megatron.study.scaling.results import CellFigures
from ra3_megatron.study.scaling.spec import MEASURE, ScalingConfig

DEVICE_FILE = "device.yaml"
MANY = 1 << 20
"""Processes of a node where all of them are on one."""


def device_of(scaling: ScalingConfig, done: Sequence[CellFigures]) -> Gpu | None:
    """What the planner is told; None when it is to be measured and nothing is yet. UserError for one that is not known.

    Writes `device.yaml` when it is measured.
    """
    if scaling.gpu != MEASURE:
        return gpu_named(scaling.gpu)
    if not done:
        return None
    values = described(done, scaling.processes_per_node)
    text = "# What the cells of this study measured of their device: `ra3 plan --gpu` takes it.\n" + dump(values)
    write_text(scaling.path / DEVICE_FILE, text)
    return Gpu(**values)


def described(done: Sequence[CellFigures], processes_per_node: int | None) -> dict[str, Any]:
    """Keys of a GPU's description: of one process among as few as there were, medians over cells.

    Links are of the cells that have them. Without any, they are taken for as fast as the memory: nothing is sent then.
    """
    fewest = min(cell.processes for cell in done)
    alone = [probe for cell in done if cell.processes == fewest for probe in cell.raw["probes"]]

    def share(name: str) -> float:
        return round(min(1.0, median(probe["shares"][name] for probe in alone)), 4)

    def of(name: str) -> float:
        return _three(median(probe[name] for probe in alone))

    precision = done[0].precision
    tflops = {name: _three(median(probe["tflops"][name] for probe in alone)) for name in alone[0]["tflops"]}
    links = {name: _link(done, name) for name in ("node", "network")}
    inside = links["node"] or links["network"]
    rates = {
        f"{precision}_matmul": share("matmul"),
        "attention_forward": share("attention_forward"),
        "attention_backward": share("attention_backward"),
        "small_heads": 1.0,
        "memory": 1.0,
        "link": 1.0,
        "exposed": 1.0,
    }
    starts = [s for cell in done if (s := cell.raw["layer_start_seconds"]) is not None]
    if starts:
        rates["launch_seconds"] = float(f"{median(starts):.3g}")
    if inside is not None:
        rates["hop_seconds"] = float(f"{inside['hop_seconds']:.3g}")
    reference = of("copy_gb_s")
    return {
        "name": f"measured {alone[0]['device']}",
        "memory_gib": of("memory_gib"),
        "bf16_tflops": tflops["bf16"],
        "fp32_tflops": tflops["fp32"],
        "memory_gb_s": reference,
        "nvlink_gb_s": _three(inside["all_reduce_gb_s"]) if inside else reference,
        "gpus_per_node": processes_per_node or MANY,
        "network_gb_s": _three((links["network"] or inside or {"all_reduce_gb_s": reference})["all_reduce_gb_s"]),
        "context_gib": round(median(each["before_gib"] for cell in done for each in cell.raw["memory"]), 3),
        "rates": rates,
    }


def planned(cell: CellFigures, gpu: Gpu) -> Planned:
    """What the planner says of the cell's training. Raises ValueError when the device has no such precision."""
    config = cell.config
    settings = config.warm_start
    made = Architecture(cell.cell.arm, config.model, cell.raw["vocab_size"])
    work = Work(
        config.model.context_length,
        settings.global_batch_size,
        settings.micro_batch_size,
        cell.precision,
    )
    return evaluate(made, config.parallel, work, gpu)


def peak_of(scaling: ScalingConfig, cell: CellFigures, gpu: Gpu) -> float | None:
    """FLOP/s of all processes that MFU is held against: the data sheet's; None where they were measured in the cell."""
    if scaling.gpu == MEASURE:
        return None
    return peak(gpu, cell.precision) * cell.processes


def _link(done: Sequence[CellFigures], name: str) -> dict[str, float] | None:
    found = [cell.raw["probes"][0]["links"][name] for cell in done if name in cell.raw["probes"][0]["links"]]
    if not found:
        return None
    return {key: median(link[key] for link in found) for key in found[0]}


def _three(value: float) -> float:
    return float(f"{value:.3g}")
