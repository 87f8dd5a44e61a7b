"""Any command behind bubblewrap: what it gets, how it ends, and what happens when the sandbox itself fails."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.rlvr.sandbox import (
    Isolation,
    Limits,
    Sandbox,
    SandboxError,
    Verdict,
    require_bubblewrap,
    run_command,
)
from ra3_megatron.rlvr.sandboxing import bwrap, command, execute
from ra3_megatron.rlvr.sandboxing.bwrap import interpreter
from tests.rlvr.programs import functions, processes_with, soon

pytestmark = pytest.mark.multiprocess

PYTHON = interpreter()[1]
RIGHT = functions("def add(a, b):\n    return a + b", "assert add(1, 2) == 3")


def python(code: str) -> list[str]:
    return [PYTHON, "-I", "-S", "-c", code]


def test_output_and_exit_code(bubblewrap: Isolation) -> None:
    code = "import sys; print(sys.stdin.read().upper()); sys.stderr.write('said'); sys.exit(3)"
    ended = run_command(python(code), Limits(), bubblewrap, stdin=b"words")
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, b"WORDS\n", b"said")
    assert not (ended.timed_out or ended.out_of_memory or ended.flooded) and 0 < ended.seconds < 10


def test_the_bounds_of_a_command(bubblewrap: Isolation) -> None:
    """Each bound is told apart from the others."""
    hang = run_command(python("input()\nwhile True: pass  # it-hangs"), Limits(seconds=1), bubblewrap, stdin=b"\n")
    assert not processes_with("it-hangs")
    assert hang.timed_out and not hang.out_of_memory and 1 <= hang.seconds < 20
    code = "import os, time\nfor _ in range(4): os.fork()\nx = bytearray(40 << 20)\ntime.sleep(60)"
    greedy = run_command(python(code), Limits(seconds=60, memory_mib=200, processes=64), bubblewrap)
    assert greedy.out_of_memory and not greedy.timed_out
    loud = run_command(python("while True: print('x' * 1000)"), Limits(output_kib=8), bubblewrap)
    assert loud.flooded and len(loud.stdout) == 8192
    crowd = run_command(python("import os\nwhile True: os.fork()"), Limits(processes=8), bubblewrap)
    assert b"BlockingIOError" in crowd.stderr


def test_nothing_of_this_process_is_passed_on(bubblewrap: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither variables nor descriptors; what is given arrives."""
    monkeypatch.setenv("A_TOKEN_OF_THE_USER", "x")
    reading, writing = os.pipe()
    os.set_inheritable(reading, True)
    code = "import os; print(sorted(os.environ), [n for n in range(3, 512) if os.path.exists(f'/proc/self/fd/{n}')])"
    try:
        ended = run_command(python(code), Limits(), bubblewrap, env={"GIVEN": "1"})
    finally:
        os.close(reading)
        os.close(writing)
    names = sorted({*bwrap.ENVIRONMENT, "GIVEN", "PWD"})
    assert ended.stdout.decode() == f"{names} []\n"


def test_paths_that_are_given(bubblewrap: Isolation, tmp_path: Path) -> None:
    """Read-only ones can be read, writable ones written; their owner stays."""
    readable, writable, hidden = (tmp_path / name for name in ("readable", "writable", "hidden"))
    for folder, mode in ((readable, 0o755), (writable, 0o700), (hidden, 0o755)):
        folder.mkdir(mode=mode)
        (folder / "file").write_text(folder.name)
    code = f"""
import os
print(open({str(readable / "file")!r}).read(), open({str(writable / "file")!r}).read(), os.path.exists({str(hidden)!r}))
os.mkdir({str(writable / "new")!r})
open({str(writable / "new" / "made")!r}, "w").write("made")
os.symlink("/etc/passwd", {str(writable / "link")!r})
try:
    open({str(readable / "made")!r}, "w")
except OSError:
    print("refused")
"""
    before = [os.lstat(path) for path in ("/etc/passwd", tmp_path)]
    ended = run_command(python(code), Limits(), bubblewrap, read_only=[readable], writable=[writable])
    assert (ended.stdout, ended.stderr) == (b"readable writable False\nrefused\n", b"")
    assert (writable / "new" / "made").read_text() == "made"
    owners = {(os.lstat(path).st_uid, os.lstat(path).st_gid) for path in (writable, *writable.rglob("*"))}
    assert owners == {(os.getuid(), os.getgid())}
    assert [os.lstat(path).st_uid for path in ("/etc/passwd", tmp_path)] == [found.st_uid for found in before]


def test_packages_of_this_environment(bubblewrap: Isolation) -> None:
    """A command of this virtual environment: its packages are given, its processes may share semaphores."""
    code = """
import sys, hypothesis, multiprocessing
def double(x): return 2 * x
if __name__ == "__main__":
    value = multiprocessing.Value("i", 5)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(sys.prefix, pool.map(double, [1, 2]), value.value)
"""
    limits = Limits(seconds=60, memory_mib=1024, processes=64)
    packages = Path(__import__("hypothesis").__file__).parents[1]
    given = [sys.prefix] if packages.is_relative_to(sys.prefix) else [sys.prefix, packages]
    env = {"PYTHONPATH": str(packages)}
    ended = run_command([sys.executable, "-c", code], limits, bubblewrap, read_only=given, env=env)
    assert ended.stdout.decode() == f"{sys.prefix} [2, 4] 5\n", ended.stderr


def test_a_command_that_does_not_exist(bubblewrap: Isolation) -> None:
    """Is its caller's mistake, not the sandbox's failure."""
    ended = run_command(["/no/such/command"], Limits(), bubblewrap)
    assert ended.returncode == 127 and b"/no/such/command" in ended.stderr


def test_without_isolation(tmp_path: Path) -> None:
    """Its own folder, a cleared environment, and the limits of one process; the folder is gone afterwards."""
    code = "import os; print(os.getcwd()); print(sorted(os.environ)); open('x', 'w'); x = bytearray(1 << 30)"
    ended = run_command(python(code), Limits(), Isolation.UNSAFE)
    place, names = ended.stdout.decode().splitlines()
    assert names == str(sorted(bwrap.ENVIRONMENT)) and b"MemoryError" in ended.stderr and not Path(place).exists()
    ended = run_command(python("import time; time.sleep(60)"), Limits(seconds=0.5), Isolation.UNSAFE)
    assert ended.timed_out and ended.seconds < 20


# When the sandbox fails


def failing(times: int, how: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first `times` attempts fail; the list grows with each attempt."""
    attempts: list[int] = []
    right, popen = bwrap.wrapped, subprocess.Popen

    def wrapped(*args: object, **kwargs: object) -> list[str]:
        attempts.append(1)
        line = right(*args, **kwargs)  # type: ignore[arg-type]
        if len(attempts) > times:
            return line
        if how == "setup":
            return [
                *line[: line.index("--remount-ro")],
                "--ro-bind",
                "/no/such/file",
                "/x",
                *line[line.index("--remount-ro") :],
            ]
        return ["/bin/sh", "-c", "kill -9 $$"] if how == "killed" else line

    def start(*args: object, **kwargs: object) -> object:
        if how == "fork" and len(attempts) < times:
            attempts.append(1)
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return popen(*args, **kwargs)  # type: ignore[call-overload]

    def memory_of(pids: list[int]) -> int:
        if how == "unreadable" and len(attempts) <= times:
            raise ValueError("what /proc says of a process cannot be read")
        return 0

    monkeypatch.setattr(execute, "memory_of", memory_of)
    monkeypatch.setattr(execute, "WATCH_SECONDS", 0.0)  # it is looked at in any case
    monkeypatch.setattr(command, "wrapped", wrapped)
    monkeypatch.setattr(execute.subprocess, "Popen", start)
    monkeypatch.setattr(command, "BACKOFF_SECONDS", 0.01)
    return attempts


@pytest.mark.parametrize("how", ["setup", "killed", "fork", "unreadable"])
def test_failures_of_the_sandbox_pass(bubblewrap: Isolation, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few are not seen in the verdict."""
    with Sandbox(bubblewrap, Limits(), 1) as sandbox:
        attempts = failing(2, how, monkeypatch)
        assert sandbox.grade_one(RIGHT).verdict is Verdict.PASSED and len(attempts) >= 3


@pytest.mark.parametrize("how", ["setup", "killed", "fork", "unreadable"])
def test_failures_of_the_sandbox_that_stay(bubblewrap: Isolation, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are an error, and never a verdict on the program."""
    with Sandbox(bubblewrap, Limits(), 1) as sandbox:
        failing(10**9, how, monkeypatch)
        with pytest.raises(SandboxError, match="4 times"):
            sandbox.grade_one(RIGHT)
        with pytest.raises(SandboxError, match="4 times"):
            run_command(python("pass"), Limits(), bubblewrap)


def test_what_is_unsafe_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By several at once, too."""
    said: list[str] = []

    def slowly(message: str, *_: object) -> None:
        time.sleep(0.3)
        said.append(message)

    monkeypatch.setattr(command.logger, "warning", slowly)
    command._warn.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: run_command(["/bin/true"], Limits(), Isolation.UNSAFE), range(4)))
    assert len(said) == 1


def test_a_killed_runner_is_no_verdict(bubblewrap: Isolation, monkeypatch: pytest.MonkeyPatch) -> None:
    """When something outside kills the runner (the kernel, out of memory), the program is graded once more."""
    killed: list[int] = []
    uses = execute._uses

    def kill_first(watched: execute.Watched, disk: int) -> int:
        first = watched.first()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one that has ended by itself
            if first is not None and b"inside.main" in Path(f"/proc/{first}/cmdline").read_bytes() and not killed:
                os.kill(first, 9)
                killed.append(first)
        return uses(watched, disk)

    monkeypatch.setattr(execute, "_uses", kill_first)
    with Sandbox(bubblewrap, Limits(), 1) as sandbox:
        slow = functions("import time\ntime.sleep(0.5)\ndef f():\n    return 1", "assert f() == 1")
        assert sandbox.grade_one(slow).verdict is Verdict.PASSED and killed


def test_a_killed_host_leaves_no_process(bubblewrap: Isolation, tmp_path: Path) -> None:
    """`kill -9` of the process that grades ends what it grades (its folder of compiled programs stays)."""
    mark = "of-a-killed-host"
    code = '''
from ra3_megatron.rlvr.sandbox import *
mark = "of-a-" + "killed-host"
program = f"""
import os, sys, time
if os.fork() == 0:
    os.execv(sys.executable, [sys.executable, "-S", "-c", "import time; time.sleep(100)  # {mark}"])
time.sleep(100)
"""
with Sandbox(Isolation.BUBBLEWRAP, Limits(seconds=120), 1) as sandbox:
    sandbox.grade([Program(program, FunctionTests("", ("assert True",)))])
'''
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}) as host:
        began = soon(lambda: len(processes_with(mark)) == 1, 60)
        host.kill()
    assert began and soon(lambda: not processes_with(mark))


def test_a_missing_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with both ways out; without isolation nothing is asked for."""
    monkeypatch.setattr(command.shutil, "which", lambda _: None)
    command._problem.cache_clear()
    try:
        with pytest.raises(UserError, match=r"make install-sandbox.*apt-get install bubblewrap.*subprocess-unsafe"):
            require_bubblewrap(Isolation.BUBBLEWRAP)
        with pytest.raises(UserError), Sandbox(Isolation.BUBBLEWRAP, Limits(), 1):
            pass
        require_bubblewrap(Isolation.UNSAFE)
    finally:
        command._problem.cache_clear()


@pytest.mark.parametrize(
    ("stand_in", "words"),
    [
        ("echo bubblewrap 0.6.1", "too old"),
        (
            "[ $1 = --version ] && echo bubblewrap 0.9.0 || { echo bwrap: No permission for it >&2; exit 1; }",
            "No permission for it",
        ),
    ],
)
def test_a_bubblewrap_that_does_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: str, words: str
) -> None:
    """What is wrong with it is said."""
    tmp_path.chmod(0o755)
    script = tmp_path / "bwrap"
    script.write_text(f"#!/bin/sh\n{stand_in}\n")
    script.chmod(0o755)
    for parent in script.parents[: len(script.parents) - 2]:
        parent.chmod(0o755)
    monkeypatch.setattr(command.shutil, "which", lambda _: str(script))
    command._problem.cache_clear()
    try:
        with pytest.raises(UserError, match=words):
            require_bubblewrap(Isolation.BUBBLEWRAP)
    finally:
        command._problem.cache_clear()
