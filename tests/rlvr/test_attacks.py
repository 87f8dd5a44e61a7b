"""Programs that attack the sandbox. Each test says what it proves; docs/sandbox.md has the table.

An attack tells what it found as the result of `attack()`; a test that passes on it has seen the attack fail.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import threading
from pathlib import Path

import pytest

from ra3_megatron.rlvr.sandbox import Isolation, Limits, Sandbox, Verdict
from ra3_megatron.rlvr.sandboxing.memory import descendants
from tests.rlvr.programs import ERROR_OF, RIGHT, functions, holds, processes_with, script, soon

pytestmark = pytest.mark.multiprocess

MARK = "a1b2-left-behind"


# What a program may use


def test_a_fork_bomb_is_bounded(hasty: Sandbox) -> None:
    """Processes are bounded, for real root too, as the host sees while the bomb goes off; all are gone after it."""
    most, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not stop.is_set():
            most = max(most, len(descendants(os.getpid())))

    watcher = threading.Thread(target=watch)
    before = len(descendants(os.getpid()))
    watcher.start()
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    outcome = hasty.grade_one(functions(bomb, RIGHT))
    stop.set()
    watcher.join()
    assert outcome.verdict is Verdict.TIMEOUT
    # Of the sandbox: bwrap outside, and at most `processes` inside.
    assert 10 < most - before <= hasty.limits.processes + 2
    assert len(descendants(os.getpid())) <= before


def test_the_number_of_processes(sandbox: Sandbox) -> None:
    """fork fails at the limit; threads count as well."""
    code = """
    import os, threading, time
    def attack():
        count = 0
        try:
            while True:
                if os.fork() == 0:
                    time.sleep(60)
                count += 1
        except BlockingIOError:
            pass
        try:
            threading.Thread(target=time.sleep, args=(60,)).start()
        except RuntimeError:
            return count
    """
    holds(sandbox, code, f"told == {sandbox.limits.processes - 2}")


def test_memory_of_one_process(sandbox: Sandbox) -> None:
    """More than memory_mib in one process is a MemoryError, and that is the verdict."""
    outcome = sandbox.grade_one(functions("def add(a, b):\n    return len(bytearray(600 << 20))", RIGHT))
    assert outcome.verdict is Verdict.MEMORY and "MemoryError" in outcome.detail


def test_memory_in_children(sandbox: Sandbox) -> None:
    """Children that stay below the limit each, and not together, are found by the watch of the host."""
    code = """
    import os, time
    for _ in range(6):
        if os.fork() == 0:
            held = bytearray(150 << 20)
            time.sleep(60)
    time.sleep(60)
    """
    outcome = sandbox.grade_one(functions(code, RIGHT))
    assert outcome.verdict is Verdict.MEMORY and "512 MiB" in outcome.detail
    assert outcome.seconds < sandbox.limits.seconds


def test_memory_shared_between_children(sandbox: Sandbox) -> None:
    """Files in memory that children share count too."""
    code = """
    import mmap, os, time
    for number in range(6):
        if os.fork() == 0:
            with open(f"/tmp/{number}", "wb+") as file:
                file.truncate(150 << 20)
                held = mmap.mmap(file.fileno(), 150 << 20)
                os.unlink(file.name)
            for place in range(0, len(held), 4096):
                held[place] = 1
            time.sleep(60)
    time.sleep(60)
    """
    roomy = dataclasses.replace(sandbox.limits, disk_mib=1500)
    with Sandbox(sandbox.isolation, roomy, workers=1) as opened:
        assert opened.grade_one(functions(code, RIGHT)).verdict is Verdict.MEMORY


def test_shared_memory_without_a_file_cannot_be_made(sandbox: Sandbox) -> None:
    """Its pages stay when the mapping goes, but for one, and nothing would count them."""
    code = f"""
    import mmap
    {ERROR_OF.replace(chr(10), chr(10) + "    ")}
    def attack():
        mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return error_of(lambda: mmap.mmap(-1, 4096)), error_of(lambda: open("/dev/zero", "rb+"))
    """
    holds(sandbox, code, "told == ('PermissionError', 'FileNotFoundError')")


def test_the_name_of_a_process_is_any_bytes(sandbox: Sandbox) -> None:
    """The host reads of it while it looks at the memory."""
    code = """
    import time
    with open("/proc/self/comm", "wb") as name:
        name.write(b"\\xff")
    time.sleep(0.5)
    """
    assert sandbox.grade_one(functions(code, RIGHT)).verdict is Verdict.CRASHED


def test_memory_that_no_limit_counts(sandbox: Sandbox) -> None:
    """memfd and System V segments, which stay outside of every count, cannot be made."""
    code = f"""
    import ctypes, os
    {ERROR_OF.replace(chr(10), chr(10) + "    ")}
    def attack():
        segment = ctypes.CDLL(None).shmget(0, 1 << 30, 0o1600)
        return error_of(lambda: os.memfd_create("x")), segment
    """
    holds(sandbox, code, "told == ('PermissionError', -1)")


def test_a_busy_loop(hasty: Sandbox) -> None:
    """Wall clock, when the program computes."""
    outcome = hasty.grade_one(functions("while True:\n    pass", RIGHT))
    assert outcome.verdict is Verdict.TIMEOUT and outcome.passed == 0


def test_a_busy_loop_after_tests_that_pass(hasty: Sandbox) -> None:
    """A program that hangs in its last test has not passed, and what it passed before is counted."""
    code = "def add(a, b):\n    while a > 5:\n        pass\n    return a + b"
    outcome = hasty.grade_one(functions(code, RIGHT, "assert add(9, 1) == 10"))
    assert (outcome.verdict, outcome.passed, outcome.total) == (Verdict.TIMEOUT, 1, 2)


def test_ignored_signals(hasty: Sandbox) -> None:
    """A program that ignores every signal it can is ended all the same."""
    code = """
    import signal
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    while True:
        signal.pause()
    """
    assert hasty.grade_one(functions(code, RIGHT)).verdict is Verdict.TIMEOUT


DAEMON = f"""
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for descriptor in range(256):
            try:
                os.close(descriptor)
            except OSError:
                pass
        os.execv(sys.executable, [sys.executable, "-S", "-c", "import time; time.sleep(300)  # {MARK}"])
    os._exit(0)
os.wait()
"""


def test_a_daemon_does_not_outlive_its_program(sandbox: Sandbox) -> None:
    """A child of its own session, without a descriptor of ours, is gone from the machine when the verdict is there."""
    code = DAEMON + "import time\ntime.sleep(0.5)\ndef add(a, b):\n    return a + b"
    seen: list[int] = []
    stop = threading.Event()
    watcher = threading.Thread(target=lambda: [seen.extend(processes_with(MARK)) for _ in iter(stop.is_set, True)])
    watcher.start()
    outcome = sandbox.grade_one(functions(code, RIGHT))
    left = processes_with(MARK)
    stop.set()
    watcher.join()
    assert outcome.verdict is Verdict.PASSED and seen and not left


def test_a_daemon_does_not_outlive_its_case(sandbox: Sandbox) -> None:
    """Nothing of one case of a whole program runs during the next one."""
    code = (
        DAEMON
        + """
count = 0
for entry in os.listdir("/proc"):
    if entry.isdigit() and b"left-behind" in open(f"/proc/{entry}/cmdline", "rb").read():
        count += 1
print(count <= 1)
"""
    )
    assert sandbox.grade_one(script(code, ("", "True"), ("", "True"), ("", "True"))).verdict is Verdict.PASSED
    assert not processes_with(MARK)


@pytest.mark.parametrize("descriptor", [1, 2])
def test_an_output_flood(hasty: Sandbox, descriptor: int) -> None:
    """Endless output is a failure, and is read no further than the limit."""
    flood = f"import os\nwhile True:\n    os.write({descriptor}, b'x' * 65536)"
    for program in (functions(flood, RIGHT), script(flood, ("", "x"))):
        outcome = hasty.grade_one(program)
        assert outcome.verdict is Verdict.FLOOD


def test_full_disks(sandbox: Sandbox) -> None:
    """Temporary files are bounded in all, wherever they are written."""
    code = """
    import os
    def attack():
        written = 0
        for number, place in enumerate(["/tmp", "/dev/shm"] * 20):
            try:
                with open(f"{place}/{number}", "wb") as file:
                    for _ in range(32):
                        written += os.write(file.fileno(), bytes(1 << 19))
            except OSError:
                pass
        return written
    """
    disk = sandbox.limits.disk_mib << 20
    holds(sandbox, code, f"{disk // 2} < told <= {disk}")


def test_many_small_files(bubblewrap: Isolation) -> None:
    """Empty files take memory of the kernel, which counts as theirs."""
    code = "for number in range(10**9):\n    open(f'/tmp/{number}', 'w').close()"
    with Sandbox(bubblewrap, Limits(seconds=30, memory_mib=64), 1) as sandbox:
        assert sandbox.grade_one(functions(code, RIGHT)).verdict is Verdict.MEMORY


# What a program may see and change


def test_writing_outside_of_tmp(sandbox: Sandbox) -> None:
    """Nothing but /tmp can be written: not the system, not the interpreter, not the runner."""
    code = f"""
    import os, sys
    {ERROR_OF.replace(chr(10), chr(10) + "    ")}
    def attack():
        places = ["/", "/usr/lib", "/dev", "/proc", "/runner", "/runner/inside", sys.prefix, os.__file__[:-6]]
        places += ["/etc", "/root", "/home", "/var", "/run", "/sys"]
        places += [place for place in [{os.path.abspath(os.curdir)!r}] if not place.startswith("/tmp/")]
        written = []
        for place in places:
            try:
                os.makedirs(place, exist_ok=True)
                open(place + "/written", "w").close()
                written.append(place)
            except OSError:
                pass
        return written
    """
    holds(sandbox, code, "told == []")


def test_the_environment_of_the_parent(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the environment of this process nothing is passed on, in no process that the program sees."""
    monkeypatch.setenv("A_TOKEN_OF_THE_USER", "marker-7531")
    code = """
    import glob, os
    def attack():
        found = [str(dict(os.environ))]
        for file in glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/task/*/environ"):
            try:
                found.append(open(file).read())
            except OSError:
                pass
        return "marker-7531" in "".join(found), len(found)
    """
    holds(sandbox, code, "told[0] is False and told[1] >= 2")


def test_files_of_the_host(sandbox: Sandbox, tmp_path: Path) -> None:
    """No file that is not the system's or the interpreter's: no accounts, no homes, not this repository, no tests."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    repository = Path(__file__).resolve().parents[2]
    files = ["/etc/passwd", "/etc/hostname", "/root/.bashrc", str(Path.home()), str(secret), str(repository)]
    files += [
        str(repository / "README.md"),
        __file__,
        "/proc/1/root/etc/passwd",
        "/proc/1/cwd",
        "/var",
        "/home",
        "/sys",
    ]
    hidden = [path for path in files if path not in ("/root", "/")]
    code = f"""
    import os
    def attack():
        found = []
        for path in {hidden!r}:
            try:
                found += [path] if os.path.isfile(path) or os.listdir(path) else []
            except OSError:
                pass
        return found
    """
    # A home that holds the interpreter is there, with the way to the interpreter alone.
    holds(sandbox, code, f"[path for path in told if path != {str(Path.home())!r}] == []")
    ways = """
    import os, sys
    def attack():
        paths = [f"{folder}/{name}" for folder, folders, files in os.walk("/root") for name in files + folders]
        return [path for path in paths if not path.startswith(sys.prefix) and not sys.prefix.startswith(path)]
    """
    holds(sandbox, ways, "told == []")


def test_other_processes(sandbox: Sandbox) -> None:
    """The program sees the runner and itself, not the host's processes."""
    code = "import os\ndef attack():\n    return sorted(int(name) for name in os.listdir('/proc') if name.isdigit())"
    holds(sandbox, code, "told == [1, 2]")


def test_the_network(sandbox: Sandbox) -> None:
    """TCP, UDP and abstract unix sockets of the host cannot be reached, nor a hypervisor's. (There are no sockets but
    unix ones: buffers of TCP would be memory that nothing counts.)"""
    name = f"\0sandbox-test-{os.getpid()}"
    received: list[bytes] = []
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix,
    ):
        udp.bind(("127.0.0.1", 0))
        unix.bind(name)
        for listener in (tcp, udp, unix):
            listener.settimeout(0.2)
        code = f"""
        import socket
        def attack():
            reached = []
            for family, kind, address in (
                (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", {tcp.getsockname()[1]})),
                (socket.AF_INET, socket.SOCK_STREAM, ("1.1.1.1", 80)),
                (socket.AF_UNIX, socket.SOCK_DGRAM, {name!r}),
                (socket.AF_VSOCK, socket.SOCK_STREAM, (2, 1)),
                (socket.AF_NETLINK, socket.SOCK_RAW, (0, 0)),
            ):
                try:
                    socket.socket(family, kind).connect(address)
                    reached.append(int(family))
                except OSError:
                    pass
            try:
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", {udp.getsockname()[1]}))
            except OSError:
                pass
            return reached
        """
        holds(sandbox, code, "told == []")
        with pytest.raises(TimeoutError):
            received.append(udp.recv(10))


def test_name_spaces_mounts_and_settings(sandbox: Sandbox) -> None:
    """No new name space, no mount, no capability, no setting of the kernel."""
    code = """
    import ctypes, os
    libc = ctypes.CDLL(None)
    def attack():
        calls = [libc.unshare(flag) for flag in (0x10000000, 0x20000, 0x40000000, 0x20000000)]
        calls.append(libc.mount(b"x", b"/tmp", b"tmpfs", 0, None))
        calls.append(libc.chroot(b"/tmp"))
        pid = libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0) if os.uname().machine == "x86_64" else -1
        if pid == 0:
            os._exit(0)
        calls.append(pid)
        written = 0
        for file in ("user/max_user_namespaces", "kernel/core_pattern", "vm/overcommit_memory", "kernel/hostname"):
            try:
                with open("/proc/sys/" + file, "w") as setting:
                    setting.write("1")
                written += 1
            except OSError:
                pass
        status = open("/proc/self/status").read()
        none = all(line.split()[1] == "0" * 16 for line in status.splitlines() if line.startswith("Cap"))
        return set(calls), written, none, "NoNewPrivs:\\t1" in status, "Seccomp:\\t2" in status
    """
    holds(sandbox, code, "told == ({-1}, 0, True, True, True)")


def test_links_out_of_tmp(sandbox: Sandbox) -> None:
    """Links in /tmp lead to what the program can see anyway, and the host follows none."""
    code = """
    import os
    def attack():
        found = []
        targets = ("/etc/passwd", "/proc/1/environ", "/proc/1/fd/0", "/proc/1/root", "../../etc")
        for number, target in enumerate(targets):
            os.symlink(target, f"/tmp/{number}")
            try:
                found.append(os.listdir(f"/tmp/{number}") if number > 2 else open(f"/tmp/{number}").read(1))
            except OSError:
                pass
        return found
    """
    holds(sandbox, code, "told == []")


def test_the_interpreter_cannot_be_replaced(sandbox: Sandbox) -> None:
    """/proc/self/exe is the interpreter of this machine, and cannot be written."""
    code = f"""
    {ERROR_OF.replace(chr(10), chr(10) + "    ")}
    def attack():
        return error_of(lambda: open("/proc/self/exe", "r+b"))
    """
    holds(sandbox, code, "told in ('OSError', 'PermissionError')")


# Programs that break things


@pytest.mark.parametrize(
    "code",
    [
        "(" * 100_000,
        "-" * 1_000_000 + "1",
        "x = " + "[" * 50_000 + "]" * 50_000,
        "def add(a, b):\n    return add(a, b)",
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef add(a, b):\n    return add(a, b)",
        "def add(a, b):\n    return a + b\n\0",
        "def add(a, b):\n    return '\ud800'",
        "class A:\n    def __str__(self): raise SystemExit\ndef add(a, b):\n    raise ValueError(A())",
        "class E(Exception):\n    def __str__(self): return 5\ndef add(a, b):\n    raise E",
        "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
        "def add(a, b):\n    x = []\n    for _ in range(100000):\n        x = [x]\n    return x",
        "def add(a, b):\n    return float('nan')",
        "def add(a, b):\n    return 10 ** 100_000",
        "def add(a, b):\n    return bytes(60 << 20)",
        "def add(a, b):\n    return [[]] * 3_000_000",
        "def add(a, b):\n    return (n for n in iter(int, 1))",
        "print('\\ud800')",
        "import os\nos.write(1, bytes(range(256)) * 10)\nos.write(2, b'\\0\\xff')\ndef add(a, b):\n    return 0",
        "",
        "del __builtins__",
    ],
)
def test_programs_that_break_things(hasty: Sandbox, code: str) -> None:
    """Source, values and errors at the edge of what Python can do: a failure of the program, told in printable text."""
    outcome = hasty.grade_one(functions(code, RIGHT, entry_points=("add",)))
    assert outcome.verdict not in (Verdict.PASSED, Verdict.FLOOD) and outcome.passed == 0
    assert outcome.detail.isprintable() and 0 < len(outcome.detail) <= 500
    assert hasty.grade_one(script(code, ("", "3"))).verdict is not Verdict.PASSED


def test_edges_that_are_right(sandbox: Sandbox) -> None:
    """The same edges, where the program is right, pass: CRLF, surrogates, huge numbers, NaN."""
    for code, test in (
        ("def add(a, b):\r\n    return a + b\r\n", RIGHT),
        ("def same(x):\n    return x", "assert same('\\ud800') == '\\ud800'"),
        ("def power(n):\n    return 10 ** n", "assert power(50_000) == 10 ** 50_000"),
        ("def nan():\n    return float('nan')", "assert nan() != nan()"),
        ("def infinity():\n    return -float('inf')", "assert infinity() == -float('inf')"),
    ):
        outcome = sandbox.grade_one(functions(code, test))
        assert outcome.verdict is Verdict.PASSED, outcome


def test_everything_is_gone(sandbox: Sandbox) -> None:
    """After all of the above: no process of a sandbox is below this one."""

    def left() -> list[bytes]:
        told = []
        for pid in descendants(os.getpid()):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                told.append(Path(f"/proc/{pid}/cmdline").read_bytes())
        return [line for line in told if b"bwrap" in line or b"inside.main" in line]

    assert soon(lambda: not left()), left()
