"""The rules of the protocol one by one, without a sandbox around them."""

from __future__ import annotations

import os
import platform
import struct
from collections.abc import Iterator

import pytest

from ra3_megatron.rlvr.sandbox import Ended, Limits, Outcome, Verdict, _judge
from ra3_megatron.rlvr.sandboxing import seccomp
from ra3_megatron.rlvr.sandboxing.inside.channel import LARGEST, Broken, Channel
from ra3_megatron.rlvr.sandboxing.inside.remote import Handle, Remote
from tests.rlvr.programs import functions

SECRET = "5ec4e7" * 5


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """Both ends of a channel."""
    requests, answers = os.pipe(), os.pipe()
    yield Channel(answers[0], requests[1]), Channel(requests[0], answers[1])
    for descriptor in (*requests, *answers):
        os.close(descriptor)


def judged(stdout: str, returncode: int = 0) -> Outcome:
    """What two tests deserve after this was said."""
    ended = Ended(returncode, stdout.encode(), b"", False, False, False, 1.0)
    return _judge(functions("", "assert 1", "assert 2"), ended, SECRET, Limits())


def test_a_pass_takes_the_secret_for_every_test_and_the_end() -> None:
    right = f"started\n{SECRET} pass\n{SECRET} pass\n{SECRET} end 0\n"
    assert judged(right).verdict is Verdict.PASSED and judged(right, returncode=1).verdict is Verdict.PASSED
    for wrong in (
        "",
        "started\n",
        f"{SECRET} pass\n{SECRET} pass\n",
        f"{SECRET} pass\n{SECRET} end 0\n",
        f"{SECRET} end 0\n",
        f"{SECRET} pass\n" * 3 + f"{SECRET} end 0\n",
        right.replace(SECRET, "0" * 30),
        right.replace(SECRET, ""),
        right.replace(SECRET, SECRET.upper()),
        right.replace("pass", "passed"),
        f"{SECRET} pass\n{SECRET} fail wrong 00\n{SECRET} end 0\n",
    ):
        assert judged(wrong).verdict is not Verdict.PASSED, wrong


def test_a_length_beyond_the_largest_is_not_waited_for(ends: tuple[Channel, Channel]) -> None:
    runner, candidate = ends
    os.write(candidate.write, (LARGEST + 1).to_bytes(8, "little"))
    os.dup2(0, candidate.write)  # no more will come
    with pytest.raises(Broken, match="written into the channel"):
        runner.receive()


def test_a_malformed_answer_is_the_last(ends: tuple[Channel, Channel]) -> None:
    """The process is not asked again: what it says next could be an answer to anything."""
    runner, candidate = ends
    remote = Remote(runner)
    candidate.send(b"V?")
    candidate.send(b"VT" + bytes(4))
    for _ in range(2):
        with pytest.raises(Broken, match="written into the channel"):
            remote.request("call", Handle(remote, 0), (), {})
    assert remote.broken is not None


def test_an_answer_cannot_name_what_was_never_sent(ends: tuple[Channel, Channel]) -> None:
    """Changes are of the arguments of this call, and keep their type."""
    for answer in (
        b"VN\1\0\0\0\5\0\0\0l\0\0\0\0",
        b"VN\1\0\0\0\0\0\0\0S\0\0\0\0",
        b"VN\1\0\0\0\0\0\0\0N",
        b"Vo\5\0\0\0\0\0\0\0",
    ):
        remote, argument = Remote(ends[0]), [1]
        ends[1].send(answer)
        with pytest.raises(Broken):
            remote.request("call", Handle(remote, 0), (argument,), {})
        assert argument == [1]


def run_filter(program: bytes, number: int, argument: int, architecture: int) -> int:
    """What a filter says of a system call: the instructions of seccomp.py, interpreted."""
    lines = list(struct.iter_unpack("=HBBI", program))
    data = {seccomp.NUMBER_AT: number, seccomp.ARCHITECTURE_AT: architecture}
    data |= {seccomp.FIRST_ARGUMENT_AT: argument, seccomp.FOURTH_ARGUMENT_AT: argument}
    place = accumulator = 0
    while True:
        code, yes, no, value = lines[place]
        if code == seccomp.RETURN:
            return int(value)
        if code == seccomp.LOAD:
            accumulator, taken = data[value], 0
        else:
            tests = {
                seccomp.EQUAL: accumulator == value,
                seccomp.AT_LEAST: accumulator >= value,
                seccomp.ANY_BIT: bool(accumulator & value),
            }
            taken = yes if tests[code] else no
        place += 1 + taken


@pytest.mark.parametrize("machine", sorted(seccomp.ARCHITECTURES))
def test_the_filter(machine: str) -> None:
    """On both processors: the same calls are denied, the same conditions hold, and all else is allowed."""
    program, architecture = seccomp.program(machine), seccomp.ARCHITECTURES[machine]
    deny, missing, allow = seccomp.ERROR | seccomp.EPERM, seccomp.ERROR | seccomp.ENOSYS, seccomp.ALLOW
    denied = {*seccomp.DENIED[machine], *seccomp.COMMON}
    special = {seccomp.CLONE[machine], seccomp.SOCKET[machine], seccomp.PRLIMIT[machine], seccomp.CLONE3}
    special.add(seccomp.MMAP[machine])
    assert not denied & special and len(denied) == len(seccomp.DENIED[machine]) + len(seccomp.COMMON)
    for number in range(600):
        if number not in special:
            expected = missing if number > seccomp.NEWEST else deny if number in denied else allow
            assert run_filter(program, number, 0, architecture) == expected, number
    for name, argument, expected in (
        ("CLONE", 17, allow),
        ("CLONE", 0x3D0F00, allow),  # a thread
        *(("CLONE", flag | 17, deny) for flag in (0x20000, 0x10000000, 0x20000000, 0x40000000, 0x8000000, 0x2000000)),
        ("SOCKET", 1, allow),
        *(("SOCKET", family, deny) for family in (0, 2, 10, 16, 17, 40)),
        *(("MMAP", flags, allow) for flags in (0x02, 0x22, 0x32, 0x01, 0x03)),
        *(("MMAP", flags, deny) for flags in (0x21, 0x23, 0x8021)),
        ("PRLIMIT", 0, allow),
        ("PRLIMIT", 1, deny),
    ):
        assert run_filter(program, getattr(seccomp, name)[machine], argument, architecture) == expected, (
            name,
            argument,
        )
    assert run_filter(program, seccomp.CLONE3, 0, architecture) == missing
    assert run_filter(program, 0x40000000 + 39, 0, architecture) == missing  # x32
    assert run_filter(program, 0, 0, 0x40000003) == seccomp.KILL  # i386


def test_numbers_of_system_calls() -> None:
    """The numbers are those of the kernel's headers, where they are installed."""
    folder = f"/usr/include/{platform.machine()}-linux-gnu/asm"
    file = f"{folder}/unistd_64.h"
    if platform.machine() != "x86_64" or not os.path.exists(file):
        pytest.skip("headers of the kernel for the sandbox's numbers are not on this machine's disk")
    with open(file, encoding="ascii") as lines:
        words = [line.split() for line in lines if line.startswith("#define __NR_")]
    names = {int(number): name.removeprefix("__NR_") for _, name, number in words}
    denied = {names[number] for number in (*seccomp.DENIED["x86_64"], *seccomp.COMMON) if number in names}
    assert {"ptrace", "memfd_create", "unshare", "mount", "setns", "process_vm_readv", "pidfd_getfd", "bpf"} <= denied
    assert {"shmget", "io_uring_setup", "userfaultfd", "keyctl", "kcmp", "move_mount", "perf_event_open"} <= denied
    harmless = {
        "read",
        "write",
        "fork",
        "vfork",
        "execve",
        "futex",
        "prctl",
        "wait4",
        "pipe2",
        "kill",
        "getrandom",
    }
    assert not denied & harmless
    special = [seccomp.CLONE["x86_64"], seccomp.SOCKET["x86_64"], seccomp.PRLIMIT["x86_64"]]
    assert names[seccomp.MMAP["x86_64"]] == "mmap"
    assert [names[number] for number in special] == ["clone", "socket", "prlimit64"]
