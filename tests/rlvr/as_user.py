"""Run as a script: grade some programs and attacks as whoever runs this, and print what came out as JSON."""

from __future__ import annotations

import json
import os
import sys

from ra3_megatron.rlvr.sandbox import FunctionTests, Isolation, Limits, Program, Sandbox, StdinTests, run_command

SHARED_MEMORY = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        held = bytearray(60 << 20)
        time.sleep(60)
time.sleep(60)
"""
FILES = """
import time
with open("/tmp/x", "wb") as file:
    for _ in range(118):
        file.write(bytes(1 << 20))
time.sleep(60)
"""
FORKS = """
import os, time
def count():
    number = 0
    try:
        while os.fork():
            number += 1
        time.sleep(60)
    except BlockingIOError:
        return number
"""
LOOKS = """
import os
def looks():
    opened = []
    for name in ("mem", "environ", "fd/0", "fd/1", "maps", "root/tmp"):
        try:
            os.close(os.open("/proc/1/" + name, os.O_RDONLY))
            opened.append(name)
        except OSError:
            pass
    return opened
"""
SIGNALS = "import os\nfor number in range(1, 65):\n    os.kill(1, number)\ndef f():\n    return 1"


def main() -> None:
    """Prints {"user": …, "verdicts": {name: [verdict, detail]}, "command": …}."""
    programs = {
        "right": ("def f():\n    return 1", "assert f() == 1"),
        "wrong": ("def f():\n    return 2", "assert f() == 1"),
        "exit": ("import sys\nsys.exit(0)", "assert f() == 1"),
        "hangs": ("while True:\n    pass", "assert f() == 1"),
        "memory of children": (SHARED_MEMORY, "assert f() == 1"),
        "memory of files": (FILES, "assert f() == 1"),
        "forks": (FORKS, "assert count() == 14, count()"),
        "looks": (LOOKS, "assert looks() == [], looks()"),
        "signals": (SIGNALS, "assert f() == 1"),
    }
    with Sandbox(Isolation.BUBBLEWRAP, Limits(seconds=6, memory_mib=110, disk_mib=120), 2) as sandbox:
        graded = sandbox.grade([Program(code, FunctionTests("", (test,))) for code, test in programs.values()])
        graded.append(sandbox.grade_one(Program("print(input())", StdinTests((("1", "1"),)))))
    verdicts = {name: [str(out.verdict), out.detail] for name, out in zip([*programs, "script"], graded, strict=True)}
    ended = run_command(["/bin/sh", "-c", "id -u; echo $HOME"], Limits(), Isolation.BUBBLEWRAP)
    json.dump({"user": os.getuid(), "verdicts": verdicts, "command": ended.stdout.decode()}, sys.stdout)


if __name__ == "__main__":
    main()
