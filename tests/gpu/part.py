"""One part in a process of its own: `python -m tests.gpu.part NAME FILE [--seconds N] [--small] [--parent PID]`.

Its rows go to FILE as they come; progress to standard output, everything that libraries say to standard error.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from ra3_megatron.text.lifetime import end_with
from tests.gpu.evidence import Evidence
from tests.gpu.parts import PARTS

if TYPE_CHECKING:
    from tests.gpu.setting import Setting


def main(arguments: list[str]) -> int:
    """Run the part; the exit code: 0 when it came to its end."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.part")
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--parent", type=int, help="process that started this one, which ends with it")
    given = parser.parse_args(arguments)
    if given.parent is not None:
        end_with(given.parent)
    evidence = Evidence(given.file, given.name, PARTS[given.name], given.small, given.seconds)
    try:
        prepare()
        run = importlib.import_module(f"tests.gpu.{given.name}").run
        with tempfile.TemporaryDirectory(prefix="ra3-gpu-") as folder:
            run(evidence, setting_of(given.small, Path(folder), given.file.parent))
    except BaseException as error:
        traceback.print_exc()
        evidence.fail(given.name, error)
        evidence.end("failed")
        return 1
    evidence.end("complete")
    return 0


def prepare() -> None:
    """Before Megatron-Core is imported: what differs between machines."""
    import torch

    if not torch.cuda.is_available():
        # beside a CPU, Transformer Engine's optimizer and kernels would be taken, and fail
        sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
    import ra3_megatron.mcore  # noqa: F401

    try:
        import psutil  # noqa: F401
    except ImportError:
        # Megatron-Core asks it for one figure, the memory of the process that writes a checkpoint
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        filesystem_async._process_memory = _resident


def setting_of(small: bool, folder: Path, out: Path) -> Setting:
    """Join a process group of one, and say where it runs."""
    from ra3_megatron.config.model import ParallelConfig
    from ra3_megatron.mcore import startup
    from tests.gpu.setting import Setting

    parallel = ParallelConfig(threads=1) if small else ParallelConfig()
    return Setting(small, folder, out, parallel, startup.initialize(parallel, seed=1))


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
