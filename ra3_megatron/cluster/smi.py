"""What `nvidia-smi` says of a node's GPUs, read from its CSV.

Field names differ between drivers, and one that a driver does not know makes it refuse the whole query: what every
driver knows is asked first, the rest in queries of their own whose refusal is said.
"""

import csv
import io
import subprocess
from dataclasses import dataclass, field

FIELDS = (
    "index",
    "uuid",
    "name",
    "driver_version",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
    "retired_pages.pending",
)
REASONS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")
"""Reasons of lower clocks that a healthy idle GPU does not have."""
REMAPPED = ("gpu_uuid", "remapped_rows.pending", "remapped_rows.failure")
PROCESSES = ("gpu_uuid", "pid", "process_name", "used_memory")
_UNKNOWN = ("n/a", "not supported", "")
_SECONDS = 15


class SmiFailed(Exception):
    """nvidia-smi is there and does not answer; the message is its own."""


@dataclass
class Gpu:
    """One GPU. None: this GPU or driver does not say."""

    index: int
    uuid: str
    name: str
    driver: str
    memory_used: int | None
    """MiB."""
    uncorrected: int | None
    """ECC errors that could not be corrected, since the driver was loaded."""
    retired_pending: bool | None
    """Pages wait for a reset to be retired."""
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    slowed: tuple[str, ...] = ()
    """Those of REASONS that are active."""
    processes: list[str] = field(default_factory=list)
    """`name (pid)` of each process that computes on it."""
    broken: str = ""
    """What it answers in place of values: that it must be reset, say."""


def gpus() -> tuple[list[Gpu], list[str]]:
    """The GPUs that nvidia-smi shows, and what it could not be asked. FileNotFoundError without it, SmiFailed."""
    found = parse_gpus(_query("gpu", FIELDS))
    unasked = []
    for prefix in ("clocks_event_reasons", "clocks_throttle_reasons"):  # the new name, and that of drivers before 535
        try:
            add_reasons(found, _query("gpu", ("uuid", *(f"{prefix}.{reason}" for reason in REASONS))))
            break
        except SmiFailed:
            continue
    else:
        unasked.append("reasons of lower clocks")
    for name, fields, add in (
        ("remapped-rows", REMAPPED, add_remapped),
        ("compute-apps", PROCESSES, add_processes),
    ):
        try:
            add(found, _query(name, fields))
        except SmiFailed:
            unasked.append(name.replace("-", " "))
    return found, unasked


def parse_gpus(text: str) -> list[Gpu]:
    """GPUs of a CSV with the columns FIELDS."""
    found = []
    for index, uuid, name, driver, memory, uncorrected, retired in _rows(text, len(FIELDS)):
        cells = (name, driver, memory, uncorrected, retired)
        broken = next((cell for cell in cells if _is_broken(cell)), "")
        found.append(
            Gpu(int(index), uuid, name, driver, _number(memory), _number(uncorrected), _flag(retired), broken=broken)
        )
    return found


def add_reasons(gpus: list[Gpu], text: str) -> None:
    """Note why clocks are low: uuid and REASONS, each "Active" or "Not Active"."""
    known = {gpu.uuid: gpu for gpu in gpus}
    for uuid, *cells in _rows(text, 1 + len(REASONS)):
        if uuid in known:
            known[uuid].slowed = tuple(name for name, cell in zip(REASONS, cells, strict=True) if cell == "Active")


def add_remapped(gpus: list[Gpu], text: str) -> None:
    """Note rows of memory that wait to be remapped, or cannot be: columns REMAPPED."""
    known = {gpu.uuid: gpu for gpu in gpus}
    for uuid, pending, failed in _rows(text, len(REMAPPED)):
        if uuid in known:
            known[uuid].remap_pending, known[uuid].remap_failed = _flag(pending), _flag(failed)


def add_processes(gpus: list[Gpu], text: str) -> None:
    """Note the processes that compute: columns PROCESSES."""
    known = {gpu.uuid: gpu for gpu in gpus}
    for uuid, pid, name, _ in _rows(text, len(PROCESSES)):
        if uuid in known:
            known[uuid].processes.append(f"{name} ({pid})")


def visible(gpus: list[Gpu], variable: str | None) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES names, by index or by UUID; all without it."""
    if variable is None:
        return gpus
    names = [name.strip() for name in variable.split(",") if name.strip()]
    return [gpu for gpu in gpus if any(name == str(gpu.index) or _is_uuid(gpu.uuid, name) for name in names)]


def _query(what: str, fields: tuple[str, ...]) -> str:
    command = ["nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise SmiFailed(f"no answer within {_SECONDS} s") from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise SmiFailed(said[0] if said else f"exit code {done.returncode}")
    return done.stdout


def _rows(text: str, columns: int) -> list[list[str]]:
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if row]
    return [row for row in rows if len(row) == columns]


def _is_uuid(uuid: str, name: str) -> bool:
    return name.startswith("GPU-") and uuid.startswith(name)


def _bare(cell: str) -> str:
    return cell.strip("[]").lower()


def _is_broken(cell: str) -> bool:
    return "reset" in _bare(cell) or "unknown error" in _bare(cell) or _bare(cell).startswith("err!")


def _number(cell: str) -> int | None:
    return int(cell) if cell.isdigit() else None


def _flag(cell: str) -> bool | None:
    """Yes and No, or a number of rows."""
    if _bare(cell) in _UNKNOWN or _is_broken(cell):
        return None
    return cell.lower() == "yes" or (cell.isdigit() and int(cell) > 0)
