"""Half an hour of one GPU, turned into evidence: `python -m tests.gpu [PART …]` (make gpu).

Each part runs in a process of its own with a limit of its own: what crashes or hangs loses nothing of the others. It
ends with this one, however that ends: it would hold the GPU beside whatever runs next. At the end: `results.json`, the
table `results.md`, and the exit code 1 when a check did not hold or a part did not end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

from tests.gpu.evidence import say, write_json
from tests.gpu.machine import compiler, packages
from tests.gpu.parts import PARTS
from tests.gpu.table import table

ROOT = Path(__file__).resolve().parents[2]
GRACE = 20.0
"""Seconds that a part gets beyond those that it is told of."""
LOG = 8000
"""Characters of parts' progress on standard output, all parts together, and as many / 4 of failures; whatever is not
shown is in the results."""


def main(arguments: list[str]) -> int:
    """Parse, run, write; the exit code."""
    given = _parser().parse_args(arguments)
    begin = time.monotonic()
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    found = packages()
    say("packages: " + ", ".join(f"{name} {version}" for name, version in found.items() if version))
    say("missing: " + (", ".join(name for name, version in found.items() if not version) or "none"))
    if compiler() is None:
        say("no C compiler: what torch.compile and Triton make will fail")
    machine = _machine(out)
    if machine is None:
        return 2
    if machine["gpu"] is None and not given.small:
        sys.stderr.write("tests.gpu: needs an NVIDIA GPU; --small runs every part at tiny shapes on the CPU\n")
        return 2
    say(f"device: {machine['gpu'] or machine['processor']}; commit {machine['commit'] or 'unknown'}")
    parts = given.parts or list(PARTS)
    results: dict[str, Any] = {"machine": machine, "evidence": not given.small, "parts": {}}
    for name in parts:
        say(f"[{time.monotonic() - begin:5.0f} s] {name}: {PARTS[name]}")
        results["parts"][name] = run_part(name, out, given.minutes * 60.0, given.small, LOG // len(parts))
        write_json(out / "results.json", results)
        (out / "results.md").write_text(table(results), encoding="utf-8")
        say(f"[{time.monotonic() - begin:5.0f} s] {name}: {verdict(results['parts'][name])}")
    say(f"written: {out / 'results.json'}, {out / 'results.md'}")
    return 0 if all(is_good(part) for part in results["parts"].values()) else 1


def is_good(part: dict[str, Any]) -> bool:
    """Whether a part came to its end without errors, and all of its checks hold."""
    return part["status"] == "complete" and not part["errors"] and all(row.get("holds", True) for row in part["rows"])


def verdict(part: dict[str, Any]) -> str:
    """A part in one line."""
    checks = [row["holds"] for row in part["rows"] if "holds" in row]
    figures = len(part["rows"]) - len(checks)
    return (
        f"{part['status']} in {part['seconds']:.0f} s; {sum(checks)} of {len(checks)} checks hold, {figures} figures, "
        f"{len(part['missing'])} not run, {len(part['errors'])} errors"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=f"{', '.join(PARTS)}; none: all")
    parser.add_argument("--minutes", type=float, default=10.0, help="of each part at most")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the results")
    parser.add_argument("--small", action="store_true", help="tiny shapes, also on a CPU: no evidence")
    return parser


def _machine(out: Path) -> dict[str, Any] | None:
    command = [sys.executable, "-m", "tests.gpu.machine"]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), cwd=ROOT)
    (out / "machine.log").write_text(done.stderr, encoding="utf-8")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        sys.stderr.write(f"tests.gpu: this machine cannot run the project: {last}\n")
        return None
    described: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return described


def _environment() -> dict[str, str]:
    """Of child processes: they find this checkout, and libraries keep quiet."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    # all processes are on this machine, whose name need not resolve to an address
    here = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return {**here, **os.environ, **quiet, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def run_part(name: str, out: Path, seconds: float, small: bool, characters: int) -> dict[str, Any]:
    """Run one part; what it left. Lines of its progress are shown up to so many characters."""
    file, log = out / f"{name}.json", out / f"{name}.log"
    for old in (file, log):
        old.unlink(missing_ok=True)
    with log.open("ab") as errors, tempfile.TemporaryDirectory(prefix="ra3-gpu-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            command_of(name, file, seconds, small),
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**_environment(), "TMPDIR": folder},
            cwd=ROOT,
            start_new_session=True,
        )
        killed = _follow(process, seconds + GRACE, characters, errors)
    if not file.is_file():
        blank = {"part": name, "title": PARTS[name], "evidence": not small, "seconds": 0.0, "rows": [], "series": {}}
        return {**blank, "status": "crashed", "missing": [], "errors": [_ending(process, log)]}
    part: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if part["status"] == "running":
        part["status"] = "out of time" if killed else "crashed"
        if not killed:
            part["errors"].append(_ending(process, log))
        write_json(file, part)
    return part


def command_of(name: str, file: Path, seconds: float, small: bool) -> list[str]:
    """The command of a part's process."""
    command = [sys.executable, "-m", "tests.gpu.part", name, str(file), "--seconds", str(seconds)]
    command += ["--parent", str(os.getpid())]
    return [*command, "--small"] if small else command


def _follow(process: subprocess.Popen[bytes], seconds: float, characters: int, log: BinaryIO) -> bool:
    """Show what a part says until it ends; whether it had to be ended."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    end, hidden, rest, killed = time.monotonic() + seconds, 0, b"", False
    left = {False: characters, True: characters // 4}  # failures: True
    while True:
        # not reaped yet: its number stays that of its group
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        rest += process.stdout.read() or b""
        *lines, rest = rest.split(b"\n")
        for line in lines:
            if not line.startswith(b"  "):  # what a library prints
                log.write(line + b"\n")
                continue
            text = line.decode(errors="replace")[:160]
            failure = "FAILED" in text or "DOES NOT HOLD" in text
            if left[failure] >= len(text):
                say(text)
                left[failure] -= len(text)
            else:
                hidden += 1
        if ended:
            break
        if time.monotonic() > end:
            killed = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it may have started
    process.wait()
    if hidden:
        say(f"  … {hidden} more lines: in the results")
    return killed


def _ending(process: subprocess.Popen[bytes], log: Path) -> dict[str, str]:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
    return {"name": "process", "error": f"ended with {process.returncode}: {lines[-1][:300]}"}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
