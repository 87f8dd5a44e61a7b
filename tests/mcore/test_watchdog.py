"""The watchdog of one process: what it takes for a hang, and what it leaves then."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ra3_megatron.config.errors import HUNG
from ra3_megatron.mcore.watchdog import SLACK_MINUTES, group_minutes

PROCESS = """
import sys, time
from pathlib import Path
import ra3_megatron.mcore
import torch
from ra3_megatron.mcore import watchdog
from ra3_megatron.mcore.startup import Runtime

def stand_still():
    time.sleep(60)

with watchdog.watching(Path(sys.argv[1]), Runtime(torch.device("cpu"), 0, 1), 0.01):
    time.sleep(1.2)
    print("loading does not count", flush=True)
    watchdog.beat("step 1")
    for _ in range(12):
        time.sleep(0.1)
        watchdog.touch()
    print("a slow step is no hang", flush=True)
    with watchdog.paused():
        time.sleep(1.2)
    print("a save does not count", flush=True)
    watchdog.rest()
    with watchdog.paused():
        pass
    time.sleep(1.2)
    print("the end of a phase does not count", flush=True)
    watchdog.beat("step 7")
    with watchdog.paused():
        pass
    stand_still()
"""


def test_only_a_silent_phase_is_a_hang(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == HUNG, done.stderr
    assert done.stdout.count("\n") == 4, done.stdout
    (file,) = (tmp_path / "stacks").iterdir()
    assert file.name.endswith("-rank-0.txt") and " in stand_still\n" in file.read_text()
    (line,) = done.stderr.splitlines()
    assert line.startswith("ra3: rank 0 hangs: no heartbeat for ") and str(file) in line
    assert "the last one: step 7; it stands in stand_still (<string>:" in line
    assert line.endswith("; the same command with --resume goes on")


def test_process_groups_wait_longer_than_the_watchdog() -> None:
    assert group_minutes(0.1) == 0.1 + SLACK_MINUTES
    assert group_minutes(None) >= 30
