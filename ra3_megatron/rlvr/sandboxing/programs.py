"""The copy of the inside programs that the sandbox sees: compiled, in a folder that everybody may read."""

from __future__ import annotations

import py_compile
from pathlib import Path

from ra3_megatron.rlvr.sandboxing.bwrap import interpreter

SOURCES = Path(__file__).parent / "inside"
PLACE = "/runner"
"""Where the sandbox sees the copy."""


def compile_programs(folder: Path) -> None:
    """Compile the inside programs into `folder`/inside."""
    target = folder / "inside"
    target.mkdir(parents=True)
    for source in SOURCES.glob("*.py"):
        # Without a look at the source, which the sandbox does not see.
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(str(source), str(target / f"{source.stem}.pyc"), source.name, True, invalidation_mode=mode)
    for path in (folder, target, *target.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)


def runner_command(kind: str, cpu_seconds: int, most_cpu_seconds: int, folder: str = PLACE) -> list[str]:
    """The command line of the runner; `folder`: where it sees the copy. The others: see `inside/main.py`.

    Not -I: that would ignore PYTHONHASHSEED. The environment is ours, so nothing else can come in with it.
    """
    call = f"main({kind!r}, {cpu_seconds}, {most_cpu_seconds})"
    start = f"import sys; sys.path.insert(0, {folder!r}); from inside.main import main; {call}"
    return [interpreter()[1], "-P", "-s", "-S", "-c", start]
