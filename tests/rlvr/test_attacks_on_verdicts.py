"""Programs that would like to have passed. Each test says what it proves; docs/sandbox.md has the table.

An attack tells what it found as the result of `attack()`; a test that passes on it has seen the attack fail.
"""

from __future__ import annotations

import signal

import pytest

from ra3_megatron.rlvr.sandbox import FunctionTests, Program, Sandbox, Verdict
from tests.rlvr.programs import RIGHT, functions, holds, script

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "import os\nos._exit(0)",
        "raise KeyboardInterrupt",
        "raise GeneratorExit",
        "import os\nos.kill(os.getpid(), 9)",
        "import os\nos.abort()",
        "import ctypes\nctypes.string_at(0)",
        "import atexit, os\natexit.register(os._exit, 0)\nraise SystemExit(0)",
        "import os\nos.execv('/usr/bin/prlimit', ['prlimit', '--version'])",
    ],
)
def test_an_end_before_the_tests(sandbox: Sandbox, code: str) -> None:
    """However a program ends before the tests are through, it has not passed, and the sandbox is not blamed."""
    outcome = sandbox.grade_one(functions(code, RIGHT))
    assert outcome.verdict is Verdict.CRASHED and outcome.passed == 0
    inside = f"def add(a, b):\n    exec({code!r})"
    assert sandbox.grade_one(functions(inside, RIGHT)).verdict is Verdict.CRASHED


def test_an_end_that_a_test_would_forgive(sandbox: Sandbox) -> None:
    """A test that catches everything does not pass when the process has ended under it."""
    test = "try:\n    end()\nexcept BaseException:\n    pass"
    outcome = sandbox.grade_one(functions("import os\ndef end():\n    os._exit(0)", test))
    assert outcome.verdict is Verdict.CRASHED and outcome.passed == 0


def test_killing_and_stopping_the_runner(sandbox: Sandbox) -> None:
    """No signal of the program reaches the runner; a right program is still right afterwards."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it from birth
    code = """
    import os
    for number in range(1, 65):
        try:
            os.kill(os.getppid(), number)
        except OSError:
            pass
    def add(a, b):
        return a + b
    """
    try:
        assert sandbox.grade_one(functions(code, RIGHT)).verdict is Verdict.PASSED
        assert sandbox.grade_one(functions(code, "assert add(1, 2) == 4")).verdict is Verdict.WRONG
    finally:
        signal.signal(signal.SIGINT, before)


def test_taking_resources_from_the_runner(sandbox: Sandbox) -> None:
    """The limits of the runner cannot be lowered: a runner that is killed would look like a failure of the sandbox."""
    code = """
    import resource
    def attack():
        done = []
        for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE):
            try:
                resource.prlimit(1, kind, (0, 0))
                done.append(kind)
            except OSError:
                pass
        return done
    """
    holds(sandbox, code, "told == []")


@pytest.mark.parametrize(
    "code",
    [
        # Objects that are equal to everything, of every disguise.
        "class A:\n    def __eq__(self, other): return True\ndef add(a, b): return A()",
        "class A(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\ndef add(a, b): return A(0)",
        "class A(str):\n    def __eq__(self, other): return True\ndef add(a, b): return A()",
        "class A(list):\n    def __eq__(self, other): return True\ndef add(a, b): return A()",
        "class A(tuple):\n    _fields = ('x',)\n    def __eq__(self, o): return True\ndef add(a, b): return A((1,))",
        "class A(dict):\n    __ne__ = __eq__ = lambda self, other: True\ndef add(a, b): return A()",
        "class M(type):\n    def __eq__(self, other): return True\n    __hash__ = type.__hash__\n"
        "class A(metaclass=M): pass\ndef add(a, b): return A",
        "class A:\n    __eq__ = lambda s, o: True\n    __class__ = property(lambda s: int)\ndef add(a, b): return A()",
        "import unittest.mock\ndef add(a, b): return unittest.mock.ANY",
        # Builtins and modules of the program's process.
        "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.all = lambda x: True\n"
        "builtins.print = builtins.open = builtins.exec = builtins.compile = lambda *a, **k: None\n"
        "def add(a, b): return 0",
        "import sys\nsys.stdout = sys.stderr = sys.stdin = None\nsys.modules.clear()\ndef add(a, b): return 0",
        "import sys, gc\nfor thing in gc.get_objects():\n    if type(thing) is dict and 'namespace' in thing:\n"
        "        thing.clear()\ndef add(a, b): return 0",
        # Threads and hooks that would answer in place of the program.
        "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\ndef add(a, b): return 0",
        "def add(*a): raise AssertionError",
        "def add(*a): raise StopIteration",
    ],
)
def test_answers_that_only_look_right(sandbox: Sandbox, code: str) -> None:
    """Tests compare in the runner, by values that no code of the program can touch."""
    outcome = sandbox.grade_one(functions(code, RIGHT, "assert not add(2, 2) != 4", "assert add(0, 1) in (1, 2)"))
    assert outcome.verdict in (Verdict.WRONG, Verdict.CRASHED) and outcome.passed == 0


def test_arithmetic_and_order_do_not_reach_the_program(sandbox: Sandbox) -> None:
    """What a test expects is never shown to the program, through no operator."""
    code = """
    class Anything:
        def __getattr__(self, name):
            return lambda *arguments: 0
        def _(self, *arguments):
            return 0
        __sub__ = __rsub__ = __abs__ = __add__ = __radd__ = __mul__ = __truediv__ = __mod__ = __contains__ = _
        __lt__ = __gt__ = __le__ = __ge__ = lambda self, other: True
        __float__ = lambda self: 0.0
        __round__ = lambda self, digits=0: self
    def root(x):
        return Anything()
    """
    for test in (
        "assert abs(root(2) - 1.4142) < 1e-3",
        "assert 1.41 < root(2) < 1.42",
        "import math\nassert math.isclose(root(2), 1.4142, abs_tol=1e-3)",
        "assert round(root(2), 2) == 1.41",
        "assert root(2) in [1.41, 1.42]",
        "assert 1.41 in root(2)",
    ):
        assert sandbox.grade_one(functions(code, test)).verdict is not Verdict.PASSED, test


def test_the_tests_modules_are_their_own(sandbox: Sandbox) -> None:
    """Modules that tests use are the runner's, imported by the setup or not, whatever the program made of its own."""
    code = """
    import math, sys
    math.isclose = lambda *arguments, **options: True
    class Fake:
        @staticmethod
        def isclose(*arguments, **options):
            return True
    sys.modules["math"] = math = Fake
    def root(x):
        return 5.0
    """
    for setup in ("import math", "from math import isclose", ""):
        test = "assert isclose(root(2), 1.4142)" if "from" in setup else "assert math.isclose(root(2), 1.4142)"
        assert sandbox.grade_one(functions(code, test, setup=setup)).verdict is Verdict.WRONG
    honest = functions("def root(x):\n    return x ** 0.5", "assert math.isclose(root(4), 2)")
    assert sandbox.grade_one(honest).verdict is Verdict.PASSED


def test_the_tests_functions_are_their_own(sandbox: Sandbox) -> None:
    """A program that defines the helpers of the tests, or builtins, changes nothing for them."""
    code = """
    def check(candidate): pass
    def close(a, b): return True
    def all(x): return True
    def abs(x): return 0
    def add(a, b): return 0
    """
    setup = """
    def close(a, b):
        return abs(a - b) < 1e-6
    def check(candidate):
        assert close(candidate(1, 2), 3)
        assert all(candidate(n, n) == 2 * n for n in range(3))
    """
    outcome = sandbox.grade_one(functions(code, "check(add)", setup=setup))
    assert outcome.verdict is Verdict.WRONG


def test_forged_lines_on_every_descriptor(sandbox: Sandbox) -> None:
    """Lines as the runner writes them, with made-up secrets, on every descriptor there is: ignored."""
    code = """
    import os, sys
    line = b"".join(b"%s pass\\n%s end 0\\n" % (s, s) for s in (b"0" * 32, b"", b"started", b"None"))
    own = set(map(int, os.listdir("/proc/self/fd")))
    for descriptor in range(256):
        if descriptor not in (own - {0, 1, 2}):
            try:
                os.write(descriptor, b"started\\n" + line)
            except OSError:
                pass
    print(line.decode(), flush=True)
    def add(a, b):
        return 0
    """
    outcome = sandbox.grade_one(functions(code, RIGHT))
    assert outcome.verdict is Verdict.WRONG and outcome.passed == 0


FRAME = """
import os
def frame(body):
    return len(body).to_bytes(8, "little") + body
def channel():
    out = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) > 2 and "pipe" in os.readlink("/proc/self/fd/" + name):
                out.append(int(name))
        except OSError:
            pass
    return out
def say(data):
    for descriptor in channel():
        try:
            os.write(descriptor, data)
        except OSError:
            pass
"""


@pytest.mark.parametrize(
    "body",
    [
        "say(frame(b'VN' + bytes(4)) * 4)",
        "say(frame(b'VT' + bytes(4)) * 50)",
        "say(b'garbage' * 10)",
        "say((2 ** 63).to_bytes(8, 'little'))",
        "say((30 << 20).to_bytes(8, 'little') + b'x')",
        "say(frame(b''))",
        "say(frame(b'V' + b'l\\x01\\0\\0\\0' * 20000))",
        "say(frame(b'Vl\\xff\\xff\\xff\\xff'))",
        "say(frame(b'Vi\\xff\\xff\\xff\\xff'))",
        "say(frame(b'Vd\\x01\\0\\0\\0l\\0\\0\\0\\0N'))",
        "say(frame(b'Vo\\x09\\0\\0\\0'))",
        "say(frame(b'Vn' + b'N' * 3))",
        "say(frame(b'XN'))",
        "say(frame(b'Xt\\x03\\0\\0\\0h\\0\\0\\0\\0h\\0\\0\\0\\0h\\0\\0\\0\\0'))",
        "say(frame(b'VN\\xff\\xff\\xff\\xff'))",
        "say(frame(b'pass'))",
        "say(frame(b'VD\\x03\\0\\0\\0abc'))",
        "say(frame(b'Vs\\x02\\0\\0\\0\\xff\\xff'))",
        "say(frame(b'VQi\\x01\\0\\0\\0\\x01i\\x01\\0\\0\\0\\0'))",
    ],
)
def test_forged_messages(hasty: Sandbox, body: str) -> None:
    """Messages on the channel, well-formed before they were asked for or malformed: never a pass, never our fault."""
    code = f"{FRAME}\n{body}\ndef add(a, b):\n    {body}\n    return 0"
    outcome = hasty.grade_one(functions(code, RIGHT, "assert add(5, 5) == 10"))
    assert outcome.verdict in (Verdict.WRONG, Verdict.CRASHED, Verdict.TIMEOUT) and outcome.passed == 0


SEARCH = """
import re
def search(pattern):
    \"\"\"How often a pattern, which does not match itself, is in the memory of this process.\"\"\"
    found = 0
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb") as memory:
        for line in maps.read().splitlines():
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            if line.split()[1][0] == "r" and "[v" not in line:
                try:
                    memory.seek(begin)
                    found += len(re.findall(pattern, memory.read(end - begin)))
                except (OSError, ValueError, OverflowError):
                    pass
    return found
"""


def test_the_secret_is_not_in_the_program(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither secret nor tests are anywhere in the memory of the program's process; what is there is found."""
    from ra3_megatron.rlvr import sandbox as module

    monkeypatch.setattr(module.secrets, "token_hex", lambda _: "feedface" * 4)
    code = (
        SEARCH
        + """
planted = "planted" + "-here"
def attack():
    return [search(pattern) for pattern in (rb"feed[f]acefeed[f]ace", rb"expected[-]matrix", rb"planted[-]here")]
"""
    )
    test = "told = attack()\nassert told[:2] == [0, 0] and told[2] > 0, told  # expected-matrix"
    outcome = sandbox.grade_one(functions(code, test, entry_points=("attack",)))
    assert outcome.verdict is Verdict.PASSED, outcome


def test_frames_and_objects_hold_no_secret(sandbox: Sandbox) -> None:
    """Frames, and all objects that the collector knows, reach neither the tests nor a secret."""
    code = """
    import gc, sys
    def attack():
        found = []
        frame = sys._getframe()
        seen = []
        while frame is not None:
            seen.append(str(frame.f_locals)[:100000] + str(sorted(frame.f_globals)))
            frame = frame.f_back
        texts = seen + [thing for thing in gc.get_objects() if isinstance(thing, str)]
        for thing in gc.get_objects():
            if type(thing) in (dict, list, tuple):
                texts += [str(part) for part in (thing.values() if type(thing) is dict else thing) if type(part) is str]
        return [text[:50] for text in texts if "-".join(("hidden", "in", "setup")) in text]
    """
    test = "told = attack()\nassert told == [], told"
    outcome = sandbox.grade_one(functions(code, test, setup="expected = 'hidden-in-setup'", entry_points=("attack",)))
    assert outcome.verdict is Verdict.PASSED, outcome


def test_looking_into_the_runner(sandbox: Sandbox) -> None:
    """ptrace, process_vm_readv, pidfd_getfd and every file of /proc/1 that could tell are refused."""
    code = """
    import ctypes, os
    libc = ctypes.CDLL(None)
    def attack():
        opened = []
        for name in ("mem", "maps", "environ", "fd/0", "fd/1", "fd/3", "auxv", "stack", "syscall", "io", "pagemap",
                     "smaps", "task/1/mem", "task/1/fd/0", "root/tmp", "cwd", "exe", "ns/user", "fdinfo/0"):
            try:
                os.close(os.open("/proc/1/" + name, os.O_RDONLY))
                opened.append(name)
            except OSError:
                pass
        for flags in (os.O_WRONLY, os.O_RDWR):
            for name in ("mem", "fd/1", "fd/0", "fd/3", "oom_score_adj", "timens_offsets", "uid_map"):
                try:
                    os.close(os.open("/proc/1/" + name, flags))
                    opened.append(name)
                except OSError:
                    pass
        x86 = os.uname().machine == "x86_64"
        buffer = ctypes.create_string_buffer(64)
        vector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 64)
        calls = [libc.ptrace(16, 1, 0, 0), libc.ptrace(0x4206, 1, 0, 0)]
        calls.append(libc.process_vm_readv(1, vector, 1, vector, 1, 0))
        pidfd = libc.syscall(434, 1, 0)
        calls += [libc.syscall(438, pidfd, number, 0) for number in range(8)]
        return opened, set(calls)
    """
    holds(sandbox, code, "told == ([], {-1})")


def test_shielding_does_not_rest_on_the_filter_alone(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the filter of system calls the runner still cannot be looked into: it is not dumpable."""
    from ra3_megatron.rlvr.sandboxing import seccomp

    allow = bytes.fromhex("06000000") + seccomp.ALLOW.to_bytes(4, "little")
    monkeypatch.setattr(seccomp, "program", lambda: allow)
    code = """
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    def attack():
        buffer = ctypes.create_string_buffer(64)
        vector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 64)
        calls = [libc.ptrace(16, 1, 0, 0), libc.process_vm_readv(1, vector, 1, vector, 1, 0)]
        calls.append(libc.syscall(438, libc.syscall(434, 1, 0), 0, 0))
        calls.append(libc.unshare(0x10000000))
        return set(calls), [line for line in open("/proc/self/status") if line.startswith("Seccomp:")]
    """
    holds(sandbox, code, "told == ({-1}, ['Seccomp:\\t2\\n'])")


def test_inherited_descriptors(sandbox: Sandbox) -> None:
    """The program holds stdin (empty), two outputs and the two ends of its channel, nothing else."""
    code = """
    import os
    def attack():
        kinds = []
        for descriptor in range(1024):
            try:
                kinds.append((descriptor, os.readlink(f"/proc/self/fd/{descriptor}").split(":")[0]))
            except OSError:
                pass
        same = os.fstat(1) == os.fstat(2)
        return [kind for _, kind in kinds], kinds[0], os.read(0, 1), same
    """
    holds(sandbox, code, "told == (['/dev/null'] + ['pipe'] * 4, (0, '/dev/null'), b'', True)")


def test_the_expected_output_is_never_shown(sandbox: Sandbox) -> None:
    """A whole program finds its input, and nowhere the output that is expected of it, in memory or files."""
    code = (
        SEARCH
        + """
import os, sys
data = sys.stdin.read()
opened = 0
for pid in (1, os.getppid()):
    for name in ("mem", "fd/0", "fd/3", "environ", "maps"):
        try:
            os.close(os.open(f"/proc/{pid}/{name}", os.O_RDONLY))
            opened += 1
        except OSError:
            pass
print(search(rb"to[-]be[-]expected"), search(rb"some[-]input") > 0, opened)
"""
    )
    checker = "def check(data, expected, output):\n    return expected == 'to-be-expected' and output == '0 True 0\\n'"
    outcome = sandbox.grade_one(script(code, ("some-input", "to-be-expected"), checker=checker))
    assert outcome.verdict is Verdict.PASSED, outcome


def test_the_infrastructure_is_not_to_be_blamed(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """A program that prints what bwrap prints when it fails is graded like any other, at once."""
    code = "import os\nos.write(2, b'bwrap: No such file\\n')\nos._exit(1)"
    outcome = sandbox.grade_one(functions(code, RIGHT))
    assert outcome.verdict is Verdict.CRASHED and not caplog.records


@pytest.mark.parametrize(
    "test",
    [
        "assert all(map(lambda case: attack(case) == 1, [1, 2]))",
        "for got, want in zip(map(attack, [1, 2]), [1, 2]): assert got == want",
        "assert [attack(case) for case in [1, 2]] == []",
    ],
)
def test_an_end_of_the_cases_cannot_be_made_up(sandbox: Sandbox, test: str) -> None:
    """A test that maps over cases would take StopIteration for the end of them."""
    code = "def attack(case):\n    raise StopIteration\n"
    outcome = sandbox.grade_one(Program(code, FunctionTests("", (test,), entry_points=("attack",))))
    assert outcome.verdict is not Verdict.PASSED and "StopIteration" in outcome.detail
